"""A soup is what trying every mean by hand gives, is written as it was tried, and is chosen once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from execute.conftest import contents  # noqa: E402
from execute.forward.tiny import save  # noqa: E402
from execute.prepare_models import Told, tokenizer  # noqa: E402
from mergetool.errors import CheckpointError, NonFinite, PlanError, RecipeError  # noqa: E402
from mergetool.execute import prepare_soup  # noqa: E402
from mergetool.execute.calibration import open_tokenizer, read  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.prepare import prepare  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.plan import build, show  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402
from mergetool.recipe import load  # noqa: E402
from mergetool.recipe.data import Data  # noqa: E402

NAMES = ("bad", "a", "b")
RECIPE = """\
merge_method: greedy_soup
models: [{model: bad}, {model: a}, {model: b}]
calibration:
  data:
    first: {path: first.txt, samples: 6, max_length: 8}
    second: {path: second.txt, samples: 4, max_length: 12}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model that was trained on some text, two that are moved to either side of it, and one far away."""
    folder = tmp_path_factory.mktemp("soup")
    original = save("llama", folder / "trained")
    tokenizer(folder / "trained")
    for i, name in enumerate(("first", "second")):
        words = [f"w{3 + (i + 2 * n) % 20}" for n in range(200)]
        (folder / f"{name}.txt").write_text(" ".join(words))
    data = [each for name in ("first", "second") for each in samples(folder, name, "trained")]
    optimizer = torch.optim.Adam(original.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        sum(original(input_ids=ids, labels=ids).loss for ids in data).backward()
        optimizer.step()
    centre = {name: value.detach().clone() for name, value in original.state_dict().items()}
    save_file(centre, folder / "trained" / "model.safetensors", {"format": "pt"})
    random = torch.Generator().manual_seed(0)
    step = {name: 0.05 * torch.randn(value.shape, generator=random) for name, value in centre.items()}
    moved = {"bad": 9.0, "a": 1.0, "b": -1.1}
    for label, far in moved.items():
        shutil.copytree(folder / "trained", folder / label)
        tensors = {name: value + far * step[name] for name, value in centre.items()}
        save_file(tensors, folder / label / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "own")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facts"


def samples(folder, name, label="a"):
    """The tokens of the samples of a text, one by one."""
    sizes = {"first": (6, 8), "second": (4, 12)}[name]
    found = read(Data(name, f"{name}.txt", *sizes), open_tokenizer(folder / label, label), folder, 0, labels=True)
    return [part["input_ids"] for part in found.parts]


def planned(folder, text=RECIPE, **options):
    path = folder / "soup.yaml"
    path.write_text(text)
    return build(load(path), **options)


def by_hand(folder, members, dtype=torch.float32, names=NAMES):
    """The loss of the mean of some models on each text, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32).eval()
    every = [load_file(folder / names[i] / "model.safetensors") for i in members]
    mean = {name: (sum(each[name].double() for each in every) / len(every)).to(dtype).float() for name in every[0]}
    model.load_state_dict(mean)
    return losses(model, folder)


def losses(model, folder):
    found = []
    with torch.no_grad():
        for name in ("first", "second"):
            every = samples(folder, name)
            nats = [float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in every]
            found.append(sum(nats) / sum(ids.shape[1] - 1 for ids in every))
    return found


