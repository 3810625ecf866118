"""Ablation studies: variants times seeds, tables and figures."""
