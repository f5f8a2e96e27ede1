"""Every tensor of every source is accounted for, once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergetool.errors import MergetoolError, PlanError
from plan.models import llama, planned, save

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
WITHOUT_EXTRA = "- {where: {name: extra.*}, drop: true}"
RULES = [
    "- {where: {part: norm}, keep: a}",
    "- {where: {part: embedding}, keep: a}",
    "- {where: {layers: 0}, merge_method: linear, parameters: {weight: 1}}",
    "- {where: {part: mlp}, parameters: {density: 0.1}}",
    "- {where: {layers: -1, part: attention}, drop: true}",
]
DELTAS = "merge_method: ties\nbase_model: base\nparameters: {weight: 1, density: 0.5}\n"
MEAN = "merge_method: linear\nparameters: {weight: 1}\n"
MEAN_WITH_BASE = f"{MEAN}base_model: base\n"
COUNTER = ("I64", np.arange(3))
MASK = ("BOOL", np.array([[1, 0], [1, 1]], np.uint8))


def models(listed):
    return "models: [" + ", ".join(f"{{model: {name}}}" for name in listed) + "]\n"


def attempt(folder, text):
    """The plan, or why there is none."""
    try:
        return planned(folder, text)
    except MergetoolError as error:
        return error


def account(plan):
    """The fate of each (source, tensor); fails where one is named twice."""
    counts = Counter((route.source, route.tensor) for route in plan.routes)
    assert set(counts.values()) <= {1}
    return {(route.source, route.tensor): route.fate for route in plan.routes}


def everything(plan):
    return {(i, name) for i, source in enumerate(plan.sources) for name in source.checkpoint.tensors}


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    head=st.sampled_from([DELTAS, MEAN, MEAN_WITH_BASE]),
    listed=st.sampled_from([("a",), ("a", "b"), ("base", "a", "b")]),
    rules=st.lists(st.sampled_from(RULES), unique=True, max_size=4),
    buffers=st.sets(st.tuples(st.sampled_from(["base", "a", "b"]), st.sampled_from(["counter", "mask"]))),
    extra=st.booleans(),
    tied=st.sets(st.sampled_from(["base", "a", "b"])),
    duplicate=st.booleans(),
)
def test_every_tensor_of_every_source_goes_somewhere_exactly_once(
    tmp_path_factory, head, listed, rules, buffers, extra, tied, duplicate
):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama(seed)
        if name in tied and not duplicate:
            del tensors[HEAD]
        for owner, buffer in sorted(buffers):
            if owner == name:
                tensors[buffer] = COUNTER if buffer == "counter" else MASK
        if extra and name == "b":
            tensors["extra.weight"] = ("BF16", np.zeros(4, np.uint16))
        save(folder / name, tensors, tie_word_embeddings=name in tied)
    if extra and "b" in listed:
        rules = [*rules, WITHOUT_EXTRA]
    text = head + models(listed) + ("rules:\n" + "\n".join(rules) if rules else "")
    plan = attempt(folder, text)
    if isinstance(plan, MergetoolError):  # refusing is allowed, but only with a reason and a place
        assert plan.problems
        assert all(problem.what and problem.where for problem in plan.problems)
        return
    fates = account(plan)
    assert fates.keys() == everything(plan)
    names = [job.name for job in plan.jobs]
    assert len(set(names)) == len(names)
    for job in plan.jobs:
        for read in (*job.reads, *job.compare):
            fate = fates[read.source, read.tensor.name]
            assert fate in ("merged", "copied", "compared", "dropped", "replaced")
    left = {name for (_, name), fate in fates.items() if fate in ("merged", "copied")}
    assert left <= set(names) | {HEAD, EMBEDDING}


def test_a_plain_merge_merges_everything(trio_plan):
    assert set(account(trio_plan).values()) == {"merged"}


def test_a_rule_that_keeps_replaces_the_others(tmp_path, trio_folder):
    plan = planned(trio_folder, DELTAS + models("ab") + "rules: [{where: {part: norm}, keep: b}]")
    fates = account(plan)
    by_label = {source.label: i for i, source in enumerate(plan.sources)}
    assert fates[by_label["b"], "model.norm.weight"] == "copied"
    assert fates[by_label["a"], "model.norm.weight"] == "replaced"
    assert fates[by_label["base"], "model.norm.weight"] == "replaced"
    assert plan.job("model.norm.weight").method == "passthrough"
    assert plan.job("model.norm.weight").reason == "rule 1"


def test_a_dropped_tensor_is_written_by_nobody(trio_folder):
    plan = planned(trio_folder, DELTAS + models("ab") + "rules: [{where: {layers: 1}, drop: true}]")
    dropped = {tensor for (_, tensor), fate in account(plan).items() if fate == "dropped"}
    assert dropped == {name for name in plan.sources[0].checkpoint.tensors if ".layers.1." in name}
    assert not dropped & {job.name for job in plan.jobs}
    assert not dropped & {name for shard in plan.shards for name in shard.header.entries}


def test_a_base_that_the_method_ignores_lends_its_files(trio_folder):
    plan = planned(trio_folder, MEAN_WITH_BASE + models("ab"))
    assert plan.sources[plan.lender].label == "base"
    lent = {tensor for (source, tensor), fate in account(plan).items() if fate == "lends its files"}
    assert lent == set(plan.sources[plan.lender].checkpoint.tensors)
    assert all(read.source != plan.lender for job in plan.jobs for read in job.reads)


def test_integers_are_the_lenders_and_compared_with_the_others(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama(seed) | ({} if name == "b" else {"counter": COUNTER}))
    plan = planned(tmp_path, DELTAS + models("ab"))
    job = plan.job("counter")
    assert (job.method, job.dtype.name, len(job.reads), len(job.compare)) == ("", "I64", 1, 1)
    assert account(plan)[0, "counter"] == "copied"
    assert account(plan)[1, "counter"] == "compared"


def test_integers_that_only_another_source_has_are_that_sources(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama(seed) | ({"counter": COUNTER} if name == "b" else {}))
    plan = planned(tmp_path, DELTAS + models("ab"))
    assert plan.sources[plan.job("counter").reads[0].source].label == "b"


@pytest.mark.parametrize("stored", [HEAD, EMBEDDING])
def test_models_that_tie_their_head_meet_whichever_name_they_store(tmp_path, stored):
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama(seed)
        # A source may have stored the one shared weight under its other name.
        del tensors[{HEAD: EMBEDDING, EMBEDDING: HEAD}[stored] if name == "a" else HEAD]
        save(tmp_path / name, tensors, tie_word_embeddings=True)
    plan = planned(tmp_path, DELTAS + models("ab"))
    assert [job.name for job in plan.jobs].count(EMBEDDING) == 1
    assert HEAD not in {job.name for job in plan.jobs}
    assert [read.tensor.name for read in plan.job(EMBEDDING).reads] == [EMBEDDING, stored, EMBEDDING]
    assert account(plan).keys() == everything(plan)


def test_an_untied_base_takes_the_embedding_of_a_source_that_ties_it_for_both(tmp_path):
    save(tmp_path / "base", llama(0))
    for seed, name in enumerate("ab", 1):
        tensors = llama(seed)
        del tensors[HEAD]
        save(tmp_path / name, tensors, tie_word_embeddings=True)
    plan = planned(tmp_path, DELTAS + models("ab"))
    assert [read.tensor.name for read in plan.job(HEAD).reads] == [HEAD, EMBEDDING, EMBEDDING]
    assert account(plan).keys() == everything(plan)


def test_an_untied_head_does_not_vanish_into_a_tied_base(tmp_path):
    tensors = llama(0)
    del tensors[HEAD]
    save(tmp_path / "base", tensors, tie_word_embeddings=True)
    save(tmp_path / "a", llama(1))
    save(tmp_path / "b", llama(2))
    with pytest.raises(PlanError) as refused:
        planned(tmp_path, DELTAS + models("ab"))
    assert [problem.what for problem in refused.value.problems] == [
        f"{name} has a `{HEAD}` of its own, which base ties to its embedding" for name in "ab"
    ]
    assert all("base_model" in problem.fix for problem in refused.value.problems)
    assert all("merge.yaml:4:" in problem.where for problem in refused.value.problems)
