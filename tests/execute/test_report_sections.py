"""Sections of any size: axes that name what they can, curves that can be told apart, and data that come back whole."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace as Made

import numpy as np
import pytest

from mergetool.anatomy import anatomy
from mergetool.errors import CheckpointError, OutputRefused
from mergetool.execute.fact_making import facts_folder
from mergetool.execute.report.corrections import spread_section
from mergetool.execute.report.depth import Depth, block_places, depth_of, names_of
from mergetool.execute.report.likeness import likeness_section
from mergetool.execute.report.soup import soup_section
from mergetool.execute.report.training import coefficients_section
from mergetool.facts.dam import Coefficients
from mergetool.publish import drawing
from mergetool.publish.page import draw_report, redraw
from mergetool.publish.sections import Panel, Section, Series, as_json, from_json, rounded

DEEP = 80
NAMES = [f"a-rather-long-name-of-a-model-{letter}" for letter in "abcdefgh"]


def size(png):
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def curves(*series, places=("0", "1"), **more):
    return Section("x", "X", "", "", "", "layer", "y", (Panel("", places, series),), **more)


def alike(models, layers):
    pairs = {}
    for number, pair in enumerate(itertools.combinations(models, 2)):
        values = {f"model.layers.{i}:output.cka": 1 - number * i / 10_000 for i in range(layers)}
        get = lambda block, field, values=values: values.get(f"{block}:{field}", 512.0)  # noqa: E731
        pairs[pair] = Made(entries=dict.fromkeys(values), get=get)
    return likeness_section(pairs)


def test_few_pairs_are_curves_and_many_a_heat_map():
    few, many = alike(["base", "a", "b"], 4), alike(["base", *NAMES], DEEP)
    assert (few.kind, many.kind) == ("curves", "heat")
    assert len(many.panels[0].series) == 36
    assert "On 512 tokens" in few.found
    assert f"of {NAMES[-2]} and {NAMES[-1]} in layer 79" in many.found
    assert size(drawing.draw(few))[0] == size(drawing.draw(many))[0] == 1200
    assert size(drawing.draw(many))[1] > 2 * size(drawing.draw(few))[1]


def test_coefficients_of_many_deep_models_have_a_panel_each():
    depth = Depth(("in", *map(str, range(DEEP)), "out"), {f"w{i}": i for i in range(DEEP + 2)})
    random = np.random.default_rng(0)
    values = {name: random.normal(0.3, 0.2, (8, 5)).astype(np.float32) for name in depth.at}
    axes = dict.fromkeys(values, (1,))
    section = coefficients_section(Coefficients("delta", "column", tuple(NAMES), "b", values, axes), NAMES, "b", depth)
    assert [panel.title for panel in section.panels] == NAMES
    assert all(len(panel.series) == 1 for panel in section.panels)
    assert "one for every column" in section.found
    assert section.line == 0.125
    for bands in (panel.series[0].bands for panel in section.panels):
        assert all(low <= inner_low <= inner_high <= high for (low, high), (inner_low, inner_high) in zip(*bands))
    assert size(drawing.draw(section)) == (1200, size(drawing.draw(section))[1])


def test_what_rows_add_is_a_curve_of_its_own():
    depth = Depth(("in", "0", "out"), {"in": 0, "w": 1, "norm": 2})
    random = np.random.default_rng(0)
    values = {name: random.normal(0.5, 0.2, (2, 5)).astype(np.float32) for name in depth.at}
    values |= {f"{name}:rows": random.normal(0.0, 0.2, (2, 7)).astype(np.float32) for name in ("in", "w")}
    axes = {name: (0,) if name.endswith("rows") else (1,) for name in values}
    made = Coefficients("delta", "row+column", ("a", "b"), "base", values, axes)
    section = coefficients_section(made, ["a", "b"], "base", depth)
    assert [panel.title for panel in section.panels] == ["a", "b", "a: added by rows", "b: added by rows"]
    for number in range(2):
        (columns,), (rows,) = (section.panels[at].series for at in (number, 2 + number))
        assert columns.values == tuple(rounded(float(values[n][number].mean(dtype=np.float64))) for n in depth.at)
        added = [rounded(float(values[f"{n}:rows"][number].mean(dtype=np.float64))) for n in ("in", "w")]
        assert rows.values == (*added, None)
        assert rows.bands[0][2] == (None, None)
    assert "the sum of its column's and its row's" in section.found
    assert {row[1] for row in section.rows} == set(values)
    assert size(drawing.draw(section))[0] == 1200


@pytest.mark.parametrize(
    ("places", "most", "named"),
    [
        (["in", "0", "1", "out"], 8, ["in", "0", "1", "out"]),
        (["in", *map(str, range(80)), "out"], 13, ["in", "10", "20", "30", "40", "50", "60", "70", "out"]),
        (
            [f"encoder {i}" for i in range(30)],
            6,
            ["encoder 0", "encoder 5", "encoder 10", "encoder 15", "encoder 20", "encoder 25"],
        ),
        ([f"net.{name}" for name in "abcdefghij"], 5, ["net.a", "net.c", "net.e", "net.g", "net.i"]),
    ],
)
def test_layers_of_round_numbers_are_named(places, most, named):
    assert [places[i] for i in drawing._named(places, most)] == named


def test_the_axis_spans_all_panels_and_what_is_asked_for():
    low, high = Series("a", (0.2, -0.5)), Series("b", (0.1, 7.0), bands=(((0.0, 0.2), (6.0, 9.0)),))
    section = Section(
        "x", "X", "", "", "", "", "", (Panel("", ("0", "1"), (low,)), Panel("", ("0", "1"), (high,))), limits=(0.0, 1.0)
    )
    assert drawing._extent(section, (0.0, 1.0)) == (-0.5, 9.0)
    assert drawing._extent(curves(Series("a", (0.2, None))), (0.0, 1.0)) == (0.0, 1.0)


def test_what_is_missing_or_not_finite_can_be_drawn():
    assert rounded(float("nan")) is None
    for section in (
        curves(Series("a", (None, None)), Series("b", (None, 2.0), bands=(((None, None), (1.0, 3.0)),))),
        curves(Series("a", (None, 3.0)), scale="log", line=1.0),
        curves(Series("a", (None, 3.0)), kind="heat"),
        curves(Series("a", (None, None)), kind="heat", limits=(0.0, 1.0)),
        curves(Series("a", (1.0, 2.0), style="total"), places=(3.0, 9.0), limits=(0.0, 0.0)),
    ):
        assert size(drawing.draw(section))[0] == 1200


def test_names_that_are_long_or_odd_can_be_drawn():
    odd = ["<b>&'\"</b>", "$x^2", "_hidden", "名前", "x" * 300, "a\\b"]
    section = curves(*(Series(name, (1.0, 2.0), i) for i, name in enumerate(odd)))
    files = draw_report([section], "<i>").files
    assert b"<i>" not in files["report.html"].replace(b"<img", b"")
    alike_names = drawing._names(curves(*(Series(f"{'x' * 50}{n}{'y' * 50}", (1.0, 2.0)) for n in range(3))))
    assert len(set(alike_names.values())) == 3
    assert all(len(name) <= 50 for name in alike_names.values())


def test_sections_come_back_whole(tmp_path):
    sections = (alike(["a", "b"], 3), curves(Series("a", (1.0, None), 2, "after", (((0.0, 1.0), (None, None)),))))
    data = json.loads(json.dumps(as_json(sections)))
    assert from_json(data, "x") == sections
    for wrong in ({}, [], {"format": 1, "sections": [{"name": 3}]}, {"format": 1, "sections": 5}):
        with pytest.raises(CheckpointError, match="is no report"):
            from_json(wrong, "x")
    with pytest.raises(CheckpointError, match="format 99"):
        from_json({"format": 99}, "x")
    with pytest.raises(CheckpointError, match="has no report"):
        redraw(tmp_path, tmp_path / "new")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "provenance.json").write_text("{}")
    for output in (tmp_path, tmp_path / "merged"):
        with pytest.raises(OutputRefused, match="is a model folder"):
            redraw(tmp_path, output)


def test_places_are_in_the_order_of_the_model():
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 2}
    names = [f"{stack}.block.{i}.layer.0.SelfAttention.q.weight" for stack in ("encoder", "decoder") for i in range(2)]
    names += ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"]
    depth = depth_of(anatomy(config, dict.fromkeys(names, (4, 4))).parts)
    assert depth.places == ("in", "encoder 0", "encoder 1", "decoder 0", "decoder 1", "out")
    assert depth.at["shared.weight"] == 0
    assert depth.at["decoder.block.1.layer.0.SelfAttention.q.weight"] == 4
    assert names_of(["model.layers"]) == [""]
    assert block_places(["model.layers.0", "model.layers.1"]) == ("0", "1")
    assert block_places(["encoder.layer.0", "decoder.layer.0"]) == ("encoder 0", "decoder 0")
    assert block_places(["fc1.weight", "fc2.weight"]) == ("fc1.weight", "fc2.weight")


def test_a_plain_network_has_a_place_for_every_module():
    depth = depth_of(anatomy({}, {"fc1.weight": (4, 4), "fc1.bias": (4,), "fc2.weight": (4, 4)}).parts)
    assert depth.places == ("fc1", "fc2")
    assert depth.means([("fc1.weight", 1.0, 3.0), ("fc1.bias", 2.0, 1.0)]) == (1.25, None)
    assert depth.sums([("fc1.weight", 1.0, 3.0), ("fc1.bias", 2.0, 1.0)]) == (5.0, None)
    assert depth.only([1]).at == {"fc2.weight": 0}


def test_spread_is_shown_by_role_and_task():
    records = [
        {"output": f"{role}.{layer}", "layer": layer, "role": role, "task": task, "before": 0.5, "after": 1.0 + layer}
        for role in ("mlp.down", "attention.o")
        for layer in range(3)
        for task in ("math", "code")
    ]
    records.append({"output": "norm", "layer": None, "role": "norm", "task": "math", "before": 0.1, "after": 1.0})
    section = spread_section(records)
    assert [panel.title for panel in section.panels] == ["mlp.down", "attention.o", "norm"]
    assert [series.name for series in section.panels[0].series] == [
        "math, before", "math, after", "code, before", "code, after"
    ]  # fmt: skip
    assert section.panels[0].series[1].values == (1.0, 2.0, 3.0)
    assert (section.panels[2].places, section.panels[2].series[2].values) == (("out",), (None,))
    assert len(section.rows) == len(records)
    assert spread_section([]) is None
    assert size(drawing.draw(section))[0] == 1200


def scores(folder, scored, members):
    """Facts of a soup: each mean's scores by the numbers of its models, then which were chosen."""
    with facts_folder("soup", {"of": str(scored)}, folder) as made:
        for name, values in scored.items():
            made.add(name, {f"{name}:nll": np.array(values)}, {})
        made.add("soup", {"soup:members": np.array(members)}, {})
        return made.finish()


