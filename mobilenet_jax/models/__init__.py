"""Architectures: tables of rows, the network that walks them, what they cost."""
