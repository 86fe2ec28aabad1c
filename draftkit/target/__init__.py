"""Frozen large models with one small interface."""
