"""Gram matrices in sequence: each layer on what the merged layers before it make, as a plain loop in float64 says."""

from __future__ import annotations

import copy
import shutil
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from methods.test_with_facts import regmean_naively  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from execute.conftest import contents  # noqa: E402
from execute.forward.tiny import build as made_by_transformers  # noqa: E402
from execute.prepare_models import Told, models, planned  # noqa: E402
from mergetool.errors import NonFinite, PlanError, RecipeError  # noqa: E402
from mergetool.execute import prepare_sequence  # noqa: E402
from mergetool.execute.calibration import open_tokenizer, read  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.forward.outputs import Outputs  # noqa: E402
from mergetool.execute.merged import merged_weights  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.prepare import prepare  # noqa: E402
from mergetool.execute.prepared import Prepared  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.plan import build, show  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402
from mergetool.recipe import load  # noqa: E402
from mergetool.recipe.data import Data  # noqa: E402

SEQUENTIAL = ("parameters: {weight: 0.5}", "parameters: {weight: 0.5, sequential: true}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return moved_apart(models(tmp_path_factory.mktemp("sequence")))


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "own")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facts"


def moved_apart(folder):
    """The models further from each other, so that what comes of merged layers is not what comes of their own."""
    for seed, label in enumerate("ab"):
        random = torch.Generator().manual_seed(10 + seed)
        path = folder / label / "model.safetensors"
        tensors = {n: t + 0.2 * torch.randn(t.shape, generator=random) for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


def linears(module):
    return [(name, each) for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)]


def grams_of(model, part, data):
    """The mean inner products of the inputs of every linear layer under a module, over all tokens."""
    seen = {}
    hooks = [
        each.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
        for name, each in linears(part)
    ]
    with torch.no_grad():
        for ids in data:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in every]).numpy() for name, every in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


def by_hand(folder, name):
    """The merge in float64, a layer after the other, the whole model run for each of them."""
    sources = []
    for label in "ab":
        model = made_by_transformers(name)
        model.load_state_dict(load_file(folder / label / "model.safetensors"), strict=False)
        model.tie_weights()
        sources.append(model.double())
    data = []
    for label, text in (("a", "first"), ("b", "second")):
        samples = read(Data(text, f"{text}.txt", 6, 8), open_tokenizer(folder / label, label), folder, 0)
        data.append([part["input_ids"] for part in samples.parts])
    merged = copy.deepcopy(sources[0])
    first, second = (source.state_dict() for source in sources)
    merged.load_state_dict({key: (value + second[key]) / 2 for key, value in first.items()})
    for i in range(len(merged.model.layers)):
        solved(merged.model.layers, i, [source.model.layers[i] for source in sources], merged, data)
    heads(merged, sources, data)
    return merged.state_dict()


def solved(layers, i, own, merged, data):
    """Put each source's layer into the merged model and measure, then the solution."""
    mean, grams = layers[i], []
    for layer, texts in zip(own, data, strict=True):
        layers[i] = layer
        grams.append(grams_of(merged, layer, texts))
    layers[i] = mean
    for name, each in linears(mean):
        values = [layer.get_submodule(name).weight.detach().numpy() for layer in own]
        put(each, values, [gram[name] for gram in grams])


def heads(merged, sources, data):
    """The final norm and the head are each source's own while the head's inputs are measured."""
    if merged.config.tie_word_embeddings:
        return
    grams, norm = [], merged.model.norm
    for source, texts in zip(sources, data, strict=True):
        merged.model.norm = source.model.norm
        grams.append(grams_of(merged, torch.nn.ModuleList([merged.lm_head]), texts)["0"])
    merged.model.norm = norm
    put(merged.lm_head, [source.lm_head.weight.detach().numpy() for source in sources], grams)


