"""The first 8 bytes of a safetensors file: how long the header is, or what stands there instead of one."""

from __future__ import annotations

import struct

from mergetool.errors import HeaderError

LARGEST_HEADER = 100_000_000
"""The most bytes of JSON that readers of the format accept."""

# What people find in place of a safetensors file, by its first bytes.
_IMPOSTORS = (
    (b"version ", "is a Git LFS pointer, not the weights", "run `git lfs pull` in its folder"),
    (
        b"PK\x03\x04",
        "is a PyTorch pickle, not a safetensors file",
        "save it with `safetensors.torch.save_file`",
    ),
    (b"GGUF", "is a GGUF file, not a safetensors file", "use the safetensors release of this model"),
    (b"<!", "is a web page, not a safetensors file", "download the file itself"),
    (b"<html", "is a web page, not a safetensors file", "download the file itself"),
)


def preamble_size(first: bytes, file_size: int, where: str) -> int:
    """The number of bytes before the data: 8 and the length that the first 8 bytes of a file state.

    Raises:
        HeaderError: the length cannot be right for a file of ``file_size`` bytes.
    """
    if len(first) < 8:
        raise truncated(file_size, "at least 8", where)
    (length,) = struct.unpack("<Q", first[:8])
    if length > LARGEST_HEADER:
        for magic, what, fix in _IMPOSTORS:
            if first.startswith(magic):
                raise HeaderError(what, where, fix)
        raise HeaderError(
            f"is not a safetensors file: its header would have {length:,} bytes, over the limit of {LARGEST_HEADER:,}",
            where,
            "download it again, or check that the file is what its name says",
        )
    if 8 + length > file_size:
        raise truncated(file_size, f"at least {8 + length}", where)
    return 8 + int(length)


def truncated(size: int, expected: str, where: str) -> HeaderError:
    """The error of a file of ``size`` bytes where ``expected`` (a number in words) are needed."""
    return HeaderError(f"is truncated: {size} bytes, {expected} expected", where, "download it again")
