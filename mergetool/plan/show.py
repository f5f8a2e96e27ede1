"""A plan for people: the whole as a table, or one job in full."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mergetool.errors import PlanError
from mergetool.plan.columns import columns, count, paragraph, plural, size
from mergetool.plan.export import ADD, COPY, as_json, does
from mergetool.plan.tasks import several, tasks
from mergetool.plan.work import Job, Plan, Read, Stage

__all__ = ["as_json", "job", "table"]


def table(plan: Plan) -> str:
    """The whole plan on a page: sources, what happens to which parts, stages, shards, memory, output."""
    sections = (
        ("Sources", _sources(plan)),
        ("What happens", _work(plan)),
        ("Exceptions", _exceptions(plan)),
        ("Where the tensors of the sources go", _fates(plan)),
        ("Stages", _stages(plan)),
        ("Output", _output(plan)),
        ("Memory", _memory(plan)),
        ("Notes", [paragraph(note) for note in plan.notes]),
    )
    return "\n\n".join("\n".join((title, *lines)) for title, lines in sections if lines)


def _sources(plan: Plan) -> list[str]:
    rows = [("model", "family", "revision", "tensors", "weights", "dtype", "size", "")]
    for number, source in enumerate(plan.sources):
        tensors = source.checkpoint.tensors.values()
        dtypes = Counter(tensor.dtype.name for tensor in tensors)
        rows.append(
            (
                source.label,
                source.anatomy.family,
                (source.checkpoint.commit or "local")[:8],
                f"{len(tensors):,}",
                count(sum(tensor.size for tensor in tensors)),
                " ".join(name for name, _ in dtypes.most_common(3)),
                size(sum(tensor.nbytes for tensor in tensors)),
                ", ".join(_duties(plan, number)),
            )
        )
    return columns(rows, right=(3, 4, 6))


def _duties(plan: Plan, number: int) -> Iterable[str]:
    if plan.sources[number].label == plan.recipe.base_model:
        yield "base"
    if number == plan.lender:
        yield "config"
    if number == plan.tokenizer:
        yield "tokenizer"


def _work(plan: Plan) -> list[str]:
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in plan.jobs:
        groups.setdefault((does(job), job.part.role.split(".")[0]), []).append(job)
    rows = [("method", "part", "tensors", "weights", "read", "written")]
    rows += [(method, part, *_sizes(plan, jobs)) for (method, part), jobs in groups.items()]
    if len(groups) > 1:
        rows.append(("in all", "", *_sizes(plan, plan.jobs)))
    return columns(rows, right=(2, 3, 4, 5))


def _sizes(plan: Plan, jobs: Sequence[Job]) -> tuple[str, str, str, str]:
    again = any(plan.passes(job) > 1 for job in jobs)
    read = size(sum(job.bytes_read * plan.passes(job) for job in jobs))
    written = size(sum(job.bytes_written for job in jobs))
    return f"{len(jobs):,}", count(sum(job.size for job in jobs)), _up_to(read, again), written


def _up_to(said: str, again: bool) -> str:
    """What is said of bytes read, where some are read again: how often is not known to the last pass."""
    return f"up to {said}" if again else said


def _exceptions(plan: Plan) -> list[str]:
    """The jobs and routes that are not the recipe's own method, by their reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for job in plan.jobs:
        if job.reason:
            groups.setdefault((does(job), job.reason), []).append(job.name)
    for route in plan.routes:
        if route.fate == "dropped":
            groups.setdefault((route.fate, route.by), []).append(route.tensor)
    rows = [
        (what, plural(len(names), "tensor"), _reason(plan, reason), f"such as {names[0]}")
        for (what, reason), names in groups.items()
    ]
    return columns(rows, right=(1,))


def _reason(plan: Plan, reason: str) -> str:
    """The reason, with the place of the rule that it names."""
    for rule in plan.recipe.rules:
        if reason == rule.title:
            return f"{reason} ({plan.recipe.where(*rule.path)})"
    return reason


def _fates(plan: Plan) -> list[str]:
    found = Counter((route.source, route.fate) for route in plan.routes)
    fates = list(dict.fromkeys(route.fate for route in plan.routes))
    rows = [("model", *fates)]
    for number, source in enumerate(plan.sources):
        rows.append((source.label, *(f"{found[number, fate]:,}" if found[number, fate] else "–" for fate in fates)))
    return columns(rows, right=range(1, len(fates) + 1)) if fates else []


def _stages(plan: Plan) -> list[str]:
    rows = []
    for number, stage in enumerate(plan.stages, 1):
        once, often = _COUNTED.get(stage.name, ("one pass", "passes"))
        passes = f"up to {stage.passes} {often}" if stage.passes > 1 else once
        passes = f"{stage.passes} models" if stage.name == "evaluate" else passes
        does = "measures models on data" if stage.name == "measure" and stage.memory else _DOES[stage.name]
        rows.append((f"{number}", stage.name, plural(len(stage.jobs), "tensor"), passes, does))
    lines: list[str] = []
    for line, stage in zip(columns(rows, right=(2,)), plan.stages, strict=True):
        lines += [line, *([f"     {_cost(stage)}"] if stage.memory else [])]
    return lines


