"""Meaning to work: stages, jobs, shards, memory; show."""