def scores(cache):
    (path,) = cache.glob("soup-*")
    facts = open_facts(path)
    return {name: facts.get(name, "loss") for name in facts.names if name != "soup"}, facts.get("soup", "members")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_soup_and_its_scores_are_those_found_by_hand(shared, cache, tmp_path, dtype):
    plan = planned(shared, f"{RECIPE}dtype: {dtype}\n")
    made = prepare(plan)
    kind = getattr(torch, dtype)
    tried, members = scores(cache)
    for name, found in tried.items():
        np.testing.assert_allclose(found, by_hand(shared, [int(i) - 1 for i in name.split("+")], kind), rtol=1e-5)
    alone = [-np.mean(by_hand(shared, [i], kind)) for i in range(3)]
    expected = oracles.greedy_soup(alone, lambda each: -np.mean(by_hand(shared, each, kind)))
    assert members.tolist()[0] == expected[0]
    assert sorted(members) == sorted(expected) == [1, 2]
    assert dict(made.shares) == {0: 0.0, 1: 1.0, 2: 1.0}
    (note,) = made.notes
    assert note.startswith("the soup is the mean of a, b: loss ")
    assert note.endswith("left out: bad")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_has_the_loss_that_was_promised_and_is_no_worse_than_the_best(shared, cache, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    report = run(planned(shared, f"{RECIPE}dtype: {dtype}\n"), tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    found = losses(written, shared)
    tried, _ = scores(cache)
    np.testing.assert_allclose(found, tried["2+3"], rtol=1e-6)
    assert np.mean(found) < min(np.mean(tried[str(i + 1)]) for i in range(3))
    assert any(note.startswith("the soup is the mean of a, b") for note in report.notes)
    page = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert "soup" in [section["name"] for section in page["sections"]]
    linear = RECIPE.replace("greedy_soup", "linear").replace("[{model: bad}, ", "[").split("calibration")[0]
    run(planned(shared, f"{linear}parameters: {{weight: 1}}\ndtype: {dtype}\n"), tmp_path / "linear")
    first, second = (contents(tmp_path / name)["model.safetensors"] for name in ("out", "linear"))
    assert first == second


def test_a_second_run_and_one_in_another_dtype_try_nothing_if_they_are_tried_in_the_same(shared, cache, tmp_path):
    text = RECIPE + "evaluate: {dtype: bfloat16}\n"
    told = Told()
    prepare(planned(shared, text + "dtype: bfloat16\n"), progress=told)
    assert told.labels == ["evaluate"]
    first = scores(cache)
    for dtype in ("float32", "bfloat16", "float16"):
        prepare(planned(shared, text + f"dtype: {dtype}\n"), progress=told)
    assert told.labels == ["evaluate"]
    prepare(planned(shared, RECIPE + "dtype: bfloat16\n"), progress=told)
    assert told.labels == ["evaluate"]
    assert str(scores(cache)) == str(first)
    prepare(planned(shared, RECIPE + "dtype: float32\n"), progress=told)
    assert told.labels == ["evaluate"] * 2


def test_data_that_are_not_asked_for_do_not_count(folder, cache):
    text = RECIPE + "evaluate: {data: second}\n"
    prepare(planned(folder, text))
    tried, _ = scores(cache)
    assert {name: len(found) for name, found in tried.items()} == dict.fromkeys(tried, 1)
    (folder / "first.txt").write_text("w3 w4 " * 100)
    told = Told()
    prepare(planned(folder, text), progress=told)
    assert not told.labels
    (folder / "second.txt").write_text("w3 w4 " * 100)
    prepare(planned(folder, text), progress=told)
    assert told.labels == ["evaluate"]


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_killed_choice_goes_on_and_gives_the_same_bytes(shared, tmp_path, monkeypatch, after):
    plan = planned(shared, RECIPE + "dtype: bfloat16\n")
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "undisturbed"))
    run(plan, tmp_path / "whole")
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "killed"))
    whole, asked = prepare_soup.score, []

    def killed(*arguments):
        asked.append(arguments[0].label)
        if len(asked) > 2 * after:  # two data sets
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(prepare_soup, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before, asked[:] = asked[: 2 * after], []
    monkeypatch.setattr(prepare_soup, "score", lambda *arguments: asked.append(arguments[0].label) or whole(*arguments))
    run(plan, tmp_path / "out")
    assert len(before) + len(asked) == 2 * 5
    assert not {*before} & {*asked}
    kept = [contents(tmp_path / name / "facts") for name in ("undisturbed", "killed")]
    assert kept[0] == kept[1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_in_parts_makes_what_a_run_of_the_whole_makes(shared, cache, tmp_path):
    plan = planned(shared)
    whole = run(plan, tmp_path / "whole")
    told = [Told(), Told()]
    for number in (1, 2):
        run_part(plan, Share(number, 2), tmp_path / "parts", progress=told[number - 1])
    assert ["evaluate" in each.labels for each in told] == [True, False]
    assert finish(plan, tmp_path / "parts").digests == whole.digests
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_the_card_tells_the_models_that_were_taken_from_those_that_were_tried(shared, cache, tmp_path):
    run(planned(shared), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Greedy soup of 2 of 3 models: a + b\n" in text
    assert "a merge of 2 of 3 models by Greedy soup, nothing trained." in text
    assert "| `bad` | tried and left out | local folder |" in text
    keeping = planned(shared, f"{RECIPE}rules: [{{where: {{part: norm}}, keep: bad}}]\n")
    run(keeping, tmp_path / "keeping")
    assert "# Greedy soup: bad + a + b\n" in (tmp_path / "keeping" / "README.md").read_text()


def test_two_models_that_are_the_same_are_both_in(folder, cache, tmp_path):
    """Their mean is each of them, and ties are added."""
    shutil.rmtree(folder / "bad")
    shutil.copytree(folder / "a", folder / "bad")
    prepare(planned(folder, RECIPE.replace(", {model: b}", "")))
    tried, members = scores(cache)
    assert members.tolist() == [0, 1]
    assert np.array_equal(tried["1"], tried["2"])
    assert np.array_equal(tried["1"], tried["1+2"])


def test_tensors_under_rules_are_what_the_run_makes_of_them(shared, cache, tmp_path):
    """And so is every model that is tried: the head of one goes with the rest of another."""
    rules = """
rules:
  - where: {part: head}
    keep: bad
  - where: {part: norm}
    merge_method: linear
    parameters: {weight: 1}
"""
    plan = planned(shared, RECIPE + rules)
    run(plan, tmp_path / "out")
    from transformers import AutoModelForCausalLM

    found = losses(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval(), shared)
    tried, members = scores(cache)
    np.testing.assert_allclose(found, tried["+".join(str(i + 1) for i in sorted(members))], rtol=1e-6)
    assert not np.allclose(tried["2"], by_hand(shared, [1]))
    told = Told()
    prepare(planned(shared, RECIPE + rules.replace("weight: 1", "weight: 2")), progress=told)
    prepare(planned(shared, RECIPE + rules.replace("keep: bad", "keep: a")), progress=told)
    assert told.labels == ["evaluate"] * 2


def test_the_base_is_tried_only_if_it_is_among_the_models(shared, cache):
    prepare(planned(shared, RECIPE + "base_model: trained\n"))
    assert len(scores(cache)[0]) == 5
    shutil.rmtree(cache)
    text = RECIPE.replace("{model: bad}", "{model: trained}") + "base_model: trained\n"
    prepare(planned(shared, text))
    assert scores(cache)[1].tolist()[0] == 0


def test_accuracy_is_the_share_of_tokens_that_are_right(shared, cache):
    prepare(planned(shared, RECIPE + "evaluate: {metric: accuracy}\n"))
    (path,) = cache.glob("soup-*")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / "a", dtype=torch.float32).eval()
    for i, name in enumerate(("first", "second")):
        every = samples(shared, name)
        right = [(model(input_ids=ids).logits.argmax(-1)[:, :-1] == ids[:, 1:]).float().mean() for ids in every]
        assert open_facts(path).get("2", "accuracy")[i] == pytest.approx(float(sum(right)) / len(right))


# What cannot be tried


def test_what_the_plan_can_tell_is_told_from_the_plan(folder):
    def said(text):
        with pytest.raises(RecipeError) as caught:
            planned(folder, text)
        return [(p.what, p.where.rpartition("/")[2]) for p in caught.value.problems]

    one = RECIPE.replace("[{model: bad}, {model: a}, {model: b}]", "[{model: a}]")
    assert said(one) == [("`greedy_soup` merges at least 2 models, and here are 1", "soup.yaml:2:9")]
    twice = RECIPE.replace("{model: bad}, {model: a}", "{model: a}, {model: a}")
    assert said(twice) == [("`a` is among the models twice", "soup.yaml:2:30")]
    bare = RECIPE.split("calibration")[0]
    what = "`greedy_soup` runs the models on data, and the recipe has no `calibration`"
    assert said(bare) == [(what, "soup.yaml:1:15")]
    other = RECIPE.replace("greedy_soup", "linear") + "parameters: {weight: 1}\nevaluate: {metric: loss}\n"
    what = "`evaluate` says how merged models are tried out, and `linear` tries none"
    assert said(other) == [(what, "soup.yaml:8:11")]


def test_the_plan_states_the_stage_and_its_cost(shared):
    plan = planned(shared, RECIPE + "evaluate: {data: first}\n")
    stage, *_, merge = plan.stages
    whole = sum(tensor.nbytes for tensor in plan.sources[0].checkpoint.tensors.values())
    assert (stage.name, stage.passes, stage.tokens, stage.bytes_read) == ("evaluate", 5, 5 * 6 * 8, 8 * whole)
    assert whole < stage.memory < 2 * whole
    assert not stage.jobs_alone
    assert merge.name == "merge"
    assert all(said in show.table(plan) for said in ("5 models", "tries averages on data"))
    assert show.as_json(plan)["stages"][0]["tokens"] == 240


def test_a_weight_that_is_no_number_is_refused_and_nothing_is_kept(folder, cache):
    path = folder / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFinite, match=r"b: model\.norm\.weight"):
        prepare(planned(folder))
    assert not list(cache.glob("*soup-*[!k]"))


def test_predictions_that_are_no_numbers_are_refused_of_a_model_and_no_better_than_any_of_a_mean(
    folder, cache, monkeypatch
):
    path = folder / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFinite, match="predicts"):
        prepare(planned(folder))
    shutil.copy(folder / "a" / "model.safetensors", path)
    whole = prepare_soup.score

    def overflowing(model, *arguments):
        if model.label.startswith("the mean of"):
            raise NonFinite("what the network predicts holds a NaN or an infinity", model.label)
        return whole(model, *arguments)

    monkeypatch.setattr(prepare_soup, "score", overflowing)
    made = prepare(planned(folder))
    assert sum(made.shares.values()) == 1
    assert any("alone" in note and "no mean with another does as well" in note for note in made.notes)


