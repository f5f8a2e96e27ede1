"""Model card, provenance, and everything in a model folder that is not a tensor."""

from mergetool.publish.folder import publish
from mergetool.publish.local import Local, read_local
from mergetool.publish.provenance import PROVENANCE, PROVENANCE_FORMAT, RECIPE, header_digest

__all__ = ["PROVENANCE", "PROVENANCE_FORMAT", "RECIPE", "Local", "header_digest", "publish", "read_local"]
