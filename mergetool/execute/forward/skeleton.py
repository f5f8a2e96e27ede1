"""A network as its config describes it, its buffers in place and its parameters without data."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mergetool.errors import CheckpointError
from mergetool.publish.loadable import first_line, quiet

Network = Callable[[dict[str, Any]], torch.nn.Module]
"""Of an adapter: makes a module of a config, its parameters named as on disk."""

_FIX = "write an adapter (`calibration.adapter`) that makes the network, or choose a method that measures nothing"
_patching = threading.RLock()


def skeletons(config: Mapping[str, Any], label: str, adapter: Network | None = None) -> Iterator[torch.nn.Module]:
    """The networks that a config may mean, the likeliest first; parameters are on the meta device.

    A config that names its architecture means that one. Without, it may be the causal language model or the bare
    model of its type. Code that a model brings along is never run.

    Args:
        config: the model's ``config.json``.
        label: the model, for messages.
        adapter: makes the network instead of transformers.

    Raises:
        CheckpointError: transformers does not know the architecture or cannot make it.
    """
    if adapter is not None:
        yield _made(lambda: adapter(dict(config)), "the adapter's `network` fails", label)
        return
    with quiet():
        parsed = _parsed(config, label)
        for kind in _kinds(config, parsed, label):
            yield _made(partial(kind, parsed), f"{kind.__name__} cannot be made from its config", label)


def _made(make: Callable[[], Any], failure: str, label: str) -> torch.nn.Module:
    try:
        with parameters_on_meta():
            module = make()
    except Exception as error:  # whatever the model's own code makes of a config that is wrong
        raise CheckpointError(f"{failure}: {first_line(error)}", label) from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(f"{failure}: it makes a {type(module).__name__}, no torch.nn.Module", label)
    return module.eval()


def _parsed(config: Mapping[str, Any], label: str) -> Any:
    """The config as transformers' own, set up to be run block by block."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        said = f"model type `{model_type}`" if model_type else "no `model_type`"
        brought = "; code that it brings along is not run" if "auto_map" in config else ""
        raise CheckpointError(f"has {said} in its config, which transformers does not know{brought}", label, _FIX)
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:  # of the config's own checks
        raise CheckpointError(f"its config cannot be used: {first_line(error)}", label) from error
    for each in {id(c): c for c in (parsed, parsed.get_text_config())}.values():
        each.use_cache = False
    if hasattr(parsed, "_experts_implementation"):
        parsed._experts_implementation = "eager"  # expert by expert, so that each one's input can be watched
    return parsed


def _kinds(config: Mapping[str, Any], parsed: Any, label: str) -> list[Any]:
    import transformers

    stated = [str(name) for name in config.get("architectures") or ()]
    if stated:
        kind = getattr(transformers, stated[0], None)
        if kind is None:
            what = f"transformers {transformers.__version__} knows no architecture {stated[0]}"
            raise CheckpointError(what, label, _FIX)
        return [kind]
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModel)
    found = (auto._model_mapping.get(type(parsed), None) for auto in autos)
    kinds = [each for known in found for each in (known if isinstance(known, tuple) else (known,))[:1] if each]
    if not kinds:
        raise CheckpointError("its config names no architecture", label, "add `architectures` to config.json")
    return kinds


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are made meanwhile have parameters without data, and buffers with theirs.

    Buffers that are no weights, such as rotary frequencies, are only ever computed by the modules' constructors; on
    the meta device they would be lost. The memory of a parameter is given back before anything is written to it.
    """
    with _patching:
        register = torch.nn.Module.register_parameter

        def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

        torch.nn.Module.register_parameter = registered
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register
