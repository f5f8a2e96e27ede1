"""The nearest valid name for a misspelled one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import islice

MOST_NAMES = 200
"""Only so many names are compared."""
LONGEST = 80
"""Longer words are nobody's misspelling."""
NEAR = 0.6
"""The least likeness, from 0 to 1, of a suggestion."""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like the word, if any is like it at all; of equals the first."""
    if not word or len(word) > LONGEST:
        return None
    folded = word.lower().replace("-", "_")
    best, likeness = None, NEAR
    for name in names:
        matcher = SequenceMatcher(None, folded, name.lower())
        if matcher.quick_ratio() < likeness:
            continue
        ratio = matcher.ratio()
        if ratio > likeness or (best is None and ratio == likeness):
            best, likeness = name, ratio
    return best


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """What to do about an unknown word: the nearest name, or all the names there are."""
    names = list(islice(names, MOST_NAMES))
    near = nearest(word, names)
    if near is not None:
        return f"did you mean `{near}`?"
    return f"allowed here: {', '.join(f'`{name}`' for name in names)}" if names else ""
