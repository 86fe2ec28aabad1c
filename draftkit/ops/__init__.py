"""Tensors in, tensors out: no input or output, no process group, no recipe."""
