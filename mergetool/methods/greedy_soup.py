"""Greedy soup: the mean of those sources that make it better, found by trying them on held-out data."""

from __future__ import annotations

from typing import Any

from mergetool.methods.declare import method


@method(
    title="Greedy soup",
    paper="arXiv:2203.05482",
    citation="Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time, ICML 2022",
    base="ignored",
    fewest=2,
    facts={"share": "soup"},
    differs="The paper scores by accuracy; here the loss is the default, which a few thousand tokens tell apart "
    "better. Candidates are scored as they would be stored, rounded to its dtype.",
)
def greedy_soup(value: Any, share: Any) -> Any:
    """Take the mean of the sources that improve it: never worse on the data than the best of them.

    For fine-tunes of one base for one task, or checkpoints of one run, when some may be bad. Needs held-out
    `calibration` data and 2n - 1 evaluations of n models; `evaluate` says on which data and by what. What was chosen is
    kept, so that merging again costs nothing more. Specialists of different tasks spoil each other: try `dam`.

        soup = {best source}; then, from the second best on: add a source if mean(soup + it) does as well as mean(soup)
        merged = Σ share[i] · value[i] / Σ share[i],   share[i] = 1 for those in the soup, else 0
    """
    total = 0.0
    divisor = 0.0
    for i in range(len(value)):
        total += share[i] * value[i]
        divisor += share[i]
    return total / divisor
