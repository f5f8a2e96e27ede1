"""The catalogue: one file per method, one line per method here."""