def test_a_model_that_cannot_be_run_is_refused(folder, cache):
    for label in NAMES:
        path = folder / label / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"strange"').replace("LlamaForCausalLM", "Strange"))
    with pytest.raises(CheckpointError, match="adapter"):
        prepare(planned(folder))


@pytest.mark.parametrize(("name", "said"), [("bert", "predicts nothing"), ("bert_classifier", "labels are")])
def test_a_model_that_predicts_no_next_token_is_refused_on_texts(tmp_path, cache, name, said):
    for label in NAMES:
        save(name, tmp_path / label)
        tokenizer(tmp_path / label)
    for text in ("first", "second"):
        (tmp_path / f"{text}.txt").write_text("w3 w4 w5 w6 " * 40)
    with pytest.raises(PlanError, match=said):
        prepare(planned(tmp_path))


# Models of an adapter


ADAPTER = """\
import numpy as np
import torch


def network(config):
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))


def read(path, samples, seed):
    rows = torch.from_numpy(np.load(path)[:samples]).float()
    return [{"input": some[:, :4], LABELS} for some in rows.split(16)]
"""
LABELED = """\
merge_method: greedy_soup
models: [{model: n1}, {model: n2}, {model: n3}]
calibration:
  data: {rows: {path: rows.npy, samples: 50}}
  adapter: adapter.py
"""


