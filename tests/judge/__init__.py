"""The judges: oracles on cases done by hand, and other people's tools on real checkpoints."""
