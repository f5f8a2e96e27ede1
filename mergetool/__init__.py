"""Merge neural-network checkpoints: load a recipe, build a plan, run it."""

__version__ = "0.1.0"