_COUNTED = {"train": ("one step", "steps"), "correct": ("one run", "runs of each layer")}
_DOES = {
    "align": "puts the units of the models in one order",
    "measure": "reads what the merge has to know about the whole model",
    "train": "trains coefficients on data",
    "evaluate": "tries averages on data",
    "compare": "compares every two models on the same data, for the report",
    "correct": "runs the merged model and finds what its activations need",
    "merge": "makes the output",
}


def _cost(stage: Stage) -> str:
    """What a stage takes that runs or reads whole models; the memory budget does not bound it."""
    tokens = (f"up to {plural(stage.tokens, 'token')}",) if stage.tokens else ()
    held = f"about {size(stage.memory)} of memory{' besides activations' if stage.tokens else ''}"
    return ", ".join((*tokens, f"{size(stage.bytes_read)} of weights read", held))


def _output(plan: Plan) -> list[str]:
    name = str(plan.output) if plan.output else "none named yet"
    largest = max((shard.nbytes for shard in plan.shards), default=0)
    files = plural(len(plan.shards), "file") + (f", the largest {size(largest)}" if len(plan.shards) > 1 else "")
    models = tasks(plan)
    each = " each" if several(plan) else ""
    rows = [
        ("folder", name),
        ("models", ", ".join(model.task for model in models)),
        ("weights", files + each),
        ("read", _up_to(size(plan.bytes_read), not plan.read_once) + each),
        ("written", size(plan.bytes_written) + each),
    ]
    return columns([row for row in rows if row[1]])


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    return columns(
        [
            ("peak", f"{size(memory.peak)} of a budget of {size(memory.budget)}"),
            ("workers", str(memory.workers)),
            ("tile", f"{memory.tile:,} weights at once for each worker"),
            ("kept", f"{size(memory.resident)} of a tensor's sources by each worker; the rest is read once per pass"),
        ]
    )


def job(plan: Plan, name: str) -> str:
    """One job in full: what it reads, the method and every parameter, and where the result goes.

    Raises:
        PlanError: the output has no tensor of that name; it suggests the nearest.
    """
    found = next((job for job in plan.jobs if job.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [job.name for job in plan.jobs], 1, 0.5)
        fix = f"did you mean `{near[0]}`?" if near else "`mergetool plan RECIPE --json` lists all tensors"
        raise PlanError(f"the output has no tensor `{name}`", fix=fix)
    lines = [found.name, *columns(_facts(plan, found))]
    if found.parameters:
        lines += ["  parameters", *columns(_parameters(plan, found), indent=4)]
    for title, reads in (("reads", found.reads), ("compares with", found.compare)):
        if reads:
            lines += [f"  {title}", *columns([_read(plan, read) for read in reads], right=(3, 4), indent=4)]
    return "\n".join(lines)


_METHODLESS = {COPY: f"{COPY}: the bytes as they are", ADD: f"{ADD}: zeros, and what a correction makes of them"}


def _facts(plan: Plan, found: Job) -> list[tuple[str, str]]:
    part = found.part
    place = f"{part.role}, depth {part.depth:.3g}"
    if part.layer is not None:
        place += f", layer {part.layer} of 0 to {part.layers - 1} in {part.stack or 'the model'}"
    if part.expert is not None:
        place += f", expert {part.expert}"
    shape = " × ".join(str(axis) for axis in found.shape) or "a scalar"
    rows = [
        ("shape", f"{shape}, {plural(found.size, 'weight')}"),
        ("stored as", f"{found.dtype}, {size(found.bytes_written)}"),
        ("part", place),
        ("method", _METHODLESS.get(does(found), found.method)),
        ("corrected", "" if found.corrected is None else f"scaled and shifted along axis {found.corrected}"),
        ("facts", ", ".join(found.facts)),
        ("read", "once" if plan.passes(found) == 1 else f"up to {plan.passes(found)} times"),
        ("reason", _reason(plan, found.reason)),
        ("goes to", _place(plan, found.name)),
    ]
    return [row for row in rows if row[1]]


def _place(plan: Plan, name: str) -> str:
    for shard in plan.shards:
        if name in shard.header.entries:
            return f"{shard.file}, offset {shard.header.entries[name].start:,}"
    return ""


def _parameters(plan: Plan, found: Job) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, value in found.parameters.items():
        if not isinstance(value, tuple):
            rows.append((name, "", _word(value)))
            continue
        # The base stands before the others and has no value of its own.
        for read, own in zip(found.reads[len(found.reads) - len(value) :], value, strict=True):
            rows.append((name, plan.sources[read.source].label, _word(own)))
    return rows


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(plan: Plan, read: Read) -> tuple[str, str, str, str, str]:
    label, tensor = plan.sources[read.source].label, read.tensor
    return label, tensor.file, tensor.dtype.name, f"at {tensor.start:,}", size(tensor.nbytes)
