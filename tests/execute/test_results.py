"""A whole recipe gives what the oracles of its methods give, rounded once."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from plan.models import TIES, bits, llama, normal, planned, save, trio

from execute.conftest import tensors
from mergetool import merge_tensors
from mergetool.execute import compute, run
from mergetool.kernels import random
from mergetool.kernels.rounding import FLOAT8_VALUES

ROUND = {
    "BF16": oracles.round_to_bfloat16,
    "F16": oracles.round_to_float16,
    "F32": lambda values: oracles.round_to_float32(values).astype(np.uint32).view(np.float32),
    "F64": lambda values: values,
}


def wide(tensor):
    """A raw tensor in float64."""
    dtype, raw = tensor
    if dtype in FLOAT8_VALUES:
        return FLOAT8_VALUES[dtype][raw]
    by_dtype = {"BF16": oracles.widen_bfloat16, "F16": oracles.widen_float16}
    return by_dtype.get(dtype, lambda values: np.asarray(values, np.float64))(raw)


def same(found, dtype, expected):
    """Whether a merged tensor is the oracle's, to the last bit."""
    assert found[0] == dtype
    np.testing.assert_array_equal(found[1], ROUND[dtype](expected))


RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.75
      density: [{filter: mlp, value: 0.2}, {filter: "*q_proj*", value: [0.4, 0.9]}, {value: 0.5}]
  - model: b
    parameters:
      weight: [0.25, 1]
parameters:
  density: 0.6
  lambda: 0.9
rules:
  - where: {part: norm}
    keep: b
  - where: {part: embedding}
    merge_method: linear
    parameters: {weight: 2, normalize: true}
  - where: {layers: 0, part: attention}
    merge_method: task_arithmetic
    models:
      - model: a
        parameters: {weight: -0.5}
  - where: {layers: -1, part: mlp}
    parameters: {density: 0.35, normalize: false}
