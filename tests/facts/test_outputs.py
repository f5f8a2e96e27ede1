"""What a correction changes in a model of each kind, and what that model's config can hold of it."""

import re
from itertools import groupby

import numpy as np
import pytest
import torch

from mergetool.anatomy import anatomy
from mergetool.facts.biases import SWITCHES
from mergetool.facts.correction import Factors
from mergetool.facts.outputs import CENTRED, edits, outputs

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
VIT = {**SMALL, "image_size": 8, "patch_size": 4}
MOE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}

HEADS = {"bert": "AutoModelForMaskedLM", "modernbert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


def build(model_type, device="meta", **changes):
    """A small model and its config."""
    import transformers

    settings = GPT2 if model_type == "gpt2" else VIT if model_type == "vit" else SMALL
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    head = getattr(transformers, HEADS.get(model_type, "AutoModelForCausalLM"))
    torch.manual_seed(0)
    with torch.device(device):
        return head.from_config(config).eval(), config


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def found(model_type, scope="all", statistic="mean_std", **changes):
    model, config = build(model_type, **changes)
    shapes, config = shapes_of(model), config.to_dict()
    return outputs(anatomy(config, shapes), config, shapes, scope, statistic)


def steps_of(result):
    """The weights whose outputs do not depend on one another, in order."""
    return [[each.weight for each in group] for _, group in groupby(result.outputs, key=lambda output: output.step)]


def endings(result):
    return [re.sub(r".*\.(layers|layer|h)\.", "", output.weight) for output in result.outputs]


# --------------------------------------------------------------------------------------------- what, in which order


def test_a_llama_is_corrected_behind_o_gate_up_and_down_in_the_order_they_are_computed():
    steps = [sorted(name.removeprefix("model.layers.") for name in step) for step in steps_of(found("llama"))]
    assert steps == [
        ["0.self_attn.o_proj.weight"],
        ["0.mlp.gate_proj.weight", "0.mlp.up_proj.weight"],
        ["0.mlp.down_proj.weight"],
        ["1.self_attn.o_proj.weight"],
        ["1.mlp.gate_proj.weight", "1.mlp.up_proj.weight"],
        ["1.mlp.down_proj.weight"],
    ]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gpt2", ["attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]),
        ("bert", ["attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight"]),
        ("vit", ["attention.o_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]),
    ],
)
def test_models_with_biases_hold_everything_as_they_are(model_type, expected):
    result = found(model_type)
    assert endings(result) == [f"{layer}.{name}" for layer in range(2) for name in expected]
    assert all(output.on_disk and output.bias for output in result.outputs)
    assert not result.added
    assert not result.config
    assert not result.unheld


def test_the_axis_of_the_units_is_the_one_that_the_bias_has():
    for model_type in ("gpt2", "bert", "vit", "llama"):
        model, _ = build(model_type)
        shapes = shapes_of(model)
        for output in found(model_type).outputs:
            assert shapes[output.weight][output.axis] == output.units
            if output.on_disk:
                assert shapes[output.bias] == (output.units,)
    assert {output.axis for output in found("gpt2").outputs} == {1}


def test_a_fused_gate_and_up_is_one_output():
    result = found("phi3")
    assert "0.mlp.gate_up_proj.weight" in endings(result)
    assert [output.units for output in result.outputs if "gate_up" in output.weight] == [96, 96]


def test_routed_experts_are_left_alone_and_said_so():
    result = found("mixtral", **MOE)
    assert set(endings(result)) == {"0.self_attn.o_proj.weight", "1.self_attn.o_proj.weight"}
    assert any("Routed experts (4 tensors) are not corrected" in sentence for sentence in result.unheld)


def test_an_encoder_comes_before_its_decoder():
    import transformers

    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
    with torch.device("meta"):
        shapes = shapes_of(transformers.T5ForConditionalGeneration(config))
    result = outputs(anatomy(config.to_dict(), shapes), config.to_dict(), shapes)
    roles = [re.sub(r"block\.0\.layer\.\d\.|\.weight", "", output.weight) for output in result.outputs]
    assert roles == [
        "encoder.SelfAttention.o",
        "encoder.DenseReluDense.wi",
        "encoder.DenseReluDense.wo",
        "decoder.SelfAttention.o",
        "decoder.EncDecAttention.o",
        "decoder.DenseReluDense.wi",
        "decoder.DenseReluDense.wo",
    ]


