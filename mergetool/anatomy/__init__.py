"""What a tensor means: layer, part, axes; families as data."""
