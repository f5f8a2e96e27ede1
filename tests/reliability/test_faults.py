"""Whatever the disk does, a run gives the right bytes or our own error, and the next one completes it."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from execute.conftest import contents, fingerprint
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from plan.models import TIES, planned, trio

from mergetool.errors import MergetoolError, RunError
from mergetool.execute import batch, engine, run
from mergetool.execute.staging import JOURNAL, LOCK, aside_path, staging_path
from mergetool.plan import Report
from mergetool.storage import system

from .faults import CALLS, MOVES, Fault, Faults, no_leak, within

MODEL_SCOPE = f"{TIES}  scope: model\n"
OTHER = TIES.replace("density: 0.5", "density: 0.25")
CODES = (
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EMFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTSUP,
    errno.EINVAL,
)
LONGEST = 60.0
"""Seconds after which a run hangs; an undisturbed one takes a tenth of one."""


@dataclass(repr=False)
class Scene:
    """The models, what a run makes of them when nothing disturbs it, and what may stand there before it."""

    models: Path
    sources: dict[str, dict[str, tuple[str, int]]]
    undisturbed: dict[str, bytes]
    other: Path
    half: Path
    totals: dict[str, int]
    numbers: itertools.count[int]

    def merge(self, output: Path, force: bool = False) -> Report:
        """Plan and run, as the command does."""
        plan = planned(self.models, MODEL_SCOPE, shard_size=400, workers=2)
        return run(plan, output, force=force)

    def __repr__(self) -> str:  # an example that fails is shown with it
        return "<the scene>"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))

    def untouched(self) -> bool:
        return self.sources == {name: fingerprint(self.models / name) for name in self.sources}


@pytest.fixture(scope="module", autouse=True)
def several_batches() -> Iterator[None]:
    """A few tensors in each, so that faults meet the middle of one and what lies between two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "BATCH_BYTES", 2_000)
        yield