# ------------------------------------------------------------------------------------------- what a config can hold


def test_a_llama_switches_biases_on_and_then_all_of_them_exist():
    result = found("llama")
    assert result.config == {"attention_bias": True, "mlp_bias": True}
    assert not result.unheld
    assert {re.sub(r".*\.", "", name.removesuffix(".bias")) for name in result.added} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.key)
def test_every_switch_gives_exactly_the_biases_that_transformers_then_reads(switch):
    for model_type in switch.types.split():
        plain, config = build(model_type, **MOE, **{each.key: False for each in SWITCHES})
        shapes = shapes_of(plain)

        result = outputs(anatomy(config.to_dict(), shapes), config.to_dict(), shapes)

        assert result.config[switch.key] is True, model_type
        switched, _ = build(model_type, **{**MOE, **{each.key: False for each in SWITCHES}, **result.config})
        new = {name: shape for name, shape in shapes_of(switched).items() if name not in shapes}
        assert {name: (size,) for name, size in result.added.items()} == new, model_type


def test_biases_that_exist_are_not_added_again():
    result = found("llama", attention_bias=True)
    assert result.config == {"mlp_bias": True}
    assert all(".mlp." in name for name in result.added)
    assert not found("llama", attention_bias=True, mlp_bias=True).added


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_model_without_a_place_keeps_the_scale_and_says_so(model_type):
    result = found(model_type)
    assert not result.added
    assert not result.config
    assert {sentence.partition(":")[0] for sentence in result.unheld} == {
        "attention.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    }
    assert all(f"models of type {model_type} have no bias there (2 tensors" in sentence for sentence in result.unheld)
    changes = edits(
        result, {output.weight: Factors(np.ones(output.units), np.ones(output.units)) for output in result.outputs}
    )
    assert all(name.endswith("weight") for name in changes)


def test_half_a_place_is_used():
    result = found("qwen3")
    assert result.config == {"attention_bias": True}
    assert {sentence.partition(":")[0] for sentence in result.unheld} == {"mlp.gate", "mlp.up", "mlp.down"}


def test_scales_alone_add_no_bias_and_need_no_place():
    for model_type in ("llama", "qwen2"):
        result = found(model_type, statistic="std")
        assert not result.added
        assert not result.config
        assert not result.unheld


# ---------------------------------------------------------------------------------------- the final representation


@pytest.mark.parametrize(
    ("model_type", "weight", "held"),
    [
        ("llama", "model.norm.weight", False),
        ("gpt2", "transformer.ln_f.weight", True),
        ("vit", "vit.layernorm.weight", True),
        ("bert", "bert.encoder.layer.1.output.LayerNorm.weight", True),
        ("gemma2", "model.norm.weight", False),
        ("modernbert", "model.final_norm.weight", False),
    ],
)
def test_the_final_representation_is_what_the_last_norm_gives(model_type, weight, held):
    result = found(model_type, "output")
    (output,) = result.outputs
    assert output.weight == weight
    assert bool(output.bias) == held
    assert bool(result.unheld) != held
    assert output.centred == (model_type in CENTRED.split())


def test_a_classifier_without_norms_is_corrected_in_its_head():
    shapes = {"layers.0.weight": (8, 4), "layers.0.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}
    result = outputs(anatomy({"model_type": "mlp"}, shapes), {"model_type": "mlp"}, shapes, "output")
    (output,) = result.outputs
    assert (output.weight, output.axis, output.units, output.bias) == ("head.weight", 1, 8, "head.bias")
    assert output.side == "input"


def test_a_plain_network_is_corrected_behind_every_layer_but_its_head():
    shapes = {
        f"layers.{at}.{name}": (8, 8)[: 2 if name == "weight" else 1] for at in range(3) for name in ("weight", "bias")
    } | {"head.weight": (3, 8), "head.bias": (3,)}
    result = outputs(anatomy({"model_type": "mlp"}, shapes), {"model_type": "mlp"}, shapes)
    assert steps_of(result) == [[f"layers.{at}.weight"] for at in range(3)]
    assert not result.unheld


def test_convolutions_before_batch_norms_are_left_to_them():
    shapes = {
        "conv1.weight": (8, 1, 3, 3),
        "bn1.weight": (8,),
        "bn1.bias": (8,),
        "bn1.running_mean": (8,),
        "bn1.running_var": (8,),
        "hidden.weight": (6, 8),
        "hidden.bias": (6,),
        "classifier.weight": (3, 6),
    }
    result = outputs(anatomy({}, shapes), {}, shapes)
    assert [output.weight for output in result.outputs] == ["hidden.weight"]
    assert result.batch_norms == ("bn1",)


def test_a_model_of_unknown_names_is_not_corrected_and_said_so():
    result = outputs(anatomy({}, {"a": (3,)}), {}, {"a": (3,)})
    assert not result.outputs
    assert "Nothing is corrected" in result.unheld[0]


# --------------------------------------------------------------------------------------------------------- the edits


def factors_for(result):
    draw = np.random.default_rng(0)
    return {
        output.weight: Factors(np.exp(draw.normal(size=output.units) / 4), draw.normal(size=output.units) / 4)
        for output in result.outputs
    }


def edited(model, config, result, corrections):
    """The corrected model as transformers builds it from the edited tensors and the changed config."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors |= {name: np.zeros(size) for name, size in result.added.items()}
    changes = edits(result, corrections, tensors)
    assert set(changes) <= set(tensors)
    tensors = {name: changes[name](tensor) if name in changes else tensor for name, tensor in tensors.items()}
    larger = type(model)(type(config)(**{**config.to_dict(), **result.config})).double().eval()
    larger.load_state_dict({name: torch.from_numpy(np.asarray(tensor)) for name, tensor in tensors.items()})
    return larger


def watched(model, module):
    """What a module gives, while the model runs on the same tokens or pixels."""
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda *call: seen.append(call[2]))
    if hasattr(model.config, "image_size"):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    else:
        x = torch.arange(16).view(2, 8)
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].numpy()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "vit", "arcee"])
@pytest.mark.parametrize("scope", ["all", "output"])
def test_the_first_edited_output_is_scaled_and_shifted_in_the_real_model(model_type, scope):
    model, config = build(model_type, device="cpu")
    model = model.double()
    shapes = shapes_of(model)
    result = outputs(anatomy(config.to_dict(), shapes), config.to_dict(), shapes, scope)
    corrections = factors_for(result)
    first = result.outputs[0]
    change = corrections[first.weight]

    after = edited(model, config, result, corrections)

    module = first.weight.removesuffix(".weight")
    expected = watched(model, module) * change.scale + (change.shift if first.bias else 0.0)
    np.testing.assert_allclose(watched(after, module), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_around_one_is_scaled_around_one():
    model, config = build("gemma2", device="cpu")
    model = model.double()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    shapes = shapes_of(model)
    result = outputs(anatomy(config.to_dict(), shapes), config.to_dict(), shapes, "output")
    corrections = factors_for(result)

    after = edited(model, config, result, corrections)

    expected = watched(model, "model.norm") * corrections["model.norm.weight"].scale
    np.testing.assert_allclose(watched(after, "model.norm"), expected, rtol=1e-5, atol=1e-6)


def test_a_head_reads_the_corrected_representation():
    draw = np.random.default_rng(0)
    tensors = {
        "layers.0.weight": draw.normal(size=(8, 4)),
        "head.weight": draw.normal(size=(3, 8)),
        "head.bias": draw.normal(size=3),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    result = outputs(anatomy({}, shapes), {}, shapes, "output")
    corrections = factors_for(result)
    (change,) = corrections.values()
    z = draw.normal(size=(5, 8))

    found = edits(result, corrections, tensors)

    head, bias = found["head.weight"](tensors["head.weight"]), found["head.bias"](tensors["head.bias"])
    expected = (z * change.scale + change.shift) @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(z @ head.T + bias, expected, rtol=1e-12)


def test_outputs_without_factors_are_left_alone():
    result = found("llama")
    one = result.outputs[0].weight
    only = {one: factors_for(result)[one]}
    assert set(edits(result, only)) == {one, one.removesuffix("weight") + "bias"}