"""


def expected(name, base, a, b):
    """The recipe above, read by a person."""
    layer = int(name.split(".")[2]) if ".layers." in name else None
    depth = {None: 1.0, 0: 0.0, 1: 0.5, 2: 1.0}[layer] if "embed" not in name else 0.0
    weight_b = 0.25 + 0.75 * depth
    if "norm" in name:
        return b
    if "embed" in name:
        return oracles.linear([a, b], [2, 2])
    if layer == 0 and "self_attn" in name:
        return oracles.task_arithmetic(base, [a, b], [-0.5, 0.25], 0.9)
    if layer == 2 and "mlp" in name:
        return oracles.ties(base, [a, b], [0.75, weight_b], [0.35, 0.35], 0.9, normalize=False)
    density_a = 0.2 if "mlp" in name else 0.4 + 0.5 * depth if "q_proj" in name else 0.5
    return oracles.ties(base, [a, b], [0.75, weight_b], [density_a, 0.6], 0.9)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_gradients_filters_and_rules_give_what_a_person_reads_in_them(tmp_path, dtype):
    trio(tmp_path, dtype, layers=3)
    run(planned(tmp_path, RECIPE), tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    sources = [tensors(tmp_path / name) for name in ("base", "a", "b")]
    assert found.keys() == sources[0].keys()
    for name in found:
        same(found[name], dtype, expected(name, *(wide(source[name]) for source in sources)))


def mixed(folder):
    """A base of four dtypes and sources of others."""
    dtypes = {"base": ("BF16", "F16", "F32", "F64"), "a": ("F32", "F8_E4M3", "F64", "BF16")}
    dtypes["b"] = ("F16", "F8_E5M2", "BF16", "F32")
    for seed, (name, own) in enumerate(dtypes.items()):
        save(folder / name, {f"w{i}": (dtype, normal((5, 7), dtype, seed, i)) for i, dtype in enumerate(own)})
    return folder


@pytest.mark.parametrize("out", [None, "bfloat16", "float16", "float32", "float64"])
def test_sources_of_any_dtypes_are_widened_exactly_and_rounded_once(tmp_path, out):
    mixed(tmp_path)
    text = TIES if out is None else f"out_dtype: {out}\n{TIES}"
    run(planned(tmp_path, text), tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    base, a, b = (tensors(tmp_path / name) for name in ("base", "a", "b"))
    short = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
    for name in base:
        merged = oracles.ties(wide(base[name]), [wide(a[name]), wide(b[name])], [1, 1], 0.5)
        # Their names tell of no layers, so that all lie at the end of the gradient.
        same(found[name], short[out] if out else base[name][0], merged)


@pytest.mark.parametrize("density", [(0.3, 0.3), (0.1, 0.7), (0.0, 0.5), (1.0, 0.25), (1e-9, 1.0)])
def test_ties_over_the_whole_model_has_one_cut_for_each_source(shared, tmp_path, density):
    text = TIES.replace("weight: 1}", f"weight: 1, density: {density[0]}}}")
    text = text.replace("[0.25, 1]", f"0.5, density: {density[1]}") + "  scope: model\n"
    run(planned(shared, text), tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    models = [{n: wide(t) for n, t in tensors(shared / name).items()} for name in ("base", "a", "b")]
    merged = oracles.ties_model(models[0], models[1:], [1, 0.5], density)
    for name, tensor in found.items():
        same(tensor, "BF16", merged[name])


def test_a_model_with_a_tied_head_counts_it_once_in_the_cut(tmp_path):
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    models = []
    for seed, name in enumerate(("base", "a", "b")):
        held = llama(seed)
        held[head] = held[embedding]  # stored twice, one weight
        save(tmp_path / name, held, tie_word_embeddings=True)
        models.append({n: wide(t) for n, t in held.items()})
    text = TIES.replace("[0.25, 1]", "1") + "  scope: model\n"
    run(planned(tmp_path, text), tmp_path / "merged")
    merged = oracles.ties_model(models[0], models[1:], 1, 0.5, tied={head: embedding})
    found = tensors(tmp_path / "merged")
    assert found.keys() == merged.keys() - {head}
    for name, tensor in found.items():
        same(tensor, "BF16", merged[name])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_walks_from_the_base_to_the_other(shared, tmp_path, t):
    text = f"merge_method: slerp\nbase_model: base\nmodels: [{{model: base}}, {{model: a}}]\nparameters: {{t: {t}}}\n"
    run(planned(shared, f"out_dtype: float32\n{text}"), tmp_path / "merged")
    base, a, found = (tensors(folder) for folder in (shared / "base", shared / "a", tmp_path / "merged"))
    for name, (_, values) in found.items():
        merged = oracles.slerp(wide(base[name]), wide(a[name]), t)
        np.testing.assert_allclose(values, merged, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rescale", ["true", "l1"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_each_mask_from_seed_source_and_tensor(shared, tmp_path, method, rescale):
    text = f"merge_method: {method}\nseed: 7\nout_dtype: float32\n{TIES.split(chr(10), 1)[1]}  rescale: {rescale}\n"
    run(planned(shared, text), tmp_path / "merged")
    base, a, b = ({n: wide(t) for n, t in tensors(shared / name).items()} for name in ("base", "a", "b"))
    for name, (_, found) in tensors(tmp_path / "merged").items():
        masks = [mask(random.key(7, label, name), base[name].shape, 0.5) for label in ("a", "b")]
        weight_b = 0.25 if "embed" in name or ".layers.0." in name else 1
        rule = "l1" if rescale == "l1" else True
        merged = oracles.dare(
            base[name], [a[name], b[name]], masks, [1, weight_b], 0.5, rule, consensus=method == "dare_ties"
        )
        np.testing.assert_allclose(found, merged, rtol=2e-7, atol=1e-12)


def mask(key, shape, density):
    """The coordinates that a key keeps."""
    word = 0xFFFFFFFF
    count = int(np.prod(shape))
    draws = [oracles.philox2x32((k // 2 & word, key >> 32), key & word)[k % 2] for k in range(count)]
    return np.array([draw * 2.0**-32 < density for draw in draws]).reshape(shape)


def test_a_run_gives_what_merge_tensors_gives_in_memory(tmp_path):
    trio(tmp_path, "F32")
    text = TIES.replace("[0.25, 1]", "0.5")
    run(planned(tmp_path, text), tmp_path / "merged")
    base, a, b = (tensors(tmp_path / name) for name in ("base", "a", "b"))
    for name, (_, found) in tensors(tmp_path / "merged").items():
        inputs = [a[name][1], b[name][1]]
        alone = merge_tensors("ties", inputs, base[name][1], weight=[1.0, 0.5], density=0.5)
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize(
    "text",
    [RECIPE, f"{TIES}  scope: model\n", TIES.replace("ties", "dare_ties") + "  rescale: l1\n"],
    ids=["rules", "whole model", "random"],
)
def test_each_job_computed_alone_gives_the_bytes_that_a_run_writes(tmp_path, text):
    trio(tmp_path, layers=3)
    for name in ("base", "a", "b"):
        held = tensors(tmp_path / name) | {
            "steps": ("I64", np.arange(4)),
            "empty": ("BF16", bits(np.ones((0, 3)), "BF16")),
        }
        save(tmp_path / name, held | {"scalar": ("BF16", normal((), "BF16", 9, len(name)))})
    plan = planned(tmp_path, text)
    run(plan, tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    assert len(plan.jobs) == len(found) > 10
    for job in plan.jobs:
        made = compute(plan, job)
        assert made.tobytes() == found[job.name][1].tobytes(), job.name
        assert made.dtype == job.dtype.storage


def test_a_method_without_a_change_gives_the_source_bit_by_bit(shared, tmp_path):
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    run(planned(shared, text), tmp_path / "merged")
    assert (
        (tmp_path / "merged" / "model.safetensors")
        .read_bytes()
        .endswith((shared / "a" / "model.safetensors").read_bytes()[-1000:])
    )
    for name, tensor in tensors(shared / "a").items():
        np.testing.assert_array_equal(tensors(tmp_path / "merged")[name][1], tensor[1])
