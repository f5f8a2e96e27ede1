"""The model card: YAML for the Hub, then what was merged, how, and how to do it again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from mergetool.checkpoint.checkpoint import Checkpoint
from mergetool.methods import METHODS, Method
from mergetool.plan import Plan, Source
from mergetool.plan.correction import CORRECTIONS, HEADS
from mergetool.plan.stages import TRAINED, wanted
from mergetool.publish.origins import hub_ids, licence
from mergetool.publish.page import NUMBERS, PAGE
from mergetool.publish.privacy import Privacy, folder_name
from mergetool.publish.provenance import PROVENANCE, RECIPE
from mergetool.version import __version__

_NAMED_IN_TITLE = 4
COPIES = ("", "passthrough")
"""The methods of a job whose result is one source's tensor."""


def card(
    plan: Plan,
    files: frozenset[str],
    notes: Sequence[str],
    privacy: Privacy,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The content of ``README.md``.

    Args:
        plan: what was run.
        files: the other files of the model folder.
        notes: what a user of the model should know.
        privacy: takes the user's paths out.
        pictures: those of the run's report among the files, each with its title.
    """
    front = yaml.safe_dump(_front_matter(plan, files), sort_keys=False, allow_unicode=True)
    recipe = privacy.hide(plan.recipe.text)
    sections = [
        f"# {_title(plan)}",
        f"Made with mergetool {__version__}: {_summary(plan)}.",
        "## Method",
        *(_method(METHODS[name]) for name in _methods(plan)),
        *_corrected(plan, files),
        "## Sources",
        _sources(plan),
        "## Recipe",
        _fenced(recipe),
        "## Numbers",
        _numbers(plan),
        *(("## Notes", _listed(notes)) if notes else ()),
        *(_report(pictures) if pictures else ()),
        "## Reproduce",
        _reproduce(shortened=recipe != plan.recipe.text),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(plan: Plan, files: frozenset[str]) -> dict[str, Any]:
    matter: dict[str, Any] = {}
    if ids := hub_ids(_taken(plan)):
        matter["base_model"] = ids
        matter["base_model_relation"] = "merge"
    if "modules.json" in files:
        matter["library_name"] = "sentence-transformers"
    elif "model_type" in plan.sources[plan.lender].checkpoint.config:
        matter["library_name"] = "transformers"
    matter["tags"] = ["merge", "mergetool", *_methods(plan)]
    return matter | dict(licence(plan.sources))


def _methods(plan: Plan) -> list[str]:
    """The recipe's method and those of its rules."""
    used = (job.method for job in plan.jobs if job.method not in COPIES)
    return list(dict.fromkeys((plan.recipe.merge_method, *used)))


def _title(plan: Plan) -> str:
    title = METHODS[plan.recipe.merge_method].title
    names = [_name(source.checkpoint) for source in _taken(plan)]
    if plan.left_out:
        title = f"{title} of {len(names)} of {len(plan.sources)} models"
    if len(names) > _NAMED_IN_TITLE:
        return title if plan.left_out else f"{title} merge of {len(names)} models"
    return f"{title}: {' + '.join(names)}"


def _taken(plan: Plan) -> tuple[Source, ...]:
    """The sources but for those that were tried and not taken."""
    return tuple(source for i, source in enumerate(plan.sources) if i not in plan.left_out)


def _summary(plan: Plan) -> str:
    count = len(_taken(plan))
    of = f" of {len(plan.sources)}" if plan.left_out else ""
    models = f"a merge of {count}{of} models" if count > 1 else f"made from one{of} model{'s' if of else ''}"
    trained = any(TRAINED in wanted(job).values() for job in plan.jobs)
    how = "its coefficients trained, no weight" if trained else "nothing trained"
    return f"{models} by {METHODS[plan.recipe.merge_method].title}, {how}"


def _method(method: Method) -> str:
    lines = [f"**{method.title}** (`{method.name}`): {method.summary}"]
    if method.citation:
        lines.append(f"{method.citation}." + (f" [{method.paper}]({_link(method.paper)})" if method.paper else ""))
    return "\n\n".join(lines)


_CORRECTIONS = {
    "repair": "**REPAIR** (`repair`): The mean and the spread of activations, which averaging shrinks, are what the "
    "models have on average. Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair, ICLR "
    "2023. [arXiv:2211.08403](https://arxiv.org/abs/2211.08403)",
    "tact": "**TACT** (`tact`): The mean and the spread of activations on a task's data are what the task's own model "
    "has. Sharma, Roy, Dziugaite, Non-Local Model Merging, 2024. "
    "[arXiv:2410.12766](https://arxiv.org/abs/2410.12766)",
}


def _corrected(plan: Plan, files: frozenset[str]) -> Iterator[str]:
    """What was put right, and where it is."""
    correct = plan.recipe.correct
    if plan.correction is None or correct is None:
        return
    yield _CORRECTIONS[correct.method]
    apart = sorted(name for name in files if name.startswith((f"{CORRECTIONS}/", f"{HEADS}/")))
    if plan.task:
        yield f"This is the model of the task `{plan.task}`."
    elif apart:
        listed = ", ".join(f"`{name}`" for name in apart)
        yield (
            f"The weights are those of the merge. For each task a file corrects them: {listed}. Apply it once, to the "
            f'loaded model: `mergetool.apply_correction(model, "{apart[0]}")`.'
        )


def _link(paper: str) -> str:
    return f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" if paper.startswith("arXiv:") else paper


def _name(checkpoint: Checkpoint) -> str:
    """What to call a source: its name on the Hub, or its folder's; never where the folder is."""
    return folder_name(checkpoint) if checkpoint.repo is None else checkpoint.repo


def _sources(plan: Plan) -> str:
    fates: dict[int, set[str]] = {}
    for route in plan.routes:
        fates.setdefault(route.source, set()).add(route.fate)
    rows = ["| model | is | revision |", "|---|---|---|"]
    for i, source in enumerate(plan.sources):
        checkpoint = source.checkpoint
        name, revision = f"`{_cell(_name(checkpoint))}`", "local folder"
        if checkpoint.repo is not None:
            name = f"[{checkpoint.repo}](https://huggingface.co/{checkpoint.repo})"
            revision = f"`{checkpoint.commit}`" if checkpoint.commit else ""
        rows.append(f"| {name} | {_part(plan, i, source, fates.get(i, set()))} | {revision} |")
    return "\n".join(rows)


def _part(plan: Plan, place: int, source: Source, fates: set[str]) -> str:
    """What a source is to the merge."""
    words = []
    if source.label == plan.recipe.base_model:
        words.append("base")
    if source.label in (model.reference for model in plan.recipe.models):
        words.append("tried and left out" if place in plan.left_out else "merged")
    if place == plan.tokenizer and plan.tokenizer != plan.lender:
        words.append("lends its tokenizer")
    if fates == {"lends its files"}:
        words.append("lends its files only")
    return ", ".join(words) or "a part of it is copied"


def _numbers(plan: Plan) -> str:
    kinds = Counter("added" if job.added else "copied" if job.method in COPIES else "merged" for job in plan.jobs)
    added = f", {kinds['added']} added" if kinds["added"] else ""
    dropped = len({route.tensor for route in plan.routes if route.fate == "dropped"})
    dtypes = Counter(job.dtype.torch_name for job in plan.jobs)
    stored = ", ".join(f"{name} ({count})" for name, count in sorted(dtypes.items(), key=lambda kv: (-kv[1], kv[0])))
    parameters = sum(job.size for job in plan.jobs)
    size = sum(job.bytes_written for job in plan.jobs)
    return _listed(
        [
            f"{len(plan.jobs)} tensors: {kinds['merged']} merged, {kinds['copied']} copied{added}; {dropped} dropped",
            f"{parameters:,} parameters, {size:,} bytes in {len(plan.shards)} file{'s' * (len(plan.shards) > 1)}",
            f"stored as {stored}",
        ]
    )


def _report(pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Report"
    yield f"`{PAGE}` says how to read these pictures; `{NUMBERS}` has their numbers."
    for file, title in pictures.items():
        yield f"![{title}]({file})"


def _reproduce(shortened: bool) -> str:
    paths = "; absolute ones are shortened here to their last part" if shortened else ""
    return (
        f"```sh\npip install mergetool=={__version__}\nmergetool run {RECIPE}\n```\n\n"
        f"Relative paths in `{RECIPE}` start from the folder that the recipe was in{paths}. `{PROVENANCE}` has the "
        "commit or the header digest of every source, the parameters of every tensor and the digest of its bytes."
    )


def _fenced(text: str) -> str:
    """A block of YAML, in a fence longer than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _listed(items: Iterable[str]) -> str:
    return "\n".join(_items(items))


def _items(items: Iterable[str]) -> Iterator[str]:
    for item in items:
        yield "- " + " ".join(item.split())


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("`", "'")
