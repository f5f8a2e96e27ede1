"""Which outputs of a model are corrected, in which order, and what its config can hold of the corrections.

The pre-activations of a transformer's linears are corrected, gate and up (or fc1), o and down: what a norm gives
is left alone, since what it reads is right already. The other scope is the final representation alone: what the
last norm gives, or where there is none what the head reads. A scale always fits into the weight. A shift needs a
bias, and many models have none: some configs can switch biases on, for others only the scale is kept, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Anatomy, Part
from mergetool.anatomy.symmetry_layouts import transposed
from mergetool.facts.biases import bias_of, no_place, switched_on
from mergetool.facts.correction import Edit, Factors, Statistic

Scope = Literal["output", "all"]
Shapes = Mapping[str, tuple[int, ...]]

ORDER = {"attention.o": 0, "attention.cross.o": 1, "mlp.gate": 2, "mlp.up": 2, "mlp.gate_up": 2, "mlp.down": 3}
"""The roles that are corrected, in the order in which a layer computes them."""


CENTRED = """
    gemma gemma2 gemma3 gemma3_text nemotron qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text
    recurrent_gemma vaultgemma t5gemma t5gemma2
"""
"""Model types whose norms multiply by one more than their weight."""
LAST_IN_LAYER = ("output.LayerNorm", "output_layer_norm", "full_layer_layer_norm", "final_layer_norm")
"""How the norm is called that ends a layer, in models without a norm after the layers."""
HEADS = frozenset(("cls", "lm_head", "head", "predictions", "vocab_layer_norm", "pooler"))
"""Components of a name that belongs to a head."""


@dataclass(frozen=True)
class Output:
    """One output that is corrected.

    Attributes:
        weight: the name on disk of the weight that makes it, or of the head that reads it.
        axis: the axis of the weight that runs over its units.
        units: how many there are.
        bias: the name of the bias that takes the shift; empty where there is no place for one.
        on_disk: whether that bias exists already.
        step: outputs of equal step do not depend on one another; a lower step comes first.
        read: whether ``weight`` is the head that reads the output, rather than what makes it.
        centred: whether the output is the weight plus one times what was normalised.
    """

    weight: str
    axis: int
    units: int
    bias: str
    on_disk: bool
    step: tuple[int, ...]
    read: bool = False
    centred: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The names of the weight and, where the shift has a place, of the bias."""
        return (self.weight, self.bias) if self.bias else (self.weight,)

    @property
    def side(self) -> Literal["input", "output"]:
        """At which side of the weight's module its moments are measured."""
        return "input" if self.read else "output"


@dataclass(frozen=True)
class Outputs:
    """What can be corrected in a model.

    Attributes:
        outputs: in the order in which they are computed.
        added: names of the biases that the corrected model has more than the one on disk, and their lengths;
            they are zero but for the shifts.
        config: what changes in its ``config.json``.
        batch_norms: prefixes of the batch norms, which get fresh running statistics
            (:func:`mergetool.facts.correction.batch_norm`) instead of a correction of what they read.
        unheld: sentences that say what is not corrected, or not wholly.
    """

    outputs: tuple[Output, ...]
    added: Mapping[str, int]
    config: Mapping[str, bool]
    batch_norms: tuple[str, ...]
    unheld: tuple[str, ...]


def outputs(
    anatomy: Anatomy,
    config: Mapping[str, Any],
    shapes: Shapes,
    scope: Scope = "all",
    statistic: Statistic = "mean_std",
) -> Outputs:
    """Find the outputs that a correction changes.

    Args:
        anatomy: what every tensor is.
        config: the merged model's ``config.json``.
        shapes: name → shape of every tensor, as on disk.
        scope: ``all`` linears, or the final representation alone (``output``).
        statistic: with ``std`` there are no shifts, and no bias is added for them.
    """
    found = _every(anatomy, config, shapes) if scope == "all" else _final(anatomy, config, shapes)
    unheld = [] if found else ["Nothing is corrected: no name on disk is known to make an output of this scope."]
    unheld += _experts(anatomy) if scope == "all" else []
    added: dict[str, int] = {}
    changes: dict[str, bool] = {}
    if statistic == "mean_std":
        without = [output.weight for output in found if not output.on_disk]
        added, changes = switched_on(without, anatomy, config, shapes)
        found = [replace(each, bias=bias_of(each.weight)) if bias_of(each.weight) in added else each for each in found]
        unheld += no_place([each.weight for each in found if not each.bias], anatomy, config)
    norms = tuple(name.removesuffix(".running_mean") for name in shapes if name.endswith(".running_mean"))
    return Outputs(tuple(sorted(found, key=lambda each: each.step)), added, changes, norms, tuple(unheld))


