"""Drafters: their layers, heads, losses and checkpoints."""
