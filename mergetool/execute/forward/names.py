"""Which tensors on disk make up which parameters of a network, both ways: prefixes, renamings, stacked experts.

transformers says how it renames, stacks and splits the tensors of each model type when it loads them. Its own
conversions are run here for one parameter at a time, and backwards for gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from mergetool.anatomy.families import family_of
from mergetool.anatomy.names import read_template, template_of
from mergetool.errors import CheckpointError, Problem, ShapeMismatch
from mergetool.plan.faults import listed

Shapes = Mapping[str, tuple[int, ...]]
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Group:
    """Tensors on disk that are read together and the parameters they become.

    Attributes:
        parameters: names in the module, each without its tied names.
        tensors: the names on disk by the pattern they matched, in order; one pattern where nothing is converted.
        conversion: transformers' converter; None where the tensor is the parameter.
        inner: each tensor's name on disk as transformers spells it before converting.
    """

    parameters: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    conversion: Any = None
    inner: Mapping[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names on disk."""
        return tuple(name for names in self.tensors.values() for name in names)

    def read(self, get: Callable[[str], torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The parameters by name, from their tensors on disk."""
        if self.conversion is None:
            return {self.parameters[0]: get(self.names[0])}
        made = self._convert(self.conversion, self.tensors, lambda name: get(name), module, self.parameters[0])
        return {name: made[name] for name in self.parameters}

    def undo(self, values: Mapping[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Tensors of the parameters' shapes, such as gradients, by name on disk and in the shapes on disk."""
        if self.conversion is None:
            return {self.names[0]: values[self.parameters[0]]}
        assert self.inner is not None  # every converted group has it
        back = self.conversion.reverse_transform()
        taken: dict[str, list[str]] = {}
        for name in self.parameters:
            renamed, pattern = back.rename_source_key(name)
            taken.setdefault(pattern, []).append(name)
            first = renamed
        made = self._convert(back, {p: tuple(n) for p, n in taken.items()}, values.__getitem__, module, first)
        return {name: made[inner] for name, inner in self.inner.items()}

    @staticmethod
    def _convert(
        conversion: Any,
        tensors: Mapping[str, Sequence[str]],
        get: Callable[[str], torch.Tensor],
        module: torch.nn.Module,
        target: str,
    ) -> dict[str, torch.Tensor]:
        conversion = deepcopy(conversion)
        for pattern, names in tensors.items():
            for name in names:
                conversion.add_tensor(target, name, pattern, lambda name=name: get(name))
        made = conversion.convert(target, model=module, config=getattr(module, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def natural(name: str) -> list[Any]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(name)]


def assign(module: torch.nn.Module, shapes: Shapes, config: Mapping[str, Any], label: str) -> tuple[Group, ...]:
    """Find the tensors of every parameter and a parameter for every tensor.

    Args:
        module: the network; its parameters need no data.
        shapes: what is on disk.
        config: the model's ``config.json``.
        label: the model, for messages.

    Raises:
        CheckpointError: a parameter has no tensor, or a tensor no parameter; each is named.
        ShapeMismatch: a tensor has not the shape of its parameter.
    """
    holders = tied(module)
    places = set(module.state_dict(keep_vars=True)) | {name for name, _ in module.named_parameters()}
    rename, converters = _renaming(module, places)
    plain: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    strangers: list[str] = []
    for name in sorted(shapes, key=natural):
        place, pattern = rename(name)
        if place not in places:
            strangers.append(name)
        elif pattern is None:
            plain[place] = name
        else:
            converted.setdefault(place, {}).setdefault(pattern, []).append(name)
    groups = [_converted(module, first, found, converters) for first, found in converted.items()]
    loaded = {holders.get(name, name) for group in groups for name in group.parameters}
    # Of tied names that are all on disk the holder's counts, as when transformers loads the model.
    for place in sorted(plain, key=lambda place: place in holders):
        if (holder := holders.get(place, place)) not in loaded:
            loaded.add(holder)
            groups.append(Group((holder,), {plain[place]: (plain[place],)}))
    _account(module, groups, loaded, strangers, shapes, config, label)
    return tuple(groups)


def tied(module: torch.nn.Module) -> dict[str, str]:
    """Every other name of a tied parameter → the name it is held by."""
    stated = dict(getattr(module, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        holder = first.setdefault(id(parameter), name)
        if holder != name:
            found[name] = holder
    for name, holder in stated.items():
        found.pop(holder, None)
        found[name] = holder
    return {name: found.get(holder, holder) for name, holder in found.items() if name != holder}


def _renaming(module: torch.nn.Module, places: set[str]) -> tuple[Callable[[str], tuple[str, str | None]], list[Any]]:
    """How a name on disk becomes a name in the module, and the pattern of the converter that takes it."""
    prefix = getattr(module, "base_model_prefix", "")
    known = dict.fromkeys(places, True)
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5 modules are made as they are on disk
        return lambda name: (_prefixed(name, prefix, places), None), []
    if not isinstance(module, PreTrainedModel):  # an adapter's, whose names are those on disk
        return lambda name: (name, None), []
    mapping = get_model_conversion_mapping(module, None, None)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]

    def rename(name: str) -> tuple[str, str | None]:
        place, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if place not in known and name in known:
            place, pattern = rename_source_key(name, [], [], prefix, known)
        return place, pattern

    def inner(name: str) -> str:
        return str(rename_source_key(name, renamings, [], None, None)[0])

    return rename, [(converter, inner, prefix) for converter in converters]


def _prefixed(name: str, prefix: str, places: set[str]) -> str:
    """The name with or without the base model's prefix, whichever the module knows."""
    for each in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if each in places:
            return each
    return name


def _converted(module: torch.nn.Module, first: str, found: Mapping[str, list[str]], converters: list[Any]) -> Group:
    pattern = next(iter(found))
    converter, inner, prefix = next(each for each in converters if pattern in each[0].source_patterns)
    tensors = {p: tuple(found[p]) for p in converter.source_patterns if p in found}
    targets = converter.target_patterns
    parameters = tuple(first.replace(targets[0], target) for target in targets)
    spelt = {}
    for names in tensors.values():
        for name in names:
            # What transformers makes of a name on disk has or lacks the prefix as the module does.
            spelling = inner(name)
            if first.startswith(f"{prefix}.") and not spelling.startswith(f"{prefix}."):
                spelling = f"{prefix}.{spelling}"
            elif not first.startswith(f"{prefix}.") and prefix:
                spelling = spelling.removeprefix(f"{prefix}.")
            spelt[name] = spelling
    return Group(parameters, tensors, converter, spelt)


def _account(
    module: torch.nn.Module,
    groups: Sequence[Group],
    loaded: set[str],
    strangers: Sequence[str],
    shapes: Shapes,
    config: Mapping[str, Any],
    label: str,
) -> None:
    parameters: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    holders = tied(module)
    wanted: set[str] = {holders.get(name, name) for name in parameters}
    absent = sorted(wanted - loaded, key=natural)
    homeless = [name for name in strangers if not _may_be_left(module, name, config)]
    problems = []
    if absent:
        problems.append(Problem(f"lacks weights that its config asks for: {listed(absent)}", label))
    if homeless:
        what = f"holds tensors that have no place in {type(module).__name__}: {listed(homeless)}"
        problems.append(Problem(what, label, "check `architectures` in config.json, or write an adapter"))
    if problems:
        raise CheckpointError(problems)
    wrong = []
    for group in groups:
        name = group.parameters[0]
        if group.conversion is None and name in parameters and shapes[group.names[0]] != tuple(parameters[name].shape):
            is_, said = list(shapes[group.names[0]]), list(parameters[name].shape)
            wrong.append(Problem(f"has the shape {is_}, the config says {said}", f"{label}: {group.names[0]}"))
    if wrong:
        raise ShapeMismatch(wrong)


def _may_be_left(module: torch.nn.Module, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is nothing that the network computes with: a buffer, or what transformers ignores too."""
    patterns: Iterable[str] = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in patterns):
        return True
    return read_template(template_of(name), family_of(config)[0]).role == "buffer"
