"""What a tensor means: layer, part, axes; families as data; symmetries derived."""

from mergetool.anatomy.derive import anatomy
from mergetool.anatomy.parts import Anatomy, Part
from mergetool.anatomy.roles import ROLES, matches_role
from mergetool.anatomy.symmetry import Group, Member, Permutations, Row, Turn, Turning, axis_indices, turned_array
from mergetool.anatomy.symmetry_derive import DEFAULT_KINDS, symmetries

__all__ = [
    "DEFAULT_KINDS",
    "ROLES",
    "Anatomy",
    "Group",
    "Member",
    "Part",
    "Permutations",
    "Row",
    "Turn",
    "Turning",
    "anatomy",
    "axis_indices",
    "matches_role",
    "symmetries",
    "turned_array",
]
