"""Kinds of machines that a simulation may assume in place of a measured step rate."""

from __future__ import annotations

# name: tokens that a pass takes for the price of one, and the size to which it is padded
MACHINES = {"memory-bound": (2048, 64), "balanced": (256, 32), "compute-bound": (16, 4)}
