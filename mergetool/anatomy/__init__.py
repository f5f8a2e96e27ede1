"""What a tensor means: layer, part, axes; families as data."""

from mergetool.anatomy.derive import anatomy
from mergetool.anatomy.parts import Anatomy, Part
from mergetool.anatomy.roles import ROLES, matches_role

__all__ = ["ROLES", "Anatomy", "Part", "anatomy", "matches_role"]
