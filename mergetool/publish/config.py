"""The lender's config with the dtype that the weights are stored in and what a correction switches, no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergetool.errors import HeaderError
from mergetool.storage.dtypes import dtype

_KEYS = ("dtype", "torch_dtype")
# These speak of how weights are stored or computed by other means than the model's own dtype.
_NOT_ITS_OWN = frozenset(("quantization_config", "compression_config"))


def with_dtype(raw: bytes, stored: str | None) -> bytes:
    """Name ``stored`` wherever the config names a floating dtype of weights; keys, order and all else stay.

    Args:
        raw: the content of ``config.json``.
        stored: the dtype asked for, in either spelling; None: the config stays as it is, to the byte.
    """
    if stored is None:
        return raw
    config = json.loads(raw)
    if not _set(config, dtype(stored).torch_name):
        return raw
    return (json.dumps(config, indent=2) + "\n").encode()


def with_changes(raw: bytes, changes: Mapping[str, bool]) -> bytes:
    """Switch keys of a config; the order of the others stays, and without changes every byte.

    Args:
        raw: the content of ``config.json``.
        changes: the keys and what they become.
    """
    if not changes:
        return raw
    return (json.dumps({**json.loads(raw), **changes}, indent=2) + "\n").encode()


def _set(config: dict[str, Any], name: str) -> bool:
    """Set the dtype of a config and of the configs in it; whether anything changed."""
    changed = False
    for key, value in config.items():
        if key in _KEYS and _is_float(value) and value != name:
            config[key] = name
            changed = True
        elif isinstance(value, dict) and key not in _NOT_ITS_OWN:
            changed |= _set(value, name)
    return changed


def _is_float(value: Any) -> bool:
    """Whether a config's value names a floating dtype; older configs write ``torch.float16``, some write null."""
    if value is None:
        return True
    if not isinstance(value, str):
        return False
    try:
        return dtype(value.removeprefix("torch.")).is_float
    except HeaderError:
        return False