def test_a_soup_shows_what_was_tried_and_taken(tmp_path):
    scored = {"1": [2.0, 4.0], "2": [3.0, 2.0], "3": [9.0, 9.0], "1+2": [2.0, 2.0], "1+2+3": [5.0, 5.0]}
    section = soup_section(scores(tmp_path, scored, [1, 0]), ["a", "b", "c"], ["x", "y"])
    mean, x, y = section.panels
    assert mean.places == ("1", "2", "3", "1+2", "1+2+3")
    assert mean.series[0].values == (None, 2.5, None, 2.0, None)
    assert mean.series[1].values == (3.0, None, 9.0, None, 5.0)
    assert (x.title, y.title) == ("x", "y")
    assert y.series[0].values == (None, 2.0, None, 2.0, None)
    assert section.rows[3] == ("a, b", "yes", 2.0, 2.0, 2.0)
    assert section.found == "The soup is the mean of a, b: nll 2.0000, b alone 2.5000. 1 is a, 2 is b, 3 is c."
    alone = soup_section(scores(tmp_path, {"1": [1.0], "2": [2.0], "1+2": [3.0]}, [0]), ["a", "b"], ["x"])
    assert alone.found.startswith("The soup is a alone: no mean with another is better. a alone 1.0000.")
    assert len(alone.panels) == 1
    assert size(drawing.draw(section))[0] == 1200
