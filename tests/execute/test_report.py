"""What a run's report shows is what its facts hold; it is whole, the same every time, and never costs a merge."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from execute.conftest import contents, tensors  # noqa: E402
from execute.prepare_models import RECIPE, TRAIN, models, planned  # noqa: E402
from mergetool.cache import cache_folder  # noqa: E402
from mergetool.errors import PlanError, RunError  # noqa: E402
from mergetool.execute.calibration import open_tokenizer, read  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.report import draw as drawing  # noqa: E402
from mergetool.execute.report import gather  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.execute.verify import verify  # noqa: E402
from mergetool.plan import build  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402
from mergetool.publish import page  # noqa: E402
from mergetool.publish import sections as plain  # noqa: E402
from mergetool.recipe import load  # noqa: E402

ALIGN = "align: {method: weight_matching, reference: base}\n"
BY_ACTIVATIONS = ALIGN.replace("weight", "activation")
METHODS = {"regmean": "", "fisher": "", "dam": TRAIN.replace("held_out: 0", "held_out: 0.34")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return models(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The facts of all tests here; they differ in what they do with them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(cache))


def recipe_of(method):
    weight = "" if method == "dam" else "parameters: {weight: 0.5}\n"
    return RECIPE.replace("METHOD", method).replace("parameters: {weight: 0.5}\n", weight)


def made(folder, output, method, more="", **options):
    path = folder / f"{method}.yaml"
    path.write_text(recipe_of(method) + METHODS.get(method, "") + more)
    return run(build(load(path), **options), output)


def numbers(output):
    found = json.loads((output / "report" / "report.json").read_text())
    return {section["name"]: section for section in found["sections"]}


def rows(section):
    return [dict(zip(section["columns"], row, strict=True)) for row in section["rows"]]


def facts(kind, label):
    """The folder of facts of a kind and a model."""
    every = [open_facts(path) for path in cache_folder("facts").glob(f"{kind}-*")]
    return next(each for each in every if each.label == label)


def report_of(output):
    return {name: content for name, content in contents(output).items() if name.startswith("report")}


@pytest.fixture(scope="module")
def outputs(shared, cache, tmp_path_factory):
    """A merge by each method that looks at whole models."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETOOL_CACHE", str(cache))
        for method in METHODS:
            made(shared, folder / method, method)
        made(shared, folder / "linear", "linear", ALIGN)
    return folder


def test_every_method_shows_what_it_found(outputs):
    shown = {method: list(numbers(outputs / method)) for method in (*METHODS, "linear")}
    assert shown == {
        "regmean": ["cka", "inputs"],
        "fisher": ["cka", "fisher"],
        "dam": ["cka", "training", "coefficients"],
        "linear": ["cka", "alignment"],
    }


