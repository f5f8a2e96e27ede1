"""Which units of one model stand for which of another: permutations found from weights or from activations."""

from mergetool.facts.matching_activations import Alike, activation_matching, scored, watched
from mergetool.facts.matching_descent import DEFAULT_MARGIN, DEFAULT_SWEEPS, Get, Match, Matching, Score
from mergetool.facts.matching_weights import AddProducts, weight_matching

__all__ = [
    "DEFAULT_MARGIN",
    "DEFAULT_SWEEPS",
    "AddProducts",
    "Alike",
    "Get",
    "Match",
    "Matching",
    "Score",
    "activation_matching",
    "scored",
    "watched",
    "weight_matching",
]
