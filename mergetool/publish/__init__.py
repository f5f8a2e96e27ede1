"""Model card, provenance, and everything in a model folder that is not a tensor."""

from mergetool.publish.folder import publish
from mergetool.publish.provenance import FORMAT, PROVENANCE, RECIPE, header_digest

__all__ = ["FORMAT", "PROVENANCE", "RECIPE", "header_digest", "publish"]
