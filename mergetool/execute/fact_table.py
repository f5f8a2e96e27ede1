"""What a folder of facts holds, as a table or as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.execute.fact_folder import Facts
from mergetool.plan.columns import columns, plural

_EXACT = 512
"""Up to so many channels eigenvalues are computed; those of larger matrices are estimated."""
_ROUNDS = 30


def table(facts: Facts) -> str:
    """The kind, what it was measured from, and a line for every fact; how many rows it is made from is told with it."""
    data = as_json(facts)
    made_of = [(key, json.dumps(value, ensure_ascii=False)) for key, value in data["made_of"].items()]
    head = [("kind", data["kind"]), ("of", data["label"]), *made_of, ("tensors", f"{len(data['tensors']):,}")]
    rows = list(_rows(data["tensors"]))
    # What is the same in every line is told once: room for names is scarce.
    for i, key in ((4, "count"), (1, "fact")):
        if len({row[i] for row in rows}) == 1:
            head += [(key, rows[0][i])] if rows[0][i] else []
            rows = [(*row[:i], *row[i + 1 :]) for row in rows]
        elif key == "count":
            rows = [(*row[:3], ", ".join(filter(None, (row[3], row[4] and f"count {row[4]}")))) for row in rows]
    lines = [str(facts.path), *columns(head), "", *columns(rows)]
    if facts.aliases:
        shared = sorted(facts.aliases.items())
        lines += ["", f"{plural(len(shared), 'tensor')} with the facts of another:", *columns(shared)]
    return "\n".join([*lines, *(f"note: {note}" for note in facts.notes)])


def as_json(facts: Facts) -> dict[str, Any]:
    """The same as plain data; keys are only ever added."""
    tensors = []
    for key, (_, entry) in sorted(facts.entries.items()):
        name, _, field = key.rpartition(":")
        numbers = _numbers(field, facts.get(name, field))
        tensors.append({"name": key, "dtype": entry.dtype.name, "shape": list(entry.shape), "numbers": numbers})
    return {
        "path": str(facts.path),
        "kind": facts.kind,
        "label": facts.label,
        "made_of": dict(facts.made_of),
        "tensors": tensors,
        "aliases": dict(facts.aliases),
        "notes": list(facts.notes),
    }


def _rows(tensors: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Name, fact, shape, a few numbers, and of how many rows; a count alone has a line of its own."""
    split = [(*tensor["name"].rpartition(":")[::2], tensor) for tensor in tensors]
    counts = {name: tensor for name, field, tensor in split if field == "count"}
    told = {name for name, field, _ in split if field != "count"}
    for name, field, tensor in split:
        if field == "count" and name in told:
            continue
        count = _words("count", counts[name]).removeprefix("value ") if name in counts and field != "count" else ""
        yield name, field, "×".join(map(str, tensor["shape"])) or "scalar", _words(field, tensor), count


def _words(field: str, tensor: Mapping[str, Any]) -> str:
    known = {key: f"{value:.3g}" for key, value in tensor["numbers"].items() if value is not None}
    if field == "scores" and len(known) == 3:
        before, found, moved = tensor["numbers"].values()
        return f"{before:.3f} → {found:.3f} of a perfect match, {moved:.1%} moved"
    if known.keys() >= {"least", "mean", "largest"}:
        return f"{known['least']} to {known['largest']}, mean {known['mean']}"
    return ", ".join(f"{key} {value}" for key, value in known.items())


def _numbers(field: str, values: NDArray[Any]) -> dict[str, float | None]:
    """A few numbers that tell whether a fact is what it should be; None for what is not finite."""
    if values.size == 0:
        return {}
    look = _LOOKS.get(field, _range)
    return {key: float(value) if np.isfinite(value) else None for key, value in look(values).items()}


def _range(values: NDArray[Any]) -> dict[str, float]:
    if values.ndim == 0:
        return {"value": float(values)}
    return {"least": values.min(), "mean": values.mean(dtype=np.float64), "largest": values.max()}


def _gram(values: NDArray[Any]) -> dict[str, float]:
    """Trace and condition; of the experts' matrices in one tensor the sum and the worst."""
    matrices = values.reshape(-1, *values.shape[-2:])
    traces = [float(np.trace(matrix, dtype=np.float64)) for matrix in matrices]
    used = [matrix for matrix, trace in zip(matrices, traces, strict=True) if trace > 0]
    return {"trace": sum(traces), "condition": max(map(condition, used), default=np.inf)}


def _permutation(values: NDArray[Any]) -> dict[str, float]:
    return {"moved": float(np.count_nonzero(values != np.arange(len(values))))}


def _scores(values: NDArray[Any]) -> dict[str, float]:
    """What the units of a group score in their own places and as they were found, and the share that moved."""
    return dict(zip(("before", "found", "share"), values.tolist(), strict=True))


_LOOKS: Mapping[str, Callable[[NDArray[Any]], dict[str, float]]] = {
    "gram": _gram,
    "permutation": _permutation,
    "scores": _scores,
}


def condition(gram: NDArray[Any]) -> float:
    """The largest eigenvalue over the smallest of a positive semidefinite matrix; infinite where that is none.

    Of a large matrix both are found by power iteration, and the quotient is too small rather than too large.
    """
    if len(gram) <= _EXACT:
        values = np.linalg.eigvalsh(gram.astype(np.float64))
        smallest, largest = float(values[0]), float(values[-1])
    else:
        largest = _largest(lambda x: gram @ x, len(gram))
        smallest = largest - _largest(lambda x: largest * x - gram @ x, len(gram))
    # Below this share of the largest, float32 cannot tell an eigenvalue from zero.
    return largest / smallest if smallest > largest * len(gram) * 1e-8 else np.inf


def _largest(product: Callable[[NDArray[Any]], NDArray[Any]], size: int) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, from below."""
    x: NDArray[Any] = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    value = 0.0
    for _ in range(_ROUNDS):
        x /= np.linalg.norm(x)
        y = product(x)
        value = float(x @ y)
        if not y.any():
            break
        x = y
    return value
