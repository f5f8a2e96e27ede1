"""What holds no floating numbers is copied byte for byte, and told where sources disagree."""

from __future__ import annotations

import numpy as np
import pytest
from plan.models import TIES, bits, llama, planned, save

from execute.conftest import tensors
from mergetool.execute import run

KINDS = {
    "I64": np.array([[-(2**63), 2**63 - 1], [0, -1]]),
    "I32": np.array([-(2**31), 5], np.int32),
    "U8": np.arange(256).astype(np.uint8),
    "BOOL": np.array([1, 0, 1], np.uint8),
    "U64": np.array([2**64 - 1], np.uint64),
    "C64": np.array([1 + 2j, np.nan * 1j], np.complex64),
}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("asked", ["", "out_dtype: float16\n"])
def test_other_dtypes_are_copied_as_they_are(tmp_path, dtype, asked):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama(seed) | {"buffer": (dtype, KINDS[dtype])})
    report = run(planned(tmp_path, asked + TIES), tmp_path / "merged")
    found, raw = tensors(tmp_path / "merged")["buffer"]
    assert found == dtype
    assert raw.tobytes() == KINDS[dtype].tobytes()
    assert not [note for note in report.notes if "buffer" in note]


@pytest.mark.parametrize(
    "other",
    [("I64", np.array([1, 2, 4])), ("I64", np.array([1, 2])), ("I32", np.array([1, 2, 3], np.int32))],
    ids=["value", "shape", "dtype"],
)
def test_sources_whose_integers_differ_from_the_lenders_are_named(tmp_path, other):
    steps = ("I64", np.array([1, 2, 3]))
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama(seed) | {"steps": other if name == "b" else steps})
    report = run(planned(tmp_path), tmp_path / "merged")
    assert tensors(tmp_path / "merged")["steps"][1].tolist() == [1, 2, 3]
    (note,) = [note for note in report.notes if "steps" in note]
    assert "differs in b;" in note
    assert run(planned(tmp_path), tmp_path / "merged").notes == report.notes


def test_a_kept_tensor_is_the_sources_in_the_dtype_asked_for(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama(seed, "F32"))
    run(
        planned(tmp_path, f"out_dtype: bfloat16\n{TIES}rules: [{{where: {{part: norm}}, keep: a}}]\n"),
        tmp_path / "merged",
    )
    kept, found = tensors(tmp_path / "a"), tensors(tmp_path / "merged")
    for name, (dtype, raw) in found.items():
        assert dtype == "BF16"
        if "norm" in name:
            values = np.asarray(raw, np.uint32) << 16
            assert np.abs(values.view(np.float32) / kept[name][1] - 1).max() <= 2**-8


def test_empty_tensors_and_scalars_pass(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        held = {"empty": ("BF16", bits(np.ones((0, 4)), "BF16")), "one": ("F32", np.array(2.0 + seed, np.float32))}
        save(tmp_path / name, llama(seed) | held | {"none": ("I64", np.zeros(0, np.int64))})
    report = run(planned(tmp_path, TIES.replace("[0.25, 1]", "1")), tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    assert found["empty"][1].shape == (0, 4)
    assert found["one"][1].item() == 3.5
    assert report.digests["empty"] == report.digests["none"]
