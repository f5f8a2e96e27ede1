"""The catalogue: one file per method, one line per method here.

>>> METHODS["ties"].title
'TIES'
>>> METHODS["ties"].parameters["density"].kind
'number from 0 to 1'
>>> METHODS["linear"]((1.0, 3.0), weight=(0.5, 0.5))
2.0
"""

from collections.abc import Mapping

from mergetool.methods.dam import dam
from mergetool.methods.dare import dare_linear, dare_ties
from mergetool.methods.declare import Method, Parameter
from mergetool.methods.fisher import fisher
from mergetool.methods.greedy_soup import greedy_soup
from mergetool.methods.linear import linear
from mergetool.methods.passthrough import passthrough
from mergetool.methods.regmean import regmean
from mergetool.methods.slerp import slerp
from mergetool.methods.task_arithmetic import task_arithmetic
from mergetool.methods.ties import ties

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        linear,
        greedy_soup,
        slerp,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        regmean,
        fisher,
        dam,
        passthrough,
    )
}

__all__ = ["METHODS", "Method", "Parameter"]