def put(layer, values, grams):
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(regmean_naively(values, grams, (0.5, 0.5), 0.9, 1e-6)))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3"])
def test_the_merge_is_that_of_a_plain_loop_in_float64(name, tmp_path, cache):
    folder = moved_apart(models(tmp_path / "m", name))
    expected = by_hand(folder, name)
    run(planned(folder, "regmean", "dtype: float32\n", SEQUENTIAL), tmp_path / "out")
    run(planned(folder, "regmean", "dtype: float32\n"), tmp_path / "plain")
    found, plain = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "plain"))
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], atol=2e-4, rtol=1e-3, err_msg=key)
    differ = [key for key, value in plain.items() if not np.allclose(value, expected[key], atol=2e-3, rtol=1e-2)]
    assert len(differ) > 6


@pytest.mark.parametrize("name", ["gpt2", "mixtral_fused", "olmoe"])
def test_other_architectures_are_merged_in_one_run_as_in_parts(name, tmp_path, cache):
    folder = models(tmp_path / "m", name)
    plan = planned(folder, "regmean", "", SEQUENTIAL)
    whole = run(plan, tmp_path / "whole")
    for number in (1, 2):
        run_part(plan, Share(number, 2), tmp_path / "parts")
    assert finish(plan, tmp_path / "parts").digests == whole.digests
    plain = run(planned(folder, "regmean"), tmp_path / "plain").digests
    assert sum(whole.digests[key] != plain[key] for key in plain) > 9


