"""Which units of one model stand for which of another: permutations found from weights or from activations."""

from mergetool.facts.matching_activations import Correlation, activation_matching, watched
from mergetool.facts.matching_descent import DEFAULT_MARGIN, DEFAULT_SWEEPS, Get, Match, Matching
from mergetool.facts.matching_weights import weight_matching

__all__ = [
    "DEFAULT_MARGIN",
    "DEFAULT_SWEEPS",
    "Correlation",
    "Get",
    "Match",
    "Matching",
    "activation_matching",
    "watched",
    "weight_matching",
]
