"""JSON from a file that nobody vouches for: one object, no key twice, nothing that standard JSON lacks."""

from __future__ import annotations

import json
from typing import Any

from mergetool.errors import HeaderError

_FIX = "download the file again"


def parse_object(raw_json: bytes | bytearray, where: str) -> dict[str, Any]:
    """The JSON object in ``raw_json``, found in the file ``where``.

    Raises:
        HeaderError: it is not an object in strict UTF-8 JSON. Hostile input raises nothing else.
    """
    try:
        # Other readers of the format take -0 for a fraction. A hook for every integer would double the time.
        whole = _no_minus_zero if b"-0" in raw_json else None
        text = raw_json.decode()
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=whole)
    except HeaderError as error:
        raise HeaderError(error.problems[0].what, where, _FIX) from error
    except RecursionError:
        raise HeaderError("the header is nested too deeply", where, _FIX) from None
    except UnicodeDecodeError as error:
        raise HeaderError(f"the header is not UTF-8: {error.reason}", where, _FIX) from error
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise HeaderError(f"the header is not JSON: {error}", where, _FIX) from error
    if not isinstance(document, dict):
        raise HeaderError("the header is not a JSON object", where, _FIX)
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise HeaderError(f"the header holds the key {shown(twice)} twice")
    return found


def _no_minus_zero(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _no_constant(name: str) -> Any:
    raise HeaderError(f"the header holds {name}, which is not JSON")


def shown(value: Any) -> str:
    """A value from a file as a message may show it: short, and safe to print on any terminal."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a deep nest
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
