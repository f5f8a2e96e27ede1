"""The stages of a plan: their order and cost, their data in the digest, and what cannot be run."""

from __future__ import annotations

import copy

import pytest

from mergetool.errors import RecipeError
from mergetool.methods import METHODS
from mergetool.plan import check, show, stages
from plan.models import planned, trio

PLAIN = """\
merge_method: linear
models: [{model: a, data: one}, {model: b}]
parameters: {weight: 0.5}
"""
DATA = """\
calibration:
  data:
    one: {path: one.txt, samples: 10, max_length: 50}
    two: {path: two.txt, samples: 1, max_length: 7}
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"some text of {name}")
    return trio(tmp_path)


@pytest.fixture
def asking(monkeypatch):
    def ask(method, **facts):
        made = copy.copy(METHODS[method])
        object.__setattr__(made, "facts", facts)
        monkeypatch.setitem(METHODS, method, made)

    for method in METHODS:
        ask(method)
    return ask


def problems(folder, text):
    with pytest.raises(RecipeError) as caught:
        planned(folder, text)
    return [(p.what, p.where.rpartition("/")[2], p.fix) for p in caught.value.problems]


def test_every_stage_is_listed_in_order_with_its_cost(folder, asking):
    asking("ties", gram="gram", importance="squared_gradients", coefficient="coefficients")
    more = "  scope: model\nalign: {method: activation_matching, data: two}\ntrain: {steps: 3, batch_tokens: 64}\n"
    text = "merge_method: ties\nbase_model: base\n" + PLAIN.split("\n", 1)[1].replace("parameters: {weight: 0.5}\n", "")
    plan = planned(folder, text + "parameters:\n  weight: 0.5\n  density: 0.5\n" + more + DATA)
    assert [stage.name for stage in plan.stages] == [
        "align",
        "measure",
        "measure",
        "train",
        "compare",
        "measure",
        "merge",
    ]
    align, gram, gradients, train, compare, cut, merge = plan.stages
    whole = sum(tensor.nbytes for tensor in plan.sources[0].checkpoint.tensors.values())
    weights = sum(tensor.size for tensor in plan.sources[0].checkpoint.tensors.values())
    assert (align.tokens, align.bytes_read) == (3 * 7, 3 * whole)
    assert (gram.tokens, gram.bytes_read) == (500 + 507, 2 * whole)
    assert gradients.memory == 3 * 4 * weights
    shapes = [tensor.shape for tensor in plan.sources[0].checkpoint.tensors.values()]
    coefficients = sum(map(sum, shapes))  # one for each row and each column, and each entry of a norm
    assert train.memory == 4 * weights + 7 * (4 * 24 * 8) // 2 + stages.SMALL + 2 * 20 * coefficients
    assert (train.passes, train.tokens, train.bytes_read) == (3, 3 * 64, 3 * 2 * 3 * whole)
    pairs, layer = 3, 4 * 2 * 24 * 8 + 4 * 8  # what lies outside of the layers is more than a layer
    assert (compare.passes, compare.tokens) == (pairs, 2 * pairs * (8 * 50 + 7))
    assert (compare.bytes_read, compare.memory) == (2 * pairs * whole, 2 * layer)
    assert cut.jobs_alone
    assert (cut.memory, merge.memory, merge.tokens) == (0, 0, 0)
    job = plan.jobs[0]
    assert plan.passes(job) == cut.passes + 1


def test_the_table_and_the_data_tell_the_costs(folder, asking):
    asking("linear", gram="gram")
    plan = planned(folder, PLAIN + DATA)
    text = show.table(plan)
    assert "measures models on data" in text
    assert "up to 1,007 tokens" in text
    assert "of weights read, about" in text
    stage = show.as_json(plan)["stages"][0]
    assert (stage["name"], stage["tokens"]) == ("measure", 1007)
    assert stage["memory"] == plan.stages[0].memory > 0


def names(plan):
    return [stage.name for stage in plan.stages]


def test_models_are_compared_where_that_is_asked_for_or_cheap(folder, asking, monkeypatch):
    assert names(planned(folder, PLAIN + DATA)) == ["merge"]  # nothing else looks at the models
    asked = planned(folder, PLAIN + DATA + "report: {cka: true, data: two}\n")
    assert names(asked) == ["compare", "merge"]
    assert asked.stages[0].tokens == 2 * 7
    asking("linear", gram="gram")
    assert names(planned(folder, PLAIN + DATA)) == ["measure", "compare", "merge"]
    for none in ("report: none\n", "report: {cka: false}\n"):
        assert names(planned(folder, PLAIN + DATA + none)) == ["measure", "merge"]
    monkeypatch.setattr(stages, "CHEAP", 1)
    assert names(planned(folder, PLAIN + DATA)) == ["measure", "merge"]
    assert names(planned(folder, PLAIN + DATA + "report: {cka: true}\n")) == ["measure", "compare", "merge"]


def test_a_report_is_part_of_what_the_digest_tells(folder):
    bare, none = (planned(folder, PLAIN + DATA + more).digest for more in ("", "report: none\n"))
    assert bare != none


def test_recipes_without_such_stages_have_those_they_had(folder):
    plan = planned(folder)
    assert [(stage.name, stage.memory) for stage in plan.stages] == [("merge", 0)]


def test_the_content_of_the_data_is_in_the_digest(folder):
    bare, first = planned(folder, PLAIN.replace(", data: one", "")).digest, planned(folder, PLAIN + DATA).digest
    assert planned(folder, PLAIN + DATA).digest == first != bare
    (folder / "two.txt").write_text("another text")
    second = planned(folder, PLAIN + DATA).digest
    assert second != first
    (folder / "two.txt").rename(folder / "three.txt")
    assert planned(folder, (PLAIN + DATA).replace("two.txt", "three.txt")).digest not in (first, bare)


def test_files_that_are_not_there_are_told_with_all_else(folder):
    (folder / "one.txt").unlink()
    text = PLAIN + DATA.replace("two.txt", "tow.txt")
    found = problems(folder, text)
    assert found == [
        ("there is no file one.txt", "merge.yaml:6:10", "did you mean `two.txt`?"),
        ("there is no file tow.txt", "merge.yaml:7:10", "did you mean `two.txt`?"),
    ]


def test_a_method_that_needs_data_must_have_some(folder, asking):
    asking("linear", gram="gram")
    what = "`linear` runs the models on data, and the recipe has no `calibration`"
    fix = "add `calibration: {data: {NAME: FILE}}`"
    assert problems(folder, PLAIN.replace(", data: one", "")) == [(what, "merge.yaml:1:15", fix)]
    rule = "rules: [{where: {part: norm}, merge_method: linear}]\n"
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5, weight: 1}\n"
    found = problems(folder, text + rule)
    assert found == [(what, "merge.yaml:5:45", fix)]


def test_train_where_nothing_is_trained_is_refused(folder, asking):
    text = PLAIN + DATA + "train: {steps: 3}\n"
    what = "`train` says how coefficients are trained, and `linear` trains none"
    assert problems(folder, text) == [(what, "merge.yaml:8:8", "remove it")]
    asking("ties", coefficient="coefficients")
    assert problems(folder, text) == [(what, "merge.yaml:8:8", "remove it, or use `merge_method: ties`")]
    asking("linear", coefficient="coefficients")
    assert planned(folder, text).stages[0].name == "train"


def test_what_the_text_has_wrong_is_not_told_twice(folder, asking):
    asking("linear", gram="gram")
    path = folder / "merge.yaml"
    path.write_text(PLAIN.replace(", data: one", "") + "calibration: {data: 3}\n")
    with pytest.raises(RecipeError) as caught:
        check(path)
    assert len(caught.value.problems) == 1
