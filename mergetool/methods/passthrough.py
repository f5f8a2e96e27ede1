"""Passthrough: one source as it is, or scaled."""

from __future__ import annotations

from typing import Annotated, Any

from mergetool.methods.declare import Doc, PerSource, method


@method(
    title="Passthrough",
    paper="",
    citation="",
    base="ignored",
    fewest=1,
    most=1,
)
def passthrough(
    value: Any,
    *,
    scale: Annotated[PerSource[float], Doc("The factor of the tensor.")] = 1.0,  # type: ignore[assignment]
) -> Any:
    """Take the one source as it is, or scaled.

    For converting a dtype, copying through, or scaling chosen tensors by a filter.

        merged = scale · value
    """
    return scale[0] * value[0]
