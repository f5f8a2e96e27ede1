"""Numeric building blocks: compiled tiles, rounding, order statistics, Gram matrices, counter-based random numbers."""
