"""Model card, provenance, and everything in a model folder that is not a tensor."""
