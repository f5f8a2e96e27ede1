"""The page of the benchmarks from numbers made up here: medians, marks, what is kept, what is missing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from . import compare, kernels, markdown, profile, report, scaling, small, workers
from .__main__ import ELSEWHERE, command, main, parser, wanted
from .work import RECIPES, ROOT, Bench, Work, rotated

MADE = {"command": "python -m tests.bench", "date": "2020-02-02", "machine": "2 cores", "versions": {"numba": "1"}}


def cost(engine, wall=None, memory=100.0, **rest):
    """A run's cost."""
    return {
        "engine_s": engine,
        "wall_s": wall or engine,
        "user_s": engine,
        "system_s": 0.5,
        "anonymous_MB": memory,
        "called_read_MB": 4500.0,
        "called_written_MB": 2200.0,
        **rest,
    }


def compared(cold=False):
    """A comparison in which linear reaches its targets and ties does not."""
    costs = {
        "linear": {
            "mergekit": [cost(26.0)],
            "mergetool": [cost(1.5, 4.0, source_read_MB=4400), cost(3.0, 5.0), cost(1.4, 3.0)],
            "floor": [cost(1.0)] * 3,
        },
        "ties": {"mergekit": [cost(200.0)], "mergetool": [cost(5.0, 8.0)], "floor": [cost(1.0)]},
        "ties scope model": {"mergetool": [cost(2.0, 4.0)], "floor": [cost(1.0)]},
    }
    settings = {"size": "1.1b", "repeats": 3}
    if cold:
        settings["cold"] = "the page cache is empty"
        for found in costs.values():
            found.update({"mergetool cold": [cost(6.5)], "floor cold": [cost(5.0)]})
    return {"made": MADE, "settings": settings, "costs": costs}