def private_heads(
    anatomy: Anatomy, config: Mapping[str, Any], shapes: Shapes, statistic: Statistic = "mean_std"
) -> Outputs:
    """The final representation as classifiers read it, for heads that take up the correction themselves.

    Args:
        anatomy: what every tensor is.
        config: the merged model's ``config.json``.
        shapes: name → shape of every tensor, as on disk.
        statistic: with ``std`` there are no shifts.
    """
    roles = {name: part.role for name, part in anatomy.parts.items() if name.endswith("weight")}
    own = [name for name, role in roles.items() if role == "head.classifier" and len(shapes[name]) == 2]
    found = [_output(name, 1, shapes, (0,), read=True) for name in own]
    if not found:
        return Outputs((), {}, {}, (), ("A head over the vocabulary is shared.",) if "head" in roles.values() else ())
    without = [each.weight for each in found if not each.bias and statistic == "mean_std"]
    return Outputs(tuple(found), {}, {}, (), tuple(no_place(without, anatomy, config)))


def edits(
    found: Outputs, corrections: Mapping[str, Factors], weights: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, Edit]:
    """What becomes of each tensor: tensor name → edit. An added bias is edited from zeros.

    Args:
        found: what can be corrected.
        corrections: the factors of each output, by the name of its ``weight``; those absent are left alone.
        weights: the values of the heads that read a corrected output, by their names.
    """
    result: dict[str, Edit] = {}
    for output in found.outputs:
        if output.weight not in corrections:
            continue
        scale, shift = corrections[output.weight].scale, corrections[output.weight].shift
        result[output.weight] = Edit(output.axis, scale, scale - 1.0 if output.centred else None)
        if not output.bias:
            continue
        if output.read:
            head = (weights or {})[output.weight].astype(np.float64)
            result[output.bias] = Edit(0, None, np.tensordot(head, shift, axes=([output.axis], [0])))
        else:
            result[output.bias] = Edit(0, scale, shift)
    return result


def _every(anatomy: Anatomy, config: Mapping[str, Any], shapes: Shapes) -> list[Output]:
    stacks = sorted({part.stack for part in anatomy.parts.values()}, key=lambda stack: ("decoder" in stack, stack))
    axis = 1 if transposed(config) else 0
    plain = not any(part.role in ORDER for part in anatomy.parts.values())
    result = []
    for place, (name, part) in enumerate(anatomy.parts.items()):
        shape = shapes[name]
        if not name.endswith("weight"):
            continue
        if part.role in ORDER and len(shape) == 2:
            step = (stacks.index(part.stack), _layer(part), ORDER[part.role])
            result.append(_output(name, axis, shapes, step))
        elif plain and part.role == "other" and len(shape) >= 2 and not _normed(shape, shapes):
            result.append(_output(name, 0, shapes, (stacks.index(part.stack), _layer(part), place)))
    return result


def _normed(shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether a weight is a convolution of a network with batch norms, which see to what it gives."""
    return len(shape) > 2 and any(name.endswith(".running_mean") for name in shapes)


def _final(anatomy: Anatomy, config: Mapping[str, Any], shapes: Shapes) -> list[Output]:
    """The last norm of every stack, or else the heads."""
    last: dict[str, str] = {}
    for name, part in anatomy.parts.items():
        if part.role != "norm" or not name.endswith("weight") or f"{name[:-6]}running_mean" in shapes:
            continue
        loose = part.layer is None and part.depth == 1.0 and HEADS.isdisjoint(name.split("."))
        ends = name.removesuffix(".weight").endswith(LAST_IN_LAYER) and ".attention." not in name
        in_layer = part.layer is not None and part.layer == part.layers - 1 and ends
        if loose or (in_layer and part.stack not in last):
            last[part.stack] = name
    if last:
        return [_norm(name, config, shapes, at) for at, name in enumerate(last.values())]
    roles = {name: part.role for name, part in anatomy.parts.items() if name.endswith("weight")}
    heads = [name for name, role in roles.items() if role in ("head", "head.classifier") and len(shapes[name]) == 2]
    return [_output(name, 1, shapes, (0,), read=True) for name in heads]


def _norm(name: str, config: Mapping[str, Any], shapes: Shapes, at: int) -> Output:
    """A norm; a plain LayerNorm with its bias is not centred, though the text model beside it may have such norms."""
    kinds = {str(each.get("model_type")) for each in (config, config.get("text_config")) if isinstance(each, Mapping)}
    centred = not kinds.isdisjoint(CENTRED.split()) and (bias_of(name) not in shapes or "nemotron" in kinds)
    return _output(name, 0, shapes, (at,), centred=centred)


def _layer(part: Part) -> int:
    """The layer, with what stands outside the layers before or after them."""
    if part.layer is not None:
        return part.layer
    return -1 if part.depth == 0.0 and part.layers else part.layers


def _output(
    name: str, axis: int, shapes: Shapes, step: tuple[int, ...], *, read: bool = False, centred: bool = False
) -> Output:
    bias = bias_of(name)
    on_disk = bias in shapes
    return Output(name, axis, shapes[name][axis], bias if on_disk else "", on_disk, step, read, centred)


def _experts(anatomy: Anatomy) -> list[str]:
    count = sum(part.role.startswith("expert.") for part in anatomy.parts.values())
    return [f"Routed experts ({count} tensors) are not corrected: each sees its own tokens only."] if count else []
