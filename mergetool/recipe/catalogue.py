"""The methods and roles that recipes may name, fetched when first asked for.

Importing the catalogue imports NumPy; importing this floor should not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergetool.methods import Method


def methods() -> Mapping[str, Method]:
    """Every method by its name in recipes."""
    from mergetool.methods import METHODS

    return METHODS


def roles() -> tuple[str, ...]:
    """Every role a part may have, and every group of roles."""
    from mergetool.anatomy import ROLES

    return tuple(dict.fromkeys(name for role in ROLES for name in (role.split(".")[0], role)))
