"""A plan shown: everything a user wants to know is there and fits a page."""

from __future__ import annotations

import json

import pytest
from cli.conftest import RECIPE, model

from mergetool.errors import PlanError
from mergetool.plan import check, show
from mergetool.plan.columns import WIDTH, columns, count, plural, shorten, size

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        model(folder / name, seed)
    (folder / "merge.yaml").write_text(RECIPE + "  - where: {name: lm_head.*}\n    drop: true\n")
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return check(folder / "merge.yaml", memory=512 << 20, workers=2, output=folder / "merged")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (16_060_000_000, "16.1 GB"),
    ],
)
def test_sizes_have_three_digits(nbytes, text):
    assert size(nbytes) == text


def test_numbers_for_people():
    assert (count(8_030_261_248), count(12)) == ("8.03 B", "12")
    assert (plural(1, "tensor"), plural(2300, "tensor")) == ("1 tensor", "2,300 tensors")
    assert shorten("model.layers.0.weight", 9) == "mode…ight"


def test_wide_tables_fit_the_page():
    rows = [("x" * 150, "1"), ("y", "22")]
    assert max(map(len, columns(rows, right=(1,)))) == WIDTH


def test_the_table_says_everything(plan):
    text = show.table(plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    for said in ("base, config, tokenizer", "attention", "rule 1", "merge.yaml:11:5", "dropped", "537 MB", "merged"):
        assert said in text


def test_every_tensor_of_every_source_is_in_the_table(plan):
    lines = show.table(plan).split("Where the tensors of the sources go\n")[1].splitlines()[1:4]
    for line, source in zip(lines, plan.sources, strict=True):
        assert sum(int(cell) for cell in line.split()[1:] if cell != "–") == len(source.checkpoint.tensors)


def test_a_job_in_full(plan):
    text = show.job(plan, NAME)
    job = plan.job(NAME)
    for said in ("8 × 8", "attention.q", "depth 1", "layer 1 of 0 to 1", "ties", "model.safetensors"):
        assert said in text
    lines = [line.split() for line in text.splitlines()]
    assert ["weight", "a", "1"] in lines
    assert ["weight", "b", "1"] in lines
    assert ["normalize", "true"] in lines
    for read in job.reads:
        assert f"at {read.tensor.start:,}" in text


def test_an_unknown_tensor_gets_the_nearest(plan):
    with pytest.raises(PlanError, match=f"did you mean `{NAME}`"):
        show.job(plan, NAME.replace("self_attn", "attn"))
    with pytest.raises(PlanError, match="--json"):
        show.job(plan, "zzz")


def test_the_data_are_complete_and_stable(plan, folder):
    data = show.as_json(plan)
    assert json.loads(json.dumps(data)) == data
    assert len(data["jobs"]) == len(plan.jobs)
    assert len(data["routes"]) == sum(len(source.checkpoint.tensors) for source in plan.sources)
    assert [shard["bytes"] for shard in data["shards"]] == [shard.nbytes for shard in plan.shards]
    assert data["totals"]["bytes_written"] == plan.bytes_written
    again = check(folder / "merge.yaml", memory=512 << 20, workers=2, output=folder / "merged")
    assert show.as_json(again) == data
