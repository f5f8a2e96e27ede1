"""Where what can be made again is kept from one process to the next: machine code and facts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """A folder in ``$MERGETOOL_CACHE``, or else in the user's cache; it need not exist.

    Args:
        kind: its name, for what is kept there.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mergetool")
    return Path(os.environ.get("MERGETOOL_CACHE") or user) / kind