@pytest.fixture(scope="module")
def scene(several_batches: None, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    home = tmp_path_factory.mktemp("faults")
    models = trio(home / "models")
    sources = {name: fingerprint(models / name) for name in ("base", "a", "b")}
    made = Scene(models, sources, {}, home / "other", home / "half" / ".merged.partial", {}, itertools.count())
    with Faults() as faults:
        made.merge(home / "undisturbed")
    made.undisturbed = contents(home / "undisturbed")
    made.totals = {name: max(faults.totals[name], 1) for name in CALLS}
    run(planned(models, OTHER), made.other)
    middle = made.totals["pwrite"] // 2
    with Faults([Fault("pwrite", middle, errno.ENOSPC, lasting=True)]), pytest.raises(RunError):
        made.merge(home / "half" / "merged")
    return made


def faults_of(call: str, total: int) -> st.SearchStrategy[Fault]:
    """Any fault of one function that is called about so many times."""
    numbers = st.integers(1, total)
    kinds = [st.builds(Fault, st.just(call), numbers, st.sampled_from(CODES), lasting=st.booleans())]
    if call != "close":  # a closed descriptor is closed, interrupted or not
        kinds.append(st.builds(Fault, st.just(call), numbers, st.just(errno.EINTR)))
    if call in MOVES:
        counts = st.integers(0, 40)
        kinds.append(st.builds(Fault, st.just(call), numbers, nbytes=counts))
        kinds.append(
            st.builds(Fault, st.just(call), numbers, st.sampled_from((errno.ENOSPC, errno.EIO)), counts, st.booleans())
        )
    return st.one_of(kinds)


def schedules(totals: dict[str, int], most: int = 3) -> st.SearchStrategy[list[Fault]]:
    """One to three faults of any functions."""
    return st.lists(
        st.sampled_from(CALLS).flatmap(lambda call: faults_of(call, totals[call])),
        min_size=1,
        max_size=most,
        unique_by=lambda fault: (fault.call, fault.number),
    )


BEFORE = st.sampled_from(("nothing", "half done", "another merge"))


def prepared(scene: Scene, before: str) -> Path:
    """An output folder's path, with what an earlier run left there."""
    output = scene.models.parent / f"case{next(scene.numbers)}" / "merged"
    output.parent.mkdir()
    if before == "half done":
        shutil.copytree(scene.half, staging_path(output))
    elif before == "another merge":
        shutil.copytree(scene.other, output)
    return output


def attempt(scene: Scene, output: Path, force: bool) -> MergetoolError | None:
    """Merge; our own error if that failed. Any other is a mistake of ours, and so is a run that hangs."""
    try:
        within(LONGEST, lambda: scene.merge(output, force))
    except MergetoolError as error:
        return error
    return None


def check_what_is_left(scene: Scene, output: Path, before: str) -> None:
    """No folder has the output's name but a complete one: the old, or the new."""
    old = contents(scene.other) if before == "another merge" else None
    if not output.exists():
        assert old is None or contents(aside_path(output)) == old
        return
    left = contents(output)
    if left != old:
        assert left.items() >= scene.undisturbed.items()
        assert left.keys() - scene.undisturbed.keys() <= {JOURNAL, LOCK}


@given(data=st.data(), before=BEFORE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_fails_a_run_gives_the_undisturbed_bytes_or_our_own_error_and_the_next_completes_it(
    scene: Scene, data: st.DataObject, before: str
) -> None:
    schedule = data.draw(schedules(scene.totals))
    output = prepared(scene, before)
    force = before == "another merge"
    with Faults(schedule) as faults:
        stopped = attempt(scene, output, force)
    if stopped is not None:
        event("our own error")
        assert faults.hits, f"failed although nothing did: {stopped}"
        assert stopped.problems
        check_what_is_left(scene, output, before)
    else:
        event("done in spite of it" if faults.hits else "no fault was met")
        assert contents(output) == scene.undisturbed
    within(LONGEST, lambda: scene.merge(output, force))
    assert contents(output) == scene.undisturbed
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    assert scene.untouched()
    shutil.rmtree(output.parent)


@given(data=st.data(), before=BEFORE)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_fails_no_file_is_left_open(scene: Scene, data: st.DataObject, before: str) -> None:
    schedule = data.draw(schedules(scene.totals, 2))
    output = prepared(scene, before)
    with no_leak(), Faults(schedule):
        stopped = attempt(scene, output, force=True)
    event("our own error" if stopped else "done")
    shutil.rmtree(output.parent)


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_short_and_interrupted_calls_alone_never_show(scene: Scene, data: st.DataObject) -> None:
    """Only the end of a file reads as nothing, so a call moves one byte at least."""
    call = st.sampled_from([(name, number) for name in MOVES for number in range(1, min(25, scene.totals[name]) + 1)])
    places = data.draw(st.sets(call, min_size=1, max_size=30))
    schedule = [
        Fault(name, number, nbytes=count) if count else Fault(name, number, errno.EINTR)
        for name, number in sorted(places)
        for count in [data.draw(st.integers(0, 40))]
    ]
    output = prepared(scene, "nothing")
    with Faults(schedule) as faults:
        within(LONGEST, lambda: scene.merge(output))
    assert faults.hits
    assert contents(output) == scene.undisturbed
    shutil.rmtree(output.parent)


@pytest.mark.parametrize("other", ["preadv", "pwrite"])
def test_bytes_whose_sync_failed_are_not_counted_on_even_if_something_else_failed_first(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The page cache may still show what the disk has lost, so no digest would tell."""
    monkeypatch.setattr(engine, "FLUSH_BYTES", 1)
    monkeypatch.setattr(batch, "BATCH_BYTES", 1)
    true, sync = getattr(system, other), system.fsync
    flushing, failed = threading.Event(), threading.Event()
    numbers, failing = itertools.count(1), 1 << 60

    def fsync(fd: int) -> None:
        if threading.current_thread().name.startswith("mergetool-flush") and failing < 1 << 60:
            flushing.set()
            failed.wait(LONGEST)
            time.sleep(0.2)  # the run has stopped by now
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    def call(fd: int, view: memoryview, offset: int) -> int:
        if threading.current_thread().name.startswith("mergetool_") and next(numbers) >= failing:
            flushing.wait(LONGEST)
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(true(fd, view, offset))

    with monkeypatch.context() as patch:
        patch.setattr(system, "fsync", fsync)
        patch.setattr(system, other, call)
        scene.merge(prepared(scene, "nothing"))
        failing, numbers = next(numbers) - 2, itertools.count(1)  # the workers' last but one
        output = prepared(scene, "nothing")
        with pytest.raises(RunError):
            within(LONGEST, lambda: scene.merge(output))
    assert flushing.is_set()
    assert failed.is_set()
    assert scene.merge(output).resumed == 0
    assert contents(output) == scene.undisturbed
