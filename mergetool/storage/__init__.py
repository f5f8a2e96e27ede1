"""Bytes to tensors and back; has never heard of models."""
