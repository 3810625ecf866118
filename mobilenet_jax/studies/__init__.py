"""Ablation studies: variants trained with several seeds, and their tables and figures."""
