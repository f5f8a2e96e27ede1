"""Every scheme in the wild is recognised; plain checkpoints are not."""

from __future__ import annotations

import pytest

from mergetool.checkpoint.quantized import quantization


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, [], "fp8, e4m3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "gptq, 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, [], "mxfp4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, [], "4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, [], "bitsandbytes"),
        ({}, ["a.weight", "a.weight_scale_inv"], "FP8 in blocks"),
        ({}, ["a.weight_packed", "a.weight_scale"], "compressed-tensors"),
        ({}, ["a.qweight", "a.qzeros"], "GPTQ"),
        ({}, ["a.weight", "a.weight.absmax"], "bitsandbytes"),
        ({}, ["a.weight", "a.SCB"], "bitsandbytes, 8"),
        ({}, ["e.gate_up_proj_blocks", "e.gate_up_proj_scales"], "MXFP4"),
        ({}, ["a.weight", "a.weight_scale"], "FP8"),
        ({}, ["a.weight", "a.scales", "a.biases"], "MLX"),
    ],
)
def test_a_scheme_is_recognised(config, names, expected):
    assert quantization(config, names).startswith(expected)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["a.weight", "a.bias", "norm.scales", "conv_blocks", "layer_scale"]),
        ({"quantization_config": None, "text_config": {}}, ["a.weight"]),
        (
            {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}},
            ["a.weight"],
        ),
    ],
)
def test_a_plain_checkpoint_is_none(config, names):
    assert quantization(config, names) is None