def test_the_first_layer_of_sources_with_one_embedding_sees_what_it_did(folder, tmp_path, cache):
    """Nothing before it was merged, so its matrices come out as those of plain RegMean."""
    first, second = (load_file(folder / label / "model.safetensors") for label in "ab")
    second["model.embed_tokens.weight"] = first["model.embed_tokens.weight"].clone()
    save_file(second, folder / "b" / "model.safetensors", {"format": "pt"})
    made = prepare(planned(folder, "regmean", "", SEQUENTIAL))
    plain = prepare(planned(folder, "regmean"))
    job = planned(folder, "regmean").job("model.layers.0.mlp.down_proj.weight")
    last = planned(folder, "regmean").job("model.layers.2.mlp.down_proj.weight")
    for source in range(2):
        found, expected = (each.matrix(job, "gram", source).values for each in (made, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())
        found, expected = (each.matrix(last, "gram", source).values for each in (made, plain))
        assert not np.allclose(found, expected, rtol=1e-2)


def test_it_is_measured_once_whatever_the_dtype_and_again_for_other_parameters(folder, cache):
    told = Told()
    for dtype in ("float32", "bfloat16"):
        prepare(planned(folder, "regmean", f"dtype: {dtype}\n", SEQUENTIAL), progress=told)
    assert told.labels == ["measure layer by layer"]
    other = (SEQUENTIAL[0], SEQUENTIAL[1].replace("true", "true, off_diagonal: 0.5"))
    prepare(planned(folder, "regmean", "", other), progress=told)
    (folder / "second.txt").write_text((folder / "second.txt").read_text().replace("w5", "w6"))
    prepare(planned(folder, "regmean", "", SEQUENTIAL), progress=told)
    assert told.labels == ["measure layer by layer"] * 3


class Killed(KeyboardInterrupt):
    pass


def killed_at(count, function):
    """A function that works so many times."""
    left = [count]

    def limited(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*arguments)

    return limited


KILLS = [*((prepare_sequence._Sequence, "_put", i) for i in (1, 2, 3, 8, 10)), *((Outputs, "put", i) for i in range(6))]


@pytest.mark.parametrize(("owner", "name", "after"), KILLS)
def test_a_killed_measurement_goes_on_and_gives_the_same_facts(shared, tmp_path, monkeypatch, owner, name, after):
    """Of three layers, two sources and a batch each: between any two weights put in, any two outputs kept."""
    plan = planned(shared, "regmean", "", SEQUENTIAL)
    prepare(plan, root=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed_at(after, getattr(owner, name)))
        with pytest.raises(Killed):
            prepare(plan, root=tmp_path / "killed")
    told = Told()
    prepare(plan, root=tmp_path / "killed", progress=told)
    assert told.labels == ["measure layer by layer"]
    whole, found = (contents(tmp_path / each) for each in ("whole", "killed"))
    assert whole.keys() == found.keys()
    assert whole == found


def test_activations_that_are_gone_are_made_again_from_the_start(shared, tmp_path, monkeypatch):
    plan = planned(shared, "regmean", "", SEQUENTIAL)
    prepare(plan, root=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "put", killed_at(5, Outputs.put))
        with pytest.raises(Killed):
            prepare(plan, root=tmp_path / "killed")
    (partial,) = (tmp_path / "killed").glob(".*.partial")
    shutil.rmtree(partial / "activations")
    prepare(plan, root=tmp_path / "killed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_the_facts_are_listed_by_the_number_of_the_source(shared, cache):
    prepare(planned(shared, "regmean", "", SEQUENTIAL))
    (path,) = cache.glob("gram-sequential-*")
    facts = open_facts(path)
    assert facts.label == "a, b"
    assert {name.partition("/")[0] for name in facts.names} == {"0", "1"}
    assert facts.fields("0/model.layers.1.self_attn.v_proj.weight") == ("count", "gram")


def test_tensors_under_rules_are_merged_as_they_are_written(folder, tmp_path, cache):
    """What a rule keeps of the base is in the layers that later ones are measured behind."""
    rule = "rules:\n  - {where: {part: mlp}, keep: base}\n"
    made = prepare(planned(folder, "regmean", rule, SEQUENTIAL))
    plain = prepare(planned(folder, "regmean", "", SEQUENTIAL))
    names = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight")
    first, second = (planned(folder, "regmean").job(name) for name in names)
    assert np.array_equal(made.matrix(first, "gram", 0).values, plain.matrix(first, "gram", 0).values)
    assert not np.allclose(made.matrix(second, "gram", 0).values, plain.matrix(second, "gram", 0).values, rtol=1e-3)


# What cannot be done


def test_the_plan_states_twice_the_reading(shared):
    (plain, *_), (twice, *_) = (planned(shared, "regmean", "", change).stages for change in ((), SEQUENTIAL))
    assert (plain.name, twice.name, plain.passes, twice.passes) == ("measure", "measure", 1, 2)
    assert (twice.tokens, twice.bytes_read) == (2 * plain.tokens, 2 * plain.bytes_read)
    assert "up to 2 passes" in show.table(planned(shared, "regmean", "", SEQUENTIAL))


def test_one_sequence_for_all_and_no_soup_beside_it(folder):
    def said(rule):
        with pytest.raises(RecipeError) as caught:
            planned(folder, "regmean", f"rules:\n  - {rule}\n", SEQUENTIAL)
        return [(p.what, p.where.rpartition("/")[2]) for p in caught.value.problems]

    ((what, where),) = said("{where: {part: mlp}, parameters: {sequential: false}}")
    assert what.startswith("`sequential` differs between `lm_head.weight` and `model.layers.0.mlp")
    assert where == "merge.yaml:6:39"
    ((what, _),) = said("{where: {part: norm}, merge_method: greedy_soup}")
    assert what == "a soup is chosen by what the other tensors are, and with `sequential` these depend on the soup"


def test_a_network_whose_layers_do_not_run_in_order_is_refused(tmp_path, cache):
    folder = models(tmp_path / "m", "albert")
    with pytest.raises(PlanError, match="`sequential` needs layers that run one after the other"):
        prepare(planned(folder, "regmean", "", SEQUENTIAL))


def test_a_nan_is_refused_and_nothing_is_kept(folder, cache):
    path = folder / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFinite):
        prepare(planned(folder, "regmean", "", SEQUENTIAL))
    assert not list(cache.glob("*gram*-*[!k]"))


def test_two_gram_matrices_are_held_at_once_whatever_the_number_of_sources(folder, cache, monkeypatch):
    for label in "cde":
        shutil.copytree(folder / "a", folder / label)
    every = "".join(f"  - {{model: {label}, data: first}}\n" for label in "cde")
    plan = planned(folder, "regmean", "", ("parameters: {weight: 0.5}\n", every + "parameters: {weight: 0.5}\n"))
    known = prepare(plan)
    held, most, matrix = [], [], Prepared.matrix

    def counted(self, *arguments):
        found = matrix(self, *arguments)
        if found is not None:
            held.append(weakref.ref(found.values))
        most.append(sum(each() is not None for each in held))
        return found

    monkeypatch.setattr(Prepared, "matrix", counted)
    with merged_weights(plan, known) as weights:
        weights.raw(plan.job("model.layers.1.mlp.down_proj.weight"))
    assert len(held) >= 5
    assert max(most) == 2


# Networks of an adapter


ADAPTER = """\
import numpy as np
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)])
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def network(config):
    return Network()


def read(path, samples, seed):
    return [{"x": some} for some in torch.from_numpy(np.load(path)[:samples]).float().split(16)]
"""
OF_NETWORKS = """\
merge_method: regmean
models: [{model: n1, data: d1}, {model: n2, data: d2}]
parameters: {sequential: SEQUENTIAL}
calibration:
  data: {d1: {path: d1.npy, samples: 40}, d2: {path: d2.npy, samples: 40}}
  adapter: adapter.py
dtype: float32
"""
LAYERS = ("layers.0", "layers.1", "head")


@pytest.mark.parametrize("sequential", [False, True])
def test_networks_that_only_an_adapter_knows_are_solved_layer_by_layer(tmp_path, cache, sequential):
    """No layer of such a network has a role that is known; all of them are solved, biases averaged."""
    (tmp_path / "adapter.py").write_text(ADAPTER)
    (tmp_path / "r.yaml").write_text(OF_NETWORKS.replace("SEQUENTIAL", str(sequential).lower()))
    weights, data = [], []
    for i in (1, 2):
        random = np.random.default_rng(i)
        shapes = {"layers.0": (8, 4), "layers.1": (8, 8), "head": (3, 8)}
        own = {f"{name}.weight": random.normal(size=shape) for name, shape in shapes.items()}
        own |= {f"{name}.bias": random.normal(size=shape[0]) for name, shape in shapes.items()}
        own = {name: value.astype(np.float32) for name, value in own.items()}
        (tmp_path / f"n{i}").mkdir()
        tensors = {name: torch.from_numpy(value) for name, value in own.items()}
        save_file(tensors, tmp_path / f"n{i}" / "model.safetensors", {"format": "pt"})
        (tmp_path / f"n{i}" / "config.json").write_text("{}")
        data.append(random.normal(size=(40, 4)) * (1.0 + np.arange(4) * i))
        np.save(tmp_path / f"d{i}.npy", data[-1])
        weights.append({name: value.astype(np.float64) for name, value in own.items()})
    run(build(load(tmp_path / "r.yaml")), tmp_path / "out", trust_code=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    inputs = [(x, x) for x in data]  # of the layer: what is measured, and what the merged model makes
    for name in LAYERS:
        grams = [x.T @ x / len(x) for x, _ in inputs]
        matrix = regmean_naively([own[f"{name}.weight"] for own in weights], grams, (1.0, 1.0), 0.9, 1e-6)
        bias = sum(own[f"{name}.bias"] for own in weights) / 2
        np.testing.assert_allclose(found[f"{name}.weight"], matrix, atol=1e-4, rtol=1e-3)
        np.testing.assert_allclose(found[f"{name}.bias"], bias, atol=1e-6)
        own_made = [np.maximum(x @ w[f"{name}.weight"].T + w[f"{name}.bias"], 0) for (x, _), w in zip(inputs, weights)]
        merged_made = [np.maximum(x @ matrix.T + bias, 0) for _, x in inputs]
        made = merged_made if sequential else own_made
        inputs = list(zip(made, merged_made, strict=True))
