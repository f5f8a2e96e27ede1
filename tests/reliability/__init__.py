"""Faults of the disk, kills at any moment, and hostile files."""
