"""A method on bare tensors: ``merge_tensors``, without files, recipes or plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mergetool.errors import CheckpointError, Problem, RecipeError, ShapeMismatch
from mergetool.kernels.backend import Array, Layout, compiled, with_torch
from mergetool.kernels.rounding import READABLE, WRITABLE
from mergetool.methods.apply import bind, combiner, measure, portion
from mergetool.methods.declare import Cut, Method

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
_NUMPY = {"float64": "F64", "float32": "F32", "float16": "F16"}
_TORCH = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
_BITS = {2: np.uint16, 1: np.uint8}


def merge_tensors(
    method: str | Method,
    tensors: Sequence[torch.Tensor | Array],
    base: torch.Tensor | Array | None = None,
    *,
    seed: int = 0,
    name: str = "tensor",
    sources: Sequence[str] | None = None,
    parameters: dict[str, Any] | None = None,
    **more: Any,
) -> torch.Tensor | Array:
    """Merge tensors of one shape with a method of the catalogue.

    >>> import numpy as np
    >>> merge_tensors("linear", [np.zeros(2), np.ones(2)], weight=[1.0, 3.0])
    array([0.75, 0.75])

    Args:
        method: a method or its name.
        tensors: the sources: NumPy arrays (float16, float32, float64) or torch tensors (also bfloat16, float8), any
            shape, all the same; they are not changed.
        base: the base, where the method takes deltas.
        seed: for methods that draw random numbers.
        name: the tensor's name, part of the random key.
        sources: the sources' names, part of the random key; ``0``, ``1``, … by default.
        parameters: the method's parameters by recipe name (``lambda`` is a Python keyword, so it goes here or is
            written ``lambda_``); one value, or one for each source.
        **more: further parameters.

    Returns:
        The merged tensor, in the kind, shape, dtype and device of the base, else of the first source. Arithmetic is
        float64, rounded once.

    Raises:
        RecipeError: a parameter is unknown, missing or wrong, the number of sources is, or the method needs more
            than tensors.
        ShapeMismatch: the tensors' shapes differ.
    """
    chosen = _method(method)
    if chosen.facts:
        what = f"`{chosen.name}` needs what is measured on data or trained, and tensors alone do not tell"
        raise RecipeError(what, fix="merge the models by a recipe with `calibration`")
    tensors = _tensors(tensors, base)
    given = [*([base] if base is not None and chosen.base == "required" else []), *tensors]
    problems = _count_problems(chosen, tensors, base)
    if sources is not None and len(sources) != len(tensors):
        problems.append(Problem(f"`sources` has {len(sources)} names for {len(tensors)} tensors"))
    values = _parameters(chosen, {**(parameters or {}), **more}, len(tensors), problems)
    if problems:
        raise RecipeError(problems)
    shapes = [tuple(t.shape) for t in given]
    if len(set(shapes)) > 1:
        raise ShapeMismatch(f"the tensors' shapes differ: {shapes}", where=name)
    raw, dtypes = zip(*(_raw(tensor) for tensor in given), strict=True)
    like = given[0]
    if dtypes[0] not in WRITABLE:
        raise CheckpointError(
            f"the result would be {dtypes[0]}, which is only read", where=name, fix="convert the first tensor"
        )
    layout = Layout(chosen.base == "required", dtypes, dtypes[0])
    bound = bind(chosen, values, seed, sources or [str(i) for i in range(len(tensors))], name)
    backend = _backend(like)
    size = raw[0].size

    def visit(do: Callable[[int, tuple[Array, ...]], R], share: float = 1.0) -> list[tuple[int, R]]:
        return [(0, do(0, tuple(x[: portion(size, share)] for x in raw)))]

    measured = measure(bound, layout, size, visit, backend)
    out = np.empty_like(raw[0])
    combiner(bound, layout, measured, backend)(0, raw, out)
    return _like(out, like)


def _method(method: str | Method) -> Method:
    from mergetool.methods import METHODS

    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise RecipeError(f"there is no method `{method}`", fix=f"choose one of {', '.join(METHODS)}")
    return METHODS[method]


def _tensors(tensors: Any, base: Any) -> list[Any]:
    """The sources as a list, each of them something that can be merged."""
    if hasattr(tensors, "dtype"):
        raise RecipeError("`tensors` is a single tensor", fix="give a list with a tensor for each source")
    found: list[Any] = list(tensors)
    wanted = {f"source {i}": tensor for i, tensor in enumerate(found)} | ({} if base is None else {"base": base})
    problems = [
        Problem(f"is a {type(tensor).__name__}, not a tensor", where, "give a NumPy array or a torch tensor")
        for where, tensor in wanted.items()
        if not (hasattr(tensor, "dtype") and hasattr(tensor, "shape"))
    ]
    if problems:
        raise RecipeError(problems)
    return found


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's: numbers, and lists of them."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _count_problems(method: Method, tensors: Sequence[Any], base: Any) -> list[Problem]:
    problems = []
    if method.base == "required" and base is None:
        problems.append(Problem(f"`{method.name}` takes deltas from a base; give `base`"))
    if len(tensors) < method.fewest or (method.most is not None and len(tensors) > method.most):
        most = method.most if method.most is not None else "any number of"
        problems.append(Problem(f"`{method.name}` takes {method.fewest} to {most} sources, not {len(tensors)}"))
    return problems


def _parameters(method: Method, given: dict[str, Any], count: int, problems: list[Problem]) -> dict[str, Any]:
    given = {name.rstrip("_"): value for name, value in given.items()}
    values: dict[str, Any] = {}
    for name in given.keys() - method.parameters.keys():
        allowed = ", ".join(method.parameters) or "none"
        problems.append(Problem(f"`{method.name}` has no parameter `{name}`", fix=f"its parameters: {allowed}"))
    for name, parameter in method.parameters.items():
        value = _plain(given.get(name, parameter.default))
        if name not in given and parameter.required:
            problems.append(Problem(f"`{method.name}` needs the parameter `{name}`"))
            continue
        try:
            if not parameter.per_source:
                values[name] = parameter.check(value)
            elif isinstance(value, list | tuple):
                values[name] = tuple(parameter.check(_plain(v)) for v in value)
                if len(value) != count:
                    problems.append(Problem(f"`{name}` has {len(value)} values for {count} sources"))
            else:
                values[name] = (parameter.check(value),) * count
        except ValueError as error:
            problems.append(Problem(f"`{name}` {error}"))
    for name in {m.scope for m in method.measures.values() if isinstance(m, Cut)}:
        if values.get(name) == "model":
            what = f"`{name}: model` is about all tensors of a model, and here is one"
            problems.append(Problem(what, fix="merge the models by a recipe, or leave it out"))
    if not problems:
        named = {method.parameters[name].argument: value for name, value in values.items()}
        problems += [Problem(message) for _, message in method.check(named)]
    return values


def _raw(tensor: Any) -> tuple[Array, str]:
    """Return a tensor's flat raw storage and its dtype's name."""
    dtype = (_TORCH if hasattr(tensor, "detach") else _NUMPY).get(str(tensor.dtype))
    if dtype not in READABLE:
        raise CheckpointError(f"tensors of dtype {tensor.dtype} cannot be merged", fix="use a floating dtype")
    if hasattr(tensor, "detach"):
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        signed = {1: torch.uint8, 2: torch.int16}.get(flat.element_size())
        array: Array = (flat.view(signed) if signed else flat).numpy()
    else:
        array = np.ascontiguousarray(tensor).reshape(-1)
    bits = _BITS.get(array.itemsize)
    return (array.view(bits) if bits else array), dtype


def _backend(like: Any) -> Any:
    device = getattr(like, "device", None)
    if getattr(device, "type", "cpu") == "cpu":
        return compiled()
    return with_torch(str(device))


def _like(out: Array, like: Any) -> Any:
    if not hasattr(like, "detach"):
        return out.view(like.dtype).reshape(like.shape)
    import torch

    signed = out.view({2: np.int16, 4: np.float32, 8: np.float64}[out.itemsize])
    return torch.from_numpy(signed).view(like.dtype).reshape(like.shape).to(like.device)
