"""What DAM minimises: how far the merged model's predictions are from those of the source that knows the data.

All take logits at P positions, [P, V], pads and prompts left out, and give a loss for each position, [P].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import log_softmax

Loss = Literal["kl", "js", "mse", "entropy"]

# A probability of zero times its logarithm is zero; this is a logarithm for which float arithmetic agrees.
_LOG_ZERO = -1e30


@dataclass(frozen=True)
class Target:
    """What a teacher predicts at P positions: all its logits, or the largest k and one bucket for the rest.

    Attributes:
        logits: [P, V], or the largest as [P, k].
        indices: the tokens of the largest, int64 [P, k]; None where all are there.
        rest: [P], the logarithm of the summed exponentials of the other logits over the temperature.
    """

    logits: torch.Tensor
    indices: torch.Tensor | None = None
    rest: torch.Tensor | None = None


def condense(logits: torch.Tensor, k: int, temperature: float) -> Target:
    """Keep the k largest logits of each position, and of all others what they weigh at this temperature.

    A k of 0, or of all the vocabulary, keeps every logit.
    """
    if k <= 0 or k >= logits.shape[-1]:
        return Target(logits)
    values, indices = logits.topk(k, dim=-1)
    return Target(values, indices, _rest(logits / temperature, indices))


def _rest(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The logarithm of the summed exponentials of all logits but those at the indices."""
    return logits.scatter(-1, indices, -math.inf).logsumexp(-1)


def buckets(logits: torch.Tensor, target: Target, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of teacher and student at a temperature, over the vocabulary or over k + 1 buckets."""
    scaled, wanted = logits / temperature, target.logits / temperature
    if target.indices is not None and target.rest is not None:
        inside = scaled.gather(-1, target.indices)
        scaled = torch.cat([inside, _rest(scaled, target.indices).unsqueeze(-1)], -1)
        wanted = torch.cat([wanted, target.rest.unsqueeze(-1)], -1)
    return log_softmax(wanted, -1).clamp_min(_LOG_ZERO), log_softmax(scaled, -1).clamp_min(_LOG_ZERO)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl(logits: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """``T^2 KL(teacher || student)`` of the predictions at temperature T."""
    log_p, log_q = buckets(logits, target, temperature)
    return temperature**2 * _divergence(log_p, log_q)


def js(logits: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """``T^2`` times the Jensen-Shannon divergence of the predictions at temperature T."""
    log_p, log_q = buckets(logits, target, temperature)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return temperature**2 * (_divergence(log_p, middle) + _divergence(log_q, middle)) / 2


def mse(logits: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """The mean squared difference of the logits, over the vocabulary or the teacher's k largest; no temperature."""
    student = logits if target.indices is None else logits.gather(-1, target.indices)
    return (student - target.logits).square().mean(-1)


def entropy(logits: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    """The entropy of the student's own predictions; neither teacher nor temperature."""
    log_q = log_softmax(logits, -1).clamp_min(_LOG_ZERO)
    return -(log_q.exp() * log_q).sum(-1)


LOSSES: Mapping[str, Callable[[torch.Tensor, Target, float], torch.Tensor]] = {
    "kl": kl,
    "js": js,
    "mse": mse,
    "entropy": entropy,
}
