"""A model that can be run: a network whose weights come by name, are loaded where they are needed and let go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mergetool.anatomy import Anatomy, anatomy
from mergetool.errors import CheckpointError, MergetoolError
from mergetool.execute.forward.heap import give_back_large
from mergetool.execute.forward.names import Group, assign, tied
from mergetool.execute.forward.skeleton import Network, skeletons
from mergetool.execute.forward.weights import Weights, refuse_nonfinite


@dataclass(frozen=True)
class Block:
    """One layer of a stack.

    Attributes:
        name: the prefix of its tensors on disk: ``model.layers.3``.
        path: where it is in the network.
        module: it.
    """

    name: str
    path: str
    module: torch.nn.Module

    @property
    def stack(self) -> str:
        """Where in the network its list of layers is."""
        return self.path.rpartition(".")[0]


class Model:
    """A network and where its weights come from; without data until they are loaded.

    Args:
        module: the network, its parameters on the meta device.
        weights: where they come from.
        groups: which tensors make up which parameters.
        parts: what each tensor is.
        label: the model, for messages.
        device: where it runs; of several with commas between, block by block on the first.

    Attributes:
        device: where it runs.
        devices: all that it may run on as a whole.
        layout: where blocks lie that are dealt out to several devices, by their paths.
        blocks: the layers of all stacks, in the order of the network; empty where none are known.
        head: the module that predicts tokens, if there is one.
        head_groups: what only the head needs: nothing where it is tied.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        weights: Weights,
        groups: tuple[Group, ...],
        parts: Anatomy,
        label: str,
        device: str = "cpu",
    ) -> None:
        self.module, self.weights, self.groups = module, weights, groups
        self.anatomy, self.label = parts, label
        self.devices = tuple(torch.device(name) for name in device.split(","))
        self.device, self.layout = self.devices[0], dict[str, torch.device]()
        self.holders = tied(module)
        self._owners = _owners(module, self.holders)
        self._empty = {name: getattr(*owners[0]) for name, owners in self._owners.items()}
        self._loaded: set[str] = set()
        self._by_parameter = {name: group for group in groups for name in group.parameters}
        self.blocks = _blocks(self)
        self._block_of: dict[str, Block | None] = {}
        self.head, self.head_groups = _head(self)
        for each in module.modules():
            for name, buffer in each._buffers.items():
                each._buffers[name] = None if buffer is None else buffer.to(self.device)

    def group_of(self, parameter: str) -> Group:
        """The group that a parameter is read with, by any of its names in the network."""
        return self._by_parameter[self.holders.get(parameter, parameter)]

    def block_of(self, path: str) -> Block | None:
        """The block that a module or parameter lies in, by its path."""
        if path not in self._block_of:
            found = (block for block in self.blocks if f"{path}.".startswith(f"{block.path}."))
            self._block_of[path] = next(found, None)
        return self._block_of[path]

    def is_outside(self, path: str) -> bool:
        """Whether a module or parameter lies in no block."""
        return self.block_of(path) is None

    def groups_in(self, block: Block | None) -> tuple[Group, ...]:
        """The groups of a block's parameters, or of those outside all blocks."""
        return tuple(group for group in self.groups if self.block_of(group.parameters[0]) is block)

    def load(self, groups: Iterable[Group], gradients: bool = False) -> None:
        """Give parameters their data; those that have it keep it.

        Args:
            groups: what to read.
            gradients: whether gradients are wanted.

        Raises:
            NonFinite: a weight holds a NaN or an infinity.
            CheckpointError: a weight cannot be read, or does not fit.
        """
        for group in groups:
            if group.parameters[0] in self._loaded:
                continue
            for name, value in self._read(group).items():
                self._set(name, value.to(self._device_of(name)), gradients)
            self._loaded.update(group.parameters)

    def _device_of(self, name: str) -> torch.device:
        """Where a parameter or buffer belongs, by its name in the network."""
        block = self.block_of(name) if self.layout else None
        return self.device if block is None else self.layout[block.path]

    def _read(self, group: Group) -> dict[str, torch.Tensor]:
        def get(name: str) -> torch.Tensor:
            tensor = self.weights.get(name)
            refuse_nonfinite(f"{self.label}: {name}", tensor)
            return tensor

        try:
            found = group.read(get, self.module)
        except MergetoolError:
            raise
        except Exception as error:  # whatever transformers' conversions make of tensors that do not fit
            raise CheckpointError(
                f"transformers cannot put {group.parameters[0]} together: {error}", f"{self.label}: {group.names[0]}"
            ) from error
        for name, value in found.items():
            if name in self._empty and value.shape != self._empty[name].shape:
                is_, said = list(value.shape), list(self._empty[name].shape)
                raise CheckpointError(f"makes {name} {is_}, the config says {said}", f"{self.label}: {group.names[0]}")
        return found

    def free(self, groups: Iterable[Group]) -> None:
        """Let go of parameters' data."""
        for group in groups:
            for name in group.parameters:
                if name in self._empty and name in self._loaded:
                    self._set(name, self._empty[name], False)
                    self._loaded.discard(name)

    def renew(self, groups: Iterable[Group]) -> None:
        """Read parameters and buffers once more, for their weights are others than they were."""
        groups = tuple(groups)
        for group in groups:
            self._loaded.difference_update(group.parameters)
        self.load(groups)

    def _set(self, name: str, value: torch.Tensor, gradients: bool) -> None:
        if name not in self._owners:
            path, _, attribute = name.rpartition(".")
            self.module.get_submodule(path)._buffers[attribute] = value
            return
        trained = gradients and value.is_floating_point()
        parameter = torch.nn.Parameter(value, requires_grad=trained)
        for owner, attribute in self._owners[name]:
            owner._parameters[attribute] = parameter

    def has_parameter(self, name: str) -> bool:
        """Whether a name in the network is a parameter's, and no buffer's."""
        return name in self._owners

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A parameter by its name in the network."""
        owner, attribute = self._owners[self.holders.get(name, name)][0]
        return owner._parameters[attribute]

    def nbytes(self, groups: Iterable[Group]) -> int:
        """The bytes of the groups' weights in float32."""
        shapes = self.weights.shapes
        return sum(4 * torch.Size(shapes[name]).numel() for group in groups for name in group.names)