def cells(text, first):
    """The cells of each row of the tables whose first cell is this."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == first]


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.125, "0.12"), (9.994, "9.99"), (25.04, "25.0"), (130.9, "131")]
)
def test_a_number_has_three_digits(value, shown):
    assert markdown.number(value) == shown


def test_a_spread_names_the_least_and_the_most_of_several():
    assert markdown.spread([{"s": 1.0}, {"s": 4.0}, {"s": 2.0}], "s") == "2.00 (1.00–4.00)"
    assert markdown.spread([{"s": 1.0}], "s") == "1.00"
    assert markdown.spread([{"other": 1.0}], "s") == "–"
    assert markdown.spread([{"user": 1.0, "system": 0.5}], "user", "system") == "1.50"


def test_a_target_includes_its_bounds():
    assert markdown.mark(1.5, most=1.5) == "met"
    assert markdown.mark(1.51, most=1.5) == "**not met**"
    assert markdown.mark(6.4, least=6.5) == "**not met**"
    assert markdown.mark(None, least=6.5) == "–"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(AssertionError):
        markdown.table(["a", "b"], [["1"]])


def test_speed_is_of_medians_and_ties_of_mergekit_stands_in_for_the_whole_model():
    text = compare.speed(compared()["costs"])
    assert cells(text, "`linear`") == [["26.0", "4.00 (3.00–5.00)", "6.50", "6.5", "met", "4.00", "1.00"]]
    assert cells(text, "`ties`") == [["200", "8.00", "25.0", "60", "**not met**", "3.33", "1.00"]]
    assert cells(text, "`ties scope model`") == [["200", "4.00", "50.0", "45", "met", "4.44", "1.00"]]


def test_speed_without_mergekit_has_dashes():
    costs = {"linear": {"mergetool": [cost(1.0)], "floor": [cost(1.0)]}}
    assert cells(compare.speed(costs), "`linear`") == [["–", "1.00", "–", "6.5", "–", "–", "1.00"]]


def test_the_engine_is_set_against_the_floor_warm_and_cold():
    costs = compared(cold=True)["costs"]
    assert cells(compare.against_floor(costs), "`linear`")[0][2:] == ["1.50", "1.5", "met"]
    assert cells(compare.against_floor(costs), "`ties`")[0][2:] == ["5.00", "2", "**not met**"]
    assert cells(compare.against_floor(costs, cold=True), "`ties`") == [["6.50", "5.00", "1.30", "1.3", "met"]]


def test_resources_are_told_of_everybody():
    rows = cells(compare.resources(compared()["costs"]), "`linear`")
    assert [row[0] for row in rows] == ["mergekit", "mergetool", "floor"]
    assert rows[1][3:] == ["4.40", "4.50", "2.20"]
    assert rows[0][1] == "26.5"
    assert rows[0][3] == "–"


def test_the_readme_has_only_what_mergekit_ran():
    text = compare.summary(compared()["costs"])
    assert cells(text, "`linear`") == [["26.0 s", "4.00 s", "6.50×", "100 MB", "100 MB"]]
    assert cells(text, "`ties scope model`") == []


def test_every_piece_of_work_has_a_target():
    assert set(compare.TARGETS) == set(RECIPES)


def test_workers_are_compared_with_one():
    costs = {"ties": {"1": [cost(4.0, 5.0)], "2": [cost(2.0, 2.5, user_s=4.0)], "3": [cost(1.6)]}}
    costs["linear"] = costs["ties"]
    found = ["4.00", "2.00", "1.60", "2.00", "met", "2.50", "3.50", "4.00", "2.00"]
    assert cells(workers.speedups(costs), "`ties`") == [found]
    assert cells(workers.speedups(costs), "`linear`") == [[*found[:4], "–", *found[5:]]]


def test_small_tensors_are_told_each():
    costs = {"linear": {"mergetool": [cost(4.0)], "floor": [cost(2.0)]}}
    assert cells(small.each(costs, 1000), "`linear`") == [["4.00", "4.00", "2.00", "2.00", "4.00", "2.00"]]


def test_growth_is_marked_where_it_is_expected():
    counts = {"1.1b": 1_100_000_000, "one tensor": 500_000_000, "4b": 3_960_000_000}
    found = {"1.1b": [cost(4.0)], "one tensor": [cost(2.0, memory=89.0)], "4b": [cost(16.0, memory=110.0)]}
    bare = {"1.1b": [cost(2.0)], "4b": [cost(10.0)]}
    text = scaling.growth({"mergetool": {"linear": found}, "floor": {"linear": bare}}, counts)
    first, one, large = cells(text, "`linear`")
    assert first[5:] == ["–", "–", "2.00", "–", "2.00", "100", "–", "–"]
    assert one[5:] == ["0.50", "–", "–", "–", "–", "89.0", "0.89", "**not met**"]
    assert large[5:] == ["4.00", "met", "10.0", "5.00", "1.60", "110", "1.10", "met"]


def test_what_was_left_out_for_want_of_disk_is_said():
    assert not scaling.shortage(8_000_000_000, 3, 34_000_000_000)
    assert "34.0 GB of disk are needed and 33.9 GB are free" in scaling.shortage(8_000_000_000, 3, 33_900_000_000)
    results = {"settings": {"weights": {"1.1b": 11, "4b": 39}}, "skipped": {"ties, 4b": "no room"}}
    results["costs"] = {"mergetool": {}, "floor": {}}
    assert "Left out: ties, 4b; no room." in scaling.page(results)


def test_a_source_that_is_not_merged_makes_room(monkeypatch, tmp_path):
    step = scaling.Step("large", "tiny", {"w": (1_000_000_000,)})
    work = Work("linear", [tmp_path / str(variant) for variant in range(3)], tmp_path)
    (tmp_path / "0").mkdir()
    made = []
    monkeypatch.setattr(scaling, "make", lambda model, *_: made.append(model.name))
    room = {True: 7e9, False: 9e9}
    monkeypatch.setattr(
        scaling.shutil, "disk_usage", lambda _: SimpleNamespace(free=room[(tmp_path / "0").exists()])
    )  # fmt: skip
    assert scaling.prepare(step, work) == ""
    assert made == ["1", "2"]
    assert not (tmp_path / "0").exists()
    room[False] = 7.9e9
    assert "8.0 GB of disk are needed" in scaling.prepare(step, work)


def test_the_large_model_is_as_large_as_its_name():
    steps = scaling.steps("1.1b")
    assert [round(step.nbytes / 2e9, 1) for step in steps] == [1.1, 0.5, 4.0]


def test_slow_kernels_are_marked():
    took = {"bf16 × 2": {"median": 0.5}, "f32 × 8": {"median": 2.01}}
    results = {"settings": {"calls": 51, "tile": 1024}, "ns": {"ties": took, "above": {"bf16 × 2": {"median": 2.0}}}}
    text = kernels.page(results)
    assert "in bold: 1." in text
    assert cells(text, "`ties`") == [["–", "0.50", "–", "–", "–", "**2.01**"]]
    assert "**2.00**" not in text


def test_every_coordinate_method_is_among_the_kernels():
    names = [name for name, _, _ in kernels.kernels()]
    assert {name for name, method in kernels.METHODS.items() if method.reach == "coordinate"} <= set(names)
    assert {"above", "between", "sums: slerp"} <= set(names)
    assert len(names) == len(set(names))


def test_sections_that_are_not_measured_again_are_kept_in_the_page_s_order(tmp_path):
    old = {"workers": {"settings": 1}, "compare": {"settings": 2}, "machine": "not a section"}
    both = report.merged(old, {"kernels": {"settings": 3}, "compare": {"settings": 4}})
    assert list(both) == ["compare", "kernels", "workers"]
    assert both["compare"] == {"settings": 4}
    assert both["workers"] == {"settings": 1}


def test_the_page_is_made_of_what_there_is(tmp_path):
    assert report.read(tmp_path) == {}
    section = compared(cold=True)
    section["made"] = {**MADE, "note": "The machine was busy."}
    report.write(tmp_path, {"compare": section})
    assert report.read(tmp_path) == {"compare": section} == json.loads((tmp_path / report.NUMBERS).read_text())
    text = (tmp_path / report.PAGE).read_text()
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    text = text.replace("\n", " ")
    assert "`python -m tests.bench` on 2020-02-02: size 1.1b, repeats 3" in text
    assert "2 cores; numba 1. The machine was busy." in text
    assert "The same cold: the page cache is empty." in text
    assert "## Workers" not in text


def test_the_page_in_docs_is_made_of_the_numbers_in_docs():
    docs = ROOT / "docs"
    assert (docs / report.PAGE).read_text() == report.page(report.read(docs))


def test_only_the_readme_s_table_is_replaced():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.readme(text, {"compare": compared()})
    assert new.startswith(f"before\n{report.BEGIN}\n| work |")
    assert new.endswith(f"{report.END}\nafter\n")
    assert "old" not in new


def test_contestants_take_turns_at_being_first():
    assert [next(rotated("abc", repeat)) for repeat in range(4)] == ["a", "b", "c", "a"]
    assert list(rotated("abc", 2)) == ["c", "a", "b"]


def test_sections_are_asked_for_one_by_one_or_all():
    assert wanted(parser().parse_args([])) == ["compare"]
    assert wanted(parser().parse_args(["--small", "--kernels"])) == ["kernels", "small"]
    everything = [name for name in report.SECTIONS if name not in ELSEWHERE]
    assert wanted(parser().parse_args(["--all"])) == everything
    assert wanted(parser().parse_args(["--gpu"])) == ["gpu"]
    assert wanted(parser().parse_args(["--render", "--all"])) == []


def test_the_page_names_the_command_without_places_and_notes():
    words = ["--methods", "ties scope model", "--into", "somewhere", "--note=busy", "--cold"]
    assert command(words) == 'python -m tests.bench --methods "ties scope model" --cold'


@pytest.mark.parametrize(
    ("name", "base", "listed"),
    [("linear", None, ["b", "c"]), ("slerp", "a", ["a", "b"]), ("ties scope model", "a", ["b", "c"])],
)
def test_a_recipe_names_the_models_that_are_read(name, base, listed, tmp_path):
    work = Work(name, tuple(map(tmp_path.__class__, "abc")), tmp_path)
    recipe = json.loads(work.recipe)
    assert recipe.get("base_model") == base
    assert [model["model"] for model in recipe["models"]] == listed
    assert {source.parent.name for source in work.sources} == {*listed, *([base] if base else [])}


def test_the_comparison_runs_mergekit_warm_and_as_often_as_asked(monkeypatch, tmp_path):
    order = []

    def told(self, who, *options, mergekit=None, state="warm"):
        order.append((self.name, who, state))
        return cost(1.0)

    monkeypatch.setattr(Work, "cost", told)
    monkeypatch.setattr(compare, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(compare, "chill", lambda files: "cold")
    monkeypatch.setattr(Bench, "models", lambda self, size="": [SimpleNamespace()] * 3)
    found = compare.measure(Bench(tmp_path, "tiny", ("ties", "ties scope model"), 3, 2, "mergekit", True))
    assert order.pop(0) == ("linear", "mergekit", "warm"), "its libraries are not in the page cache yet"
    assert sum(who == "mergekit" for _, who, _ in order) == 2
    assert ("ties", "mergekit", "cold") not in order
    assert ("ties scope model", "mergekit", "warm") not in order
    assert [len(costs["mergetool cold"]) for costs in found["costs"].values()] == [3, 3]
    assert compare.page(found)


def test_a_profile_says_what_bounds_a_run():
    parts = {"combining": 2.0, "looking": 1.0, "reading": 0.5, "writing": 0.2, "digests": 0.1}
    runs = [{**parts, "all": whole, "wall": 2.2} for whole in (4.1, 4.2, 9.0)]
    text = profile.page({"settings": {"cores": 2}, "seconds": {"ties": runs}})
    assert cells(text, "`ties`") == [["2.00", "1.00", "0.50", "0.20", "0.10", "0.40", "4.20", "2.10", "2.20", "95 %"]]


def test_time_is_told_by_what_it_is_spent_on():
    clock = profile.Clock()
    twice = clock.makes("looking", lambda factor: clock.timed("combining", lambda x: factor * x))
    assert twice(2)(21) == 42
    assert set(clock.seconds) == {"combining", "looking"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())


def test_sections_measured_elsewhere_are_taken(tmp_path, monkeypatch):
    report.write(tmp_path / "there", {"compare": compared()})
    report.write(tmp_path / "here", {"small": {"made": MADE, "settings": {"tensors": 5, "MB": 1}, "costs": {}}})
    arguments = ["bench", "--take", str(tmp_path / "there"), "--into", str(tmp_path / "here")]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert list(report.read(tmp_path / "here")) == ["compare", "small"]