def hidden(folder, label, batches):
    """What every layer puts out, by transformers itself: for each batch and layer the rows of real tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / label, dtype=torch.float32)
    layers = []
    for layer in model.model.layers:
        seen = []
        layer.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        layers.append(seen)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    masks = [batch["attention_mask"].bool() for batch in batches]
    return [[out[mask].double().numpy() for out, mask in zip(seen, masks, strict=True)] for seen in layers]


def hsic(k, l):  # noqa: E741 - the letter of the paper
    """Written from Song et al. 2012, one sum at a time."""
    m = len(k)
    k, l = k * (1 - np.eye(m)), l * (1 - np.eye(m))  # noqa: E741
    one = np.ones(m)
    return (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / (m - 1) / (m - 2) - 2 / (m - 2) * (one @ k @ l @ one)
    ) / (m * (m - 3))


def test_the_cka_is_that_of_the_layers_outputs(shared, outputs):
    plan = planned(shared, "linear")
    tokenizer = open_tokenizer(shared / "base", "base")
    samples = [read(data, tokenizer, shared, plan.recipe.seed) for data in plan.recipe.calibration.data]
    batches = [batch for each in samples for batch in each.batches()]
    seen = {label: hidden(shared, label, batches) for label in ("base", "a", "b")}
    found = rows(numbers(outputs / "dam")["cka"])
    assert [(row["first"], row["second"]) for row in found[::3]] == [("base", "a"), ("base", "b"), ("a", "b")]
    for row in found:
        layer = int(row["block"].rpartition(".")[2])
        pairs = list(zip(seen[row["first"]][layer], seen[row["second"]][layer], strict=True))
        xy, xx, yy = (
            sum(hsic(p @ p.T, q @ q.T) for p, q in each)
            for each in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
        )
        assert row["CKA"] == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-4)


def test_directions_are_those_of_the_gram_matrices(outputs):
    section = numbers(outputs / "regmean")["inputs"]
    for row in rows(section):
        folder = facts("gram", row["source"])
        gram = folder.get(row["weight"], "gram").astype(np.float64)
        values = np.linalg.eigvalsh(gram)
        assert row["directions"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
        assert row["inputs"] == len(gram)
        assert row["tokens"] == folder.get(row["weight"], "count")
    assert {panel["title"] for panel in section["panels"]} >= {"attention.q, k, v", "attention.o", "mlp.gate, up"}
    assert {row["source"] for row in rows(section)} == {"a", "b"}


def test_shares_are_those_of_the_squared_gradients(outputs):
    section = numbers(outputs / "fisher")["fisher"]
    for source in ("a", "b"):
        folder = facts("squared_gradients", source)
        mine = [row for row in rows(section) if row["source"] == source]
        assert {row["weight"] for row in mine} == set(folder.names)
        total = sum(folder.get(name, "squared_gradient").sum(dtype=np.float64) for name in folder.names)
        for row in mine:
            values = folder.get(row["weight"], "squared_gradient")
            assert row["share"] == pytest.approx(values.sum(dtype=np.float64) / total, rel=1e-5)
            assert row["above floor"] == pytest.approx((values > 1e-6).mean(), rel=1e-5)
        curves = [s["values"] for panel in section["panels"] for s in panel["series"] if s["name"] == source]
        assert sum(value for curve in curves for value in curve if value is not None) == pytest.approx(100, abs=1e-3)


def test_curves_and_coefficients_are_those_of_the_training(outputs):
    (folder,) = cache_folder("facts").glob("coefficients-*")
    about = json.loads((folder / "dam.json").read_text())
    found = numbers(outputs / "dam")
    training, held = found["training"]["panels"]
    assert training["places"] == [1, 2, 3, 4]
    assert training["series"][-1]["values"] == pytest.approx([s["loss"] for s in about["curve"]["steps"]], rel=1e-5)
    assert held["places"] == [0, 2, 4]
    assert held["series"][0]["values"] == pytest.approx([h["each"][0] for h in about["curve"]["held_out"]], rel=1e-5)
    assert held["marks"] == [[about["best_step"], f"taken: step {about['best_step']}"]]
    values = open_facts(folder)
    for row in rows(found["coefficients"]):
        weight, _, added = row["weight"].partition(":")
        own = values.get(weight, "row_coefficients" if added else "coefficients")[("a", "b").index(row["source"])]
        expected = pytest.approx((own.min(), own.mean(dtype=np.float64), own.max()), rel=1e-5)
        assert (row["least"], row["mean"], row["largest"]) == expected
    panel = found["coefficients"]["panels"][1]
    assert (panel["title"], panel["places"]) == ("b", ["in", "0", "1", "2", "out"])
    names = [name for name in values.names if ".layers.1." in name]
    columns = np.concatenate([values.get(name, "coefficients")[1].ravel() for name in names]).astype(np.float64)
    rows_of = [values.get(name, "row_coefficients")[1] for name in names if len(values.fields(name)) > 1]
    added = found["coefficients"]["panels"][3]
    assert added["title"] == "b: added by rows"
    curves = [*panel["series"], *added["series"]]
    for curve, pool in zip(curves, (columns, np.concatenate(rows_of).astype(np.float64)), strict=True):
        assert curve["values"][2] == pytest.approx(pool.mean(), rel=1e-5)
        assert curve["bands"][0][2] == pytest.approx([pool.min(), pool.max()], rel=1e-5)
        assert curve["bands"][1][2] == pytest.approx(np.quantile(pool, [0.1, 0.9]), rel=1e-5)


def test_gains_are_those_of_the_matching(outputs):
    section = numbers(outputs / "linear")["alignment"]
    found = rows(section)
    assert {row["source"] for row in found} == {"a", "b"}
    for row in found:
        scores = facts("alignment", f"base, {row['source']}").get(row["group"], "scores")
        assert (row["as they lie"], row["turned"], row["share that moved"]) == pytest.approx(tuple(scores), rel=1e-5)
    (mlp,) = (panel for panel in section["panels"] if panel["title"] == "hidden units of MLPs")
    assert mlp["places"] == ["0", "1", "2"]
    first = next(row for row in found if row["kind"] == "mlp" and row["source"] == "a")
    assert mlp["series"][1]["values"][0] == first["turned"]


@pytest.mark.parametrize(
    ("align", "by", "nothing"),
    [
        (BY_ACTIVATIONS, "the correlation of their activations", "0 what chance gives"),
        (
            BY_ACTIVATIONS.replace("}", ", score: inner_product}"),
            "the inner products of their",
            "match in part by chance",
        ),
    ],
)
def test_a_score_is_told_with_what_it_compares(shared, cache, tmp_path, monkeypatch, align, by, nothing):
    monkeypatch.setenv("MERGETOOL_CACHE", str(cache))
    made(shared, tmp_path / "merged", "linear", align)
    section = numbers(tmp_path / "merged")["alignment"]
    assert f"Units are compared by {by}" in section["reading"]
    assert nothing in section["reading"]


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.links, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]


def test_the_page_holds_everything_itself(outputs):
    for method in (*METHODS, "linear"):
        text = (outputs / method / "report.html").read_text()
        links = Links()
        links.feed(text)
        assert all(
            link.startswith(("#", "data:image/png;base64,", "data:application/json;base64,")) for link in links.links
        )
        assert not links.tags & {"script", "link", "iframe", "object"}
        assert "url(" not in text
        assert "@import" not in text
        assert sum(link.startswith("data:image") for link in links.links) == len(numbers(outputs / method))


def test_pictures_are_wide_enough_and_no_larger_than_they_must_be(outputs):
    for path in outputs.rglob("*.png"):
        raw = path.read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(raw[16:20], "big") == 1200
        assert len(raw) < 150_000
        assert b"tEXt" not in raw  # neither the time nor the version


def test_the_report_is_on_record_and_on_the_card(outputs):
    for method in METHODS:
        output = outputs / method
        record = json.loads((output / "provenance.json").read_text())
        assert set(report_of(output)) <= set(record["files"])
        assert "matplotlib" in record["versions"]
        card = (output / "README.md").read_text()
        assert ("its coefficients trained, no weight" in card) == (method == "dam") != ("nothing trained" in card)
        linked = re.findall(r"!\[.+\]\((.+)\)", card)
        assert linked == [f"report/{name}.png" for name in numbers(output)]
        assert all((output / name).exists() for name in linked)
        assert verify(output, sample=1).ok


def test_the_same_recipe_gives_the_same_report(shared, outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "cache"))  # measured anew
    made(shared, tmp_path / "again", "regmean", workers=1)
    assert report_of(tmp_path / "again") == report_of(outputs / "regmean")


def test_parts_leave_the_report_that_a_single_run_leaves(shared, outputs, tmp_path):
    plan = build(load(shared / "dam.yaml"))
    run_part(plan, Share(2, 2), tmp_path / "parts")
    run_part(plan, Share(1, 2), tmp_path / "parts")
    finish(plan, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(outputs / "dam")


def test_runs_that_look_at_no_model_have_no_report(shared, tmp_path):
    for number, (method, more) in enumerate((("linear", ""), ("regmean", "report: none\n"))):
        output = tmp_path / str(number)
        report = made(shared, output, method, more)
        assert report_of(output) == {}
        assert "## Report" not in (output / "README.md").read_text()
        assert not any("report" in note for note in report.notes)


def test_a_report_may_be_asked_for(shared, tmp_path):
    made(shared, tmp_path / "linear", "linear", "report: {cka: true, data: second, samples: 2}\n")
    section = numbers(tmp_path / "linear")["cka"]
    assert "On 16 tokens" in section["found"]
    # The base lends its config to a mean, and no weight of it is read.
    assert [row["first"] + row["second"] for row in rows(section)] == ["ab", "ab", "ab"]


def test_where_models_lie_is_nobody_elses_business(shared, tmp_path):
    text = recipe_of("dam").replace("base_model: base", f"base_model: {shared}/base")
    text = re.sub(r"model: (a|b)", rf"model: {shared}/\1", text).replace("path: ", f"path: {shared}/")
    (tmp_path / "merge.yaml").write_text(text + METHODS["dam"] + ALIGN.replace("base}", f"{shared}/base}}"))
    run(build(load(tmp_path / "merge.yaml")), tmp_path / "merged")
    assert not any(str(shared).encode() in content for content in report_of(tmp_path / "merged").values())
    assert list(numbers(tmp_path / "merged")) == ["cka", "alignment", "training", "coefficients"]


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), ValueError("no axes"), MemoryError()])
def test_a_drawing_that_fails_costs_no_merge(shared, outputs, tmp_path, monkeypatch, error):
    def broken(section):
        raise error

    monkeypatch.setattr(page, "draw", broken)
    report = made(shared, tmp_path / "merged", "regmean")
    (note,) = (note for note in report.notes if "not drawn" in note)
    assert ("matplotlib is not installed" in note) == isinstance(error, ImportError)
    assert numbers(tmp_path / "merged") == numbers(outputs / "regmean")
    assert set(report_of(tmp_path / "merged")) == {"report/report.json"}
    assert verify(tmp_path / "merged", sample=1).ok
    found, expected = tensors(tmp_path / "merged"), tensors(outputs / "regmean")
    assert all(np.array_equal(values, expected[name][1]) for name, (_, values) in found.items())


def test_a_section_that_fails_is_left_out(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "inputs_section", lambda *_: 1 / 0)
    report = made(shared, tmp_path / "merged", "regmean")
    assert "the report lacks the section `inputs`: ZeroDivisionError: division by zero" in report.notes
    assert list(numbers(tmp_path / "merged")) == ["cka"]


def test_models_that_cannot_be_compared_are_merged(shared, tmp_path, monkeypatch):
    from mergetool.execute.report import compare

    def refused(*_, **__):
        raise PlanError("the models do not run alike", "a, b")

    monkeypatch.setattr(compare, "record_pair", refused)
    report = made(shared, tmp_path / "merged", "regmean")
    assert "the models were not compared for the report: a, b: the models do not run alike" in report.notes
    assert list(numbers(tmp_path / "merged")) == ["inputs"]
    with pytest.raises(PlanError, match="do not run alike"):  # who asks for it is told before anything is merged
        made(shared, tmp_path / "asked", "regmean", "report: {cka: true}\n")


def test_a_full_disk_is_a_full_disk(shared, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RunError("the disk is full") from OSError(28, "No space left on device")

    monkeypatch.setattr(gather, "inputs_section", full)
    with pytest.raises(RunError, match="full"):
        made(shared, tmp_path / "merged", "regmean")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    assert not drawing.disk_failed(RunError("shares its input with others"))


IMPORTS = """
import sys
from mergetool import build, load, run
plan = build(load(sys.argv[1]))
assert "matplotlib" not in sys.modules
run(plan, sys.argv[2])
print("matplotlib" in sys.modules)
"""


@pytest.mark.parametrize(("method", "drawn"), [("linear", False), ("regmean", True)])
def test_matplotlib_is_imported_when_a_report_is_drawn(shared, outputs, tmp_path, method, drawn):
    (shared / "imports.yaml").write_text(recipe_of(method))
    command = [sys.executable, "-c", IMPORTS, str(shared / "imports.yaml"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(drawn)


def test_what_a_user_has_set_for_pictures_changes_nothing(outputs, monkeypatch):
    import matplotlib

    found = json.loads((outputs / "dam" / "report" / "report.json").read_text())
    sections = plain.from_json(found, "report.json")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):
        files = page.draw_report(sections, found["title"]).files
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(files) == report_of(outputs / "dam")


def test_a_report_is_drawn_again_elsewhere(outputs, tmp_path):
    before = contents(outputs / "dam")
    written = page.redraw(outputs / "dam", tmp_path / "new")
    assert {path.relative_to(tmp_path / "new").as_posix() for path in written} == set(report_of(outputs / "dam"))
    assert contents(tmp_path / "new") == report_of(outputs / "dam")
    assert contents(outputs / "dam") == before


def test_a_merged_model_does_not_hand_its_report_on(outputs, shared, tmp_path):
    shutil.copytree(outputs / "dam", tmp_path / "merged")
    (tmp_path / "merge.yaml").write_text(
        "merge_method: linear\nmodels: [{model: merged}, {model: other}]\nparameters: {weight: 0.5}\n"
    )
    shutil.copytree(shared / "a", tmp_path / "other")
    run(build(load(tmp_path / "merge.yaml")), tmp_path / "twice")
    assert report_of(tmp_path / "twice") == {}


def test_the_spread_is_that_of_the_models_as_written(shared, tmp_path):
    from execute.correct_models import batches, loaded, moments
    from mergetool.facts.correction import goal, spread_ratio

    report = made(shared, tmp_path / "merged", "linear", "correct: {method: repair}\n")
    found = numbers(tmp_path / "merged")
    assert list(found) == ["cka", "spread"]
    (folder,) = cache_folder("facts").glob("correction-*")
    kept = json.loads((folder / "spread.json").read_text())
    by_output = {row["output"]: row for row in rows(found["spread"])}
    assert {name: row["before"] for name, row in by_output.items()} == {
        each["output"]: pytest.approx(each["before"], rel=1e-5) for each in kept
    }
    models_read = [loaded(shared / label) for label in ("a", "b")]
    written = loaded(tmp_path / "merged")
    for name, row in by_output.items():
        path = name.removesuffix(".weight")
        target = goal([moments(each, path, batches(report.plan)) for each in models_read])
        expected = spread_ratio(target, moments(written, path, batches(report.plan)))
        assert row["after"] == pytest.approx(expected, rel=1e-3)


def test_a_soup_shows_the_scores_that_it_was_chosen_by(shared, tmp_path):
    text = recipe_of("greedy_soup").replace("parameters: {weight: 0.5}\n", "").replace("base_model: base\n", "")
    (shared / "soup.yaml").write_text(text)
    run(build(load(shared / "soup.yaml")), tmp_path / "merged")
    found = numbers(tmp_path / "merged")
    assert list(found) == ["cka", "soup"]
    (folder,) = cache_folder("facts").glob("soup-*")
    kept = open_facts(folder)
    panels = {panel["title"]: panel for panel in found["soup"]["panels"]}
    assert list(panels) == ["mean of all data", "first", "second"]
    for place, name in enumerate(panels["first"]["places"]):
        expected = kept.get(name, "loss")
        for number, title in enumerate(("first", "second")):
            taken, refused = (series["values"][place] for series in panels[title]["series"])
            assert (refused if taken is None else taken) == pytest.approx(expected[number], rel=1e-5)
    assert set(panels["first"]["places"]) == set(kept.names) - {"soup"} == {"1", "2", "1+2"}
