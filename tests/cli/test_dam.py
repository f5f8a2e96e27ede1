"""DAM from a recipe to the model folder: every weight is what its coefficients say, entry by entry."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from click.testing import CliRunner
from execute.prepare_models import TRAIN, models, planned
from safetensors.numpy import load_file

from mergetool.cli.group import mergetool

FAMILIES = ["llama", "llama_tied", "gpt2", "mixtral", "mixtral_fused"]
"""As they are, tied, stored as [in, out], experts of their own and stacked ones."""
SOME = "parameters: {weight: 0.5}\n"


@pytest.fixture(scope="module", params=[*((each, "row+column") for each in FAMILIES), ("mixtral_fused", "column")])
def merged(request, tmp_path_factory):
    """The folder of the models, of the merge and of the coefficients; the family and the granularity."""
    name, granularity = request.param
    folder = models(tmp_path_factory.mktemp("dam"), name)
    planned(folder, "dam", TRAIN + "dtype: float32\n", (SOME, f"parameters: {{granularity: {granularity}}}\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETOOL_CACHE", str(folder / "cache"))
        arguments = ["run", str(folder / "merge.yaml"), str(folder / "merged"), "--quiet"]
        result = CliRunner().invoke(mergetool, arguments, prog_name="mergetool", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (facts,) = (folder / "cache" / "facts").glob("coefficients-*")
    return folder, facts, name, granularity


def by_hand(base, sources, values, axes):
    """``W[o, j] = W_0[o, j] + sum_i (c_i[j] + r_i[o]) D_i[o, j]``, a run of the last axis after the other."""
    made = base.astype(np.float64)
    last = base.ndim - 1
    for place in np.ndindex(base.shape[:-1]):
        for i, source in enumerate(sources):
            factor = 0.0
            for v, along in zip(values, axes, strict=True):
                every = v[(i, *(place[axis] for axis in along if axis != last))].astype(np.float64)
                factor = factor + every  # one for each place of the last axis, or one for all
            made[place] += factor * (source[place].astype(np.float64) - base[place].astype(np.float64))
    return made


def test_every_entry_is_weighed_by_its_columns_and_its_rows_coefficient(merged):
    folder, facts, _, granularity = merged
    axes = json.loads((facts / "dam.json").read_text())["axes"]
    values = load_file(facts / "coefficients.safetensors")
    base, first, second, made = (load_file(folder / m / "model.safetensors") for m in ("base", "a", "b", "merged"))
    assert {each.removesuffix(":rows") for each in values} <= set(made) == set(base)
    assert (granularity == "row+column") == any(each.endswith(":rows") for each in values)
    several = [weight for weight in values if made[weight.removesuffix(":rows")].ndim > 1]
    moved = [each for each in several if np.any(values[each] != (0.0 if each.endswith(":rows") else 0.5))]
    assert len(moved) > 0.9 * len(several)
    for weight in made:
        sets = [each for each in (weight, f"{weight}:rows") if each in values]
        own = [values[each] for each in sets] or [np.full(2, 0.5)]
        along = [axes[each] for each in sets] or [()]
        wanted = by_hand(base[weight], (first[weight], second[weight]), own, along)
        np.testing.assert_allclose(made[weight], wanted, rtol=2e-7, atol=1e-8)


def test_columns_are_inputs_and_rows_outputs_however_a_weight_is_stored(merged):
    _, facts, name, granularity = merged
    axes = json.loads((facts / "dam.json").read_text())["axes"]
    weight, columns, rows = {
        "gpt2": ("transformer.h.0.mlp.c_fc.weight", [0], [1]),
        "mixtral": ("model.layers.0.block_sparse_moe.experts.1.w1.weight", [1], [0]),
        "mixtral_fused": ("model.layers.0.mlp.experts.gate_up_proj", [0, 2], [0, 1]),
    }.get(name, ("model.layers.0.mlp.up_proj.weight", [1], [0]))
    assert axes[weight] == columns
    assert axes.get(f"{weight}:rows") == (rows if granularity == "row+column" else None)


def test_the_facts_show_both(merged):
    _, facts, _, granularity = merged
    result = CliRunner().invoke(mergetool, ["facts", "show", str(facts)], prog_name="mergetool")
    assert result.exit_code == 0
    assert ("row_coefficients" in result.output) == (granularity == "row+column")
