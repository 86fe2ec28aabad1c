"""Frozen large models behind one small interface."""
