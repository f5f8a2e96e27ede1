"""What the facts of a run show: gathered into sections, and drawn before the output gets its name."""