def networks(folder, labels='"labels": some[:, 4].long()'):
    """Three small networks and labelled rows."""
    folder.mkdir()
    for label in ("n1", "n2", "n3"):
        torch.manual_seed(int(label[1]))
        network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        (folder / label).mkdir()
        save_file(network.state_dict(), folder / label / "model.safetensors", {"format": "pt"})
        (folder / label / "config.json").write_text("{}")
    random = np.random.default_rng(0)
    rows = np.hstack([random.normal(size=(60, 4)), random.integers(0, 3, (60, 1))])
    np.save(folder / "rows.npy", rows)
    (folder / "adapter.py").write_text(ADAPTER.replace("LABELS", labels))
    return torch.from_numpy(rows[:50]).float()


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_networks_of_an_adapter_are_scored_by_their_labels(tmp_path, cache, metric):
    rows = networks(tmp_path / "m")
    prepare(planned(tmp_path / "m", f"{LABELED}evaluate: {{metric: {metric}}}\n"), trust_code=True)
    (path,) = cache.glob("soup-*")
    facts = open_facts(path)
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    each = [load_file(tmp_path / "m" / f"n{i}" / "model.safetensors") for i in (1, 2, 3)]

    def value(members):
        network.load_state_dict({key: sum(each[i][key] for i in members) / len(members) for key in each[0]})
        logits, classes = network(rows[:, :4]), rows[:, 4].long()
        if metric == "accuracy":
            return float((logits.argmax(-1) == classes).double().mean())
        return float(torch.nn.functional.cross_entropy(logits.detach(), classes))

    for name in facts.names:
        if name != "soup":
            members = [int(i) - 1 for i in name.split("+")]
            assert facts.get(name, metric)[0] == pytest.approx(value(members), rel=1e-5)
    sign = 1 if metric == "accuracy" else -1
    expected = oracles.greedy_soup([sign * value([i]) for i in range(3)], lambda members: sign * value(members))
    assert facts.get("soup", "members").tolist()[0] == expected[0]
    assert sorted(facts.get("soup", "members")) == sorted(expected)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ('"more": some[:, 4]', "gives no `labels`, and they are needed"),
        ('"labels": some[:, 4]', "the labels are .* of float32"),
        ('"labels": some[:, :2].long()', "the labels are"),
        ('"labels": some[:, 4].long() + 7', "do not suit its 3 classes"),
    ],
)
def test_labels_that_are_missing_or_do_not_suit_are_refused(tmp_path, cache, labels, said):
    networks(tmp_path / "m", labels)
    with pytest.raises(PlanError, match=said):
        prepare(planned(tmp_path / "m", LABELED), trust_code=True)
