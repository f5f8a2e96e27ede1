"""The catalogue: one file per method, one line per method here."""

from collections.abc import Mapping

from mergetool.methods.dare import dare_linear, dare_ties
from mergetool.methods.declare import Method, Parameter
from mergetool.methods.linear import linear
from mergetool.methods.passthrough import passthrough
from mergetool.methods.slerp import slerp
from mergetool.methods.task_arithmetic import task_arithmetic
from mergetool.methods.ties import ties

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        linear,
        slerp,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        passthrough,
    )
}

__all__ = ["METHODS", "Method", "Parameter"]
