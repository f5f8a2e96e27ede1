"""Merges of published models, fetched from package registries."""
