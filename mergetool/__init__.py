"""Merge neural-network checkpoints: load a recipe, build a plan, run it.

     load            build                  run
text ────▶ Recipe ────────▶ Plan ─────────────────▶ model folder
                            every name, shape,      safetensors, index, config,
                            byte and shard          tokenizer, card, provenance
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergetool.version import __version__ as __version__

if TYPE_CHECKING:
    from mergetool.errors import MergetoolError
    from mergetool.execute import run
    from mergetool.execute.correct_apply import apply_correction
    from mergetool.methods import METHODS
    from mergetool.methods.bare import merge_tensors
    from mergetool.plan import Plan, Report, build
    from mergetool.recipe import Recipe, load

_HOMES = {
    "load": "mergetool.recipe",
    "Recipe": "mergetool.recipe",
    "build": "mergetool.plan",
    "Plan": "mergetool.plan",
    "run": "mergetool.execute",
    "apply_correction": "mergetool.execute.correct_apply",
    "Report": "mergetool.plan",
    "merge_tensors": "mergetool.methods.bare",
    "METHODS": "mergetool.methods",
    "MergetoolError": "mergetool.errors",
}

__all__ = [
    "METHODS",
    "MergetoolError",
    "Plan",
    "Recipe",
    "Report",
    "apply_correction",
    "build",
    "load",
    "merge_tensors",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import mergetool` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
