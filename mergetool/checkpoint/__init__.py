"""A model as lazy named tensors, its config and its other files."""