def open_model(
    config: Mapping[str, Any],
    weights: Weights,
    label: str,
    adapter: Network | None = None,
    device: str = "cpu",
) -> Model:
    """Make a model that can be run, every parameter of it matched with what is on disk; no weight is read.

    Args:
        config: the model's ``config.json``.
        weights: its tensors by their names on disk.
        label: the model, for messages.
        adapter: makes the network of a model that transformers does not know.
        device: where to run it; several with commas between, if it may be dealt out to them.

    Raises:
        CheckpointError: there is no such network, or its parameters and the tensors on disk do not match.
    """
    give_back_large()
    failure: CheckpointError | None = None
    for module in skeletons(config, label, adapter):
        try:
            groups = assign(module, weights.shapes, config, label)
        except CheckpointError as error:
            failure = failure or error
            continue
        return Model(module, weights, groups, anatomy(config, weights.shapes), label, device)
    assert failure is not None  # there is at least one skeleton, or its own error
    raise failure


def _owners(module: torch.nn.Module, holders: Mapping[str, str]) -> dict[str, list[tuple[torch.nn.Module, str]]]:
    """Who has each parameter: the modules and attributes of it and of the names tied to it."""
    found: dict[str, list[tuple[torch.nn.Module, str]]] = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        found.setdefault(holders.get(name, name), []).append((module.get_submodule(path), attribute))
    return found


def _blocks(model: Model) -> tuple[Block, ...]:
    """The children of every list of modules that the names on disk call layers, outermost lists only."""
    found: list[Block] = []
    for path, module in model.module.named_modules():
        if not isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) or model_has(found, path):
            continue
        layers = [_layer(model, f"{path}.{i}" if path else str(i)) for i in range(len(module))]
        if layers and all(layer is not None and layer[1] == i for i, layer in enumerate(layers)):
            for i, layer in enumerate(layers):
                assert layer is not None  # all of them are, see above
                name = f"{layer[0]}.{i}" if layer[0] else str(i)
                found.append(Block(name, f"{path}.{i}" if path else str(i), module[i]))
    return tuple(found)


def model_has(blocks: Iterable[Block], path: str) -> bool:
    """Whether a module lies in one of the blocks."""
    return any(path.startswith(f"{block.path}.") for block in blocks)


def _head(model: Model) -> tuple[torch.nn.Module | None, tuple[Group, ...]]:
    find = getattr(model.module, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, torch.nn.Module):
        return None, ()
    path = next(path for path, each in model.module.named_modules() if each is head)
    names = [f"{path}.{name}" for name, _ in head.named_parameters(recurse=False)]
    tied_to = set(model.holders.values())
    return head, tuple(model.group_of(name) for name in names if name not in model.holders and name not in tied_to)


def _layer(model: Model, path: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that all tensors of a module belong to, if they do."""
    parameters = [name for name in model.holders.keys() | model._owners.keys() if name.startswith(f"{path}.")]
    if any(name not in model._by_parameter and name not in model.holders for name in parameters):
        return None
    names = {name for parameter in parameters for name in model.group_of(parameter).names}
    places = {(model.anatomy.parts[name].stack, model.anatomy.parts[name].layer) for name in names}
    if len(places) != 1:
        return None
    stack, layer = places.pop()
    return None if layer is None else (stack, layer)
