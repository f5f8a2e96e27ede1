"""Memory that is let go goes back to the system, and so can be taken again in another shape."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD = -3  # glibc's name for it in malloc.h
_LARGE = 1 << 20


def give_back_large() -> None:
    """Ask the C library to give large blocks back as soon as they are freed, for the rest of the process.

    glibc keeps blocks of up to 32 MB for later once it has seen such blocks freed. A model that is made again and
    again leaves gaps there that its next weights do not fit into: three times its size, measured. Elsewhere than on
    Linux with glibc nothing is done.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _LARGE)
