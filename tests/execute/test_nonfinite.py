"""NaNs and infinities stop a run, named by where they are and how many; a user may want them all the same."""

from __future__ import annotations

import numpy as np
import pytest
from plan.models import TIES, bits, llama, planned, save

from execute.conftest import contents, tensors
from mergetool.errors import NonFinite
from mergetool.execute import run
from mergetool.execute.staging import staging_path
from mergetool.storage import system

Q = "model.layers.0.self_attn.q_proj.weight"
PLAIN = TIES.replace("[0.25, 1]", "1")
BAD = {"nan": np.nan, "plus infinity": np.inf, "minus infinity": -np.inf}


def spoil(folder, source, places, value, dtype="BF16"):
    """A model of which some coordinates of one tensor are not finite."""
    held = llama(("base", "a", "b").index(source), dtype)
    raw = held[Q][1].reshape(-1).copy()
    raw[places] = bits([value], dtype)[0]
    save(folder / source, held | {Q: (dtype, raw.reshape(8, 8))})


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_a_source_that_is_not_finite_is_named_and_counted(folder, tmp_path, source, value):
    spoil(folder, source, [3, 60], value)
    with pytest.raises(NonFinite) as stopped:
        run(planned(folder, PLAIN), tmp_path / "merged")
    (problem,) = stopped.value.problems
    assert f"`{Q}` has values that are NaN or infinite: 2 in {source}" in problem.what
    assert "--allow-nonfinite" in problem.fix
    assert stopped.value.exit_code == 4
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_every_dtype_is_looked_at(folder, tmp_path, dtype):
    spoil(folder, "a", [0], np.nan, dtype)
    with pytest.raises(NonFinite, match="1 in a"):
        run(planned(folder, PLAIN), tmp_path / "merged")


def test_each_source_that_is_not_finite_is_counted_for_itself(folder, tmp_path):
    spoil(folder, "a", [1, 2, 3], np.nan)
    spoil(folder, "b", [3, 4], np.inf)
    with pytest.raises(NonFinite, match="3 in a, 2 in b"):
        run(planned(folder, PLAIN), tmp_path / "merged")


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_numbers_that_the_trim_leaves_out_are_looked_at_all_the_same(folder, tmp_path, device):
    spoil(folder, "b", [5], np.nan)
    text = PLAIN.replace("density: 0.5", "density: 0.0")
    with pytest.raises(NonFinite, match="1 in b"):
        run(planned(folder, text), tmp_path / "merged", device=device)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_asked_to_a_run_writes_what_is_not_finite_and_says_so(folder, tmp_path, value, scope):
    spoil(folder, "a", [3, 60], value)
    text = f"merge_method: linear\n{PLAIN.split(chr(10), 1)[1]}".replace("  density: 0.5", "  normalize: true")
    text = text if scope == "tensor" else f"{PLAIN}  scope: model\n"
    report = run(planned(folder, text), tmp_path / "merged", allow_nonfinite=True)
    assert report.nonfinite == {Q: 2}
    assert any(Q in note and "2 in a" in note for note in report.notes)
    raw = tensors(tmp_path / "merged")[Q][1].reshape(-1)
    finite = (raw & 0x7F80) != 0x7F80
    assert finite.sum() >= 62
    if scope == "tensor":
        assert not finite[3]
        assert not finite[60]


def test_a_result_that_overflows_its_dtype_is_the_results_own_fault(tmp_path):
    for name, value in (("base", 0.0), ("a", 60000.0), ("b", 60000.0)):
        save(tmp_path / name, {"w": ("F32", np.array([value, 1.0], np.float32))})
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    with pytest.raises(NonFinite, match=r"`w`.*: 1 in result"):
        run(planned(tmp_path, f"out_dtype: float16\n{text}"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    run(planned(tmp_path, f"out_dtype: bfloat16\n{text}"), tmp_path / "merged")
    report = run(planned(tmp_path, f"out_dtype: float16\n{text}"), tmp_path / "half", allow_nonfinite=True)
    assert report.nonfinite == {"w": 1}
    assert tensors(tmp_path / "half")["w"][1].tolist() == [0x7C00, 0x3C00]


@pytest.mark.parametrize(("value", "fits"), [(65519.99, True), (65520.0, False), (-65519.99, True), (-65520.0, False)])
def test_what_rounds_to_the_largest_number_still_fits(tmp_path, value, fits):
    save(tmp_path / "a", {"w": ("F64", np.array([value]))})
    plan = planned(tmp_path, "merge_method: passthrough\nout_dtype: float16\nmodels: [{model: a}]\n")
    if fits:
        run(plan, tmp_path / "merged")
        assert abs(tensors(tmp_path / "merged")["w"][1].view(np.float16)[0]) == 65504
    else:
        with pytest.raises(NonFinite, match="1 in result"):
            run(plan, tmp_path / "merged")


def test_a_kept_tensor_is_looked_at_too(folder, tmp_path):
    spoil(folder, "a", [0], np.nan)
    with pytest.raises(NonFinite, match="1 in a"):
        run(planned(folder, f"{PLAIN}rules: [{{where: {{layers: 0}}, keep: a}}]\n"), tmp_path / "merged")


def test_a_tensor_that_a_rule_replaces_may_hold_anything(folder, tmp_path):
    spoil(folder, "a", [0], np.nan)
    run(planned(folder, f"{PLAIN}rules: [{{where: {{layers: 0}}, keep: b}}]\n"), tmp_path / "merged")


def test_what_was_done_before_is_kept_and_the_source_can_be_mended(folder, tmp_path):
    spoil(folder, "a", [0], np.nan)
    with pytest.raises(NonFinite) as stopped:
        run(planned(folder, PLAIN, workers=1), tmp_path / "merged")
    assert staging_path(tmp_path / "merged").name in stopped.value.problems[0].fix
    save(folder / "a", llama(1))
    run(planned(folder, PLAIN), tmp_path / "merged")
    run(planned(folder, PLAIN), tmp_path / "undisturbed")
    assert contents(tmp_path / "merged") == contents(tmp_path / "undisturbed")


def test_leave_to_write_them_is_not_inherited_from_an_interrupted_run(folder, tmp_path, monkeypatch):
    spoil(folder, "a", [0], np.nan)
    plan = planned(folder, PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", _refuse)
        with pytest.raises(Exception, match="full"):
            run(plan, tmp_path / "merged", allow_nonfinite=True)
    with pytest.raises(NonFinite, match="1 in a"):
        run(plan, tmp_path / "merged")
    assert run(plan, tmp_path / "merged", allow_nonfinite=True).nonfinite == {Q: 1}


def _refuse(*_):
    raise OSError(28, "No space left on device")


def test_a_finished_folder_with_what_is_not_finite_is_right_only_for_who_allows_it(folder, tmp_path):
    spoil(folder, "a", [3, 60], np.nan)
    run(planned(folder, PLAIN), tmp_path / "merged", allow_nonfinite=True)
    made = contents(tmp_path / "merged")
    with pytest.raises(NonFinite) as stopped:
        run(planned(folder, PLAIN), tmp_path / "merged")
    (problem,) = stopped.value.problems
    assert problem.what.startswith(f"was made with --allow-nonfinite: {Q} is not finite: 2 in a")
    assert "--allow-nonfinite" in problem.fix
    assert run(planned(folder, PLAIN), tmp_path / "merged", allow_nonfinite=True).unchanged
    assert contents(tmp_path / "merged") == made
