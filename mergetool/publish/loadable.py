"""Whether transformers finds a place for every tensor of a model folder; asked without loading any."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergetool.storage.header import Header


class CannotTell(Exception):
    """Why it cannot be known here whether a model folder is as it should be."""


def misfits(folder: Path, headers: Mapping[str, Header]) -> list[str]:
    """What transformers would miss, leave out or refuse, were it to load the folder; empty if all is well.

    Tensors without data are given to transformers' own loader, so that ties, ignored names, prefixes and the
    experts that it stacks are treated as in earnest.

    Args:
        folder: the model folder.
        headers: the header of each of its weight files.

    Raises:
        CannotTell: there is no config, transformers knows no such model, or its code is in the folder.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise CannotTell("there is no config.json") from None
    except (OSError, ValueError) as error:
        return [f"config.json cannot be read: {error}"]
    if not isinstance(config, dict):
        return ["config.json holds no JSON object"]
    if "auto_map" in config:
        raise CannotTell("the model brings code of its own, which is not run")
    architecture = (config.get("architectures") or [None])[0]
    with quiet():
        model = _empty_model(folder, architecture)
        if isinstance(model, str):
            return [f"{architecture} cannot be made from the config: {model}"]
        info = _load(model, headers)
    return [
        *(f"`{name}` is missing" for name in sorted(info.missing_keys)),
        *(f"`{name}` has no place in the model" for name in sorted(info.unexpected_keys)),
        *(f"`{name}` is {list(is_)}, the config says {list(said)}" for name, is_, said in sorted(info.mismatched_keys)),
        *(f"`{name}` cannot be put together from what is there" for name in sorted(info.conversion_errors)),
    ]


def _empty_model(folder: Path, architecture: str | None) -> Any:
    """The model that the config describes, without data; the reason if the config makes none."""
    import torch
    import transformers

    kind = getattr(transformers, str(architecture), None)
    if architecture is None or kind is None:
        raise CannotTell(f"transformers {transformers.__version__} knows no architecture {architecture}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return kind(config)
    except ImportError as error:
        raise CannotTell(f"the model needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # whatever the model's own code makes of a config that is wrong
        return first_line(error)


def _load(model: Any, headers: Mapping[str, Header]) -> Any:
    """Load empty tensors into an empty model; what transformers says about it."""
    import torch
    import transformers

    try:
        from transformers.modeling_utils import LoadStateDictConfig, get_model_conversion_mapping
    except ImportError:
        raise CannotTell(f"transformers {transformers.__version__} cannot load a model without data") from None
    entries = [entry for header in headers.values() for entry in header.entries.values()]
    tensors = {
        entry.name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype.torch_name, torch.uint8), device="meta")
        for entry in entries
    }
    try:
        mapping = get_model_conversion_mapping(model, None, None)
        how = LoadStateDictConfig(ignore_mismatched_sizes=True, device_map={"": "meta"}, weight_mapping=mapping)
        info, _ = type(model)._load_pretrained_model(model, tensors, None, how)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    except (AttributeError, TypeError) as error:  # none of this is promised to stay as it is
        what = f"transformers {transformers.__version__} cannot load it without data: {first_line(error)}"
        raise CannotTell(what) from error
    return info


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its name where there is no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging and drawing bars meanwhile."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
