"""Small jobs that go to a worker together: what lies side by side is one call, and every byte is where it belongs."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from plan.models import TIES, llama, normal, planned, save

from execute.conftest import contents
from mergetool.errors import NonFinite, RunError
from mergetool.execute import batch, run
from mergetool.execute.batch import batches, spans
from mergetool.execute.job import Outcome
from mergetool.execute.journal import JOURNAL, Journal, read_journal
from mergetool.execute.outlet import Joined, Outlet
from mergetool.execute.sources import open_sources
from mergetool.execute.tiles import Stopped
from mergetool.storage import system
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.writer import Writer, shard


def read(source, name, start, nbytes, file="f"):
    return SimpleNamespace(source=source, tensor=SimpleNamespace(name=name, file=file, start=start, nbytes=nbytes))


def job(*reads, compare=()):
    return SimpleNamespace(reads=reads, compare=compare)


def found(*jobs):
    return {
        (span.source, span.file, span.start, span.stop, "".join(each.tensor.name for each in span.reads))
        for span in spans(jobs)
    }


def test_a_gap_or_another_file_or_source_begins_another_span_and_the_order_of_jobs_does_not_matter():
    a, b, gap = read(0, "a", 100, 8), read(0, "b", 108, 4), read(0, "c", 113, 7)
    elsewhere, other = read(0, "d", 112, 1, "g"), read(1, "e", 112, 1)
    expected = {(0, "f", 100, 112, "ab"), (0, "f", 113, 120, "c"), (0, "g", 112, 113, "d"), (1, "f", 112, 113, "e")}
    assert found(job(a), job(b, gap), job(elsewhere, other)) == expected
    assert found(job(gap), job(b, compare=(other, elsewhere)), job(a)) == expected


def test_a_tensor_that_is_read_twice_or_has_no_bytes_is_in_its_span():
    a, none, b = read(0, "a", 10, 6), read(0, "n", 16, 0), read(0, "b", 16, 2)
    assert {(*each[:4], "".join(sorted(each[4]))) for each in found(job(a), job(b, a), job(none))} == {
        (0, "f", 10, 18, "aabn")
    }


@pytest.mark.parametrize("nbytes", [1, 300, 1 << 20])
def test_every_job_is_in_one_batch_in_its_order(shared, monkeypatch, nbytes):
    monkeypatch.setattr(batch, "BATCH_BYTES", nbytes)
    jobs = planned(shared, TIES).jobs
    made = list(batches(jobs, lambda job: job is jobs[2]))
    assert [job for each in made for job in each] == list(jobs)
    assert all(sum(job.bytes_read for job in each) <= nbytes or len(each) == 1 for each in made)
    assert [jobs[2]] in made


def test_what_is_not_finite_is_named_and_the_rest_of_its_batch_is_kept(folder, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    held = llama(1)
    spoilt = held[name][1].copy()
    spoilt[3, 3] = 0x7FC0
    save(folder / "a", held | {name: ("BF16", spoilt)})
    plan = planned(folder, TIES)
    assert len(list(batches(plan.jobs, lambda job: False))) == 1
    with pytest.raises(NonFinite, match=f"`{name}` has values that are NaN or infinite: 1 in a"):
        run(plan, tmp_path / "merged")
    assert run(plan, tmp_path / "merged", allow_nonfinite=True).resumed == len(plan.jobs) - 1


def test_the_lines_of_a_batch_are_one_write_and_one_that_is_cut_short_is_dropped(tmp_path, monkeypatch):
    outcomes = {f"t{i}": Outcome(f"{i:032x}", {"a": i} if i else {}, ("b",)) for i in range(5)}
    true, written = system.pwrite, []

    def pwrite(fd, view, offset):
        written.append(len(view))
        return true(fd, view, offset)

    monkeypatch.setattr(system, "pwrite", pwrite)
    journal = Journal(tmp_path / JOURNAL, "plan", None)
    journal.note(outcomes)
    assert len(written) == 2
    assert read_journal(journal.path).done == outcomes
    os.truncate(journal.path, written[0])  # by whoever does not trust it
    journal.note({"t1": outcomes["t1"]})
    journal.note(outcomes)
    journal.close()
    os.truncate(journal.path, sum(written) - written[1] - 1)
    assert list(read_journal(journal.path).done) == ["t1", "t0", "t2", "t3"]


RECIPE = """\
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {weight: [1, 0.5], density: 0.4}
rules: [{where: {layers: 1}, keep: b}]
"""


def mixed(seed):
    """Tensors of any length and several dtypes, some copied, so that results begin and end anywhere in a page."""
    draw = random.Random(0)
    held = {}
    for i in range(60):
        name, size = (
            f"model.layers.{i // 20}.mlp.part{i}.weight",
            draw.choice([1, 3, 8, 700, 4096, draw.randrange(80_000)]),
        )
        dtype = draw.choice(["BF16", "BF16", "BF16", "F32", "F16", "I64", "U8"])
        values = np.arange(size) % 251 if dtype in ("I64", "U8") else normal((size,), dtype, seed, i)
        held[name] = dtype, values.astype(DTYPES[dtype].storage)
    return held


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The base in several files, one source in the opposite order, one in yet another and in files of its own."""
    folder = tmp_path_factory.mktemp("mixed")
    save(folder / "base", mixed(0), 500_000)
    save(folder / "a", dict(reversed(mixed(1).items())))
    shuffled = list(mixed(2).items())
    random.Random(1).shuffle(shuffled)
    save(folder / "b", dict(shuffled), 300_000)
    return folder


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """What comes of it when every tensor goes its own way."""
    output = tmp_path_factory.mktemp("alone") / "merged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "BATCH_BYTES", 1)
        run(planned(models, RECIPE, shard_size=300_000), output)
    return contents(output)


@pytest.mark.parametrize("nbytes", [10_000, 300_000, 4 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_whatever_is_in_a_batch_its_bytes_are_where_they_belong(
    models, expected, tmp_path, monkeypatch, nbytes, workers
):
    monkeypatch.setattr(batch, "BATCH_BYTES", nbytes)
    plan = planned(models, RECIPE, shard_size=300_000, workers=workers)
    assert len(plan.shards) > 2
    run(plan, tmp_path / "merged")
    assert contents(tmp_path / "merged") == expected


def test_what_an_earlier_run_has_done_is_a_gap_in_a_batch(models, expected, tmp_path, monkeypatch):
    plan = planned(models, RECIPE, shard_size=300_000)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[run.__module__], "publish", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "merged")
    journal = tmp_path / ".merged.partial" / JOURNAL
    head, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([head, *lines[::3]]))
    left = {json.loads(line)["tensor"] for line in lines} - {json.loads(line)["tensor"] for line in lines[::3]}
    for part in plan.shards:  # whatever is not made again is found to be missing
        with (tmp_path / ".merged.partial" / part.file).open("r+b") as file:
            for entry in part.header.entries.values():
                if entry.name in left:
                    file.seek(entry.start)
                    file.write(bytes(entry.stop - entry.start))
    assert run(plan, tmp_path / "merged").resumed == len(lines[::3])
    assert contents(tmp_path / "merged") == expected


def _killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_batch_that_fails_in_the_middle_is_made_again(models, expected, tmp_path, monkeypatch, name, failure):
    monkeypatch.setattr(batch, "BATCH_BYTES", 300_000)
    plan = planned(models, RECIPE, shard_size=300_000, workers=2)
    true, total = getattr(system, name), 0

    def count(*arguments):
        nonlocal total
        total += 1
        if total == number:
            raise failure
        return true(*arguments)

    number = 0
    monkeypatch.setattr(system, name, count)
    run(plan, tmp_path / "whole")
    assert contents(tmp_path / "whole") == expected
    for at in range(2, total, 1 + total // 9):
        output, total, number = tmp_path / f"merged{at}", 0, at
        with pytest.raises((RunError, KeyboardInterrupt)):
            run(plan, output)
        assert not output.exists()
        number = 0
        run(plan, output)
        assert contents(output) == expected, at


def test_results_side_by_side_are_one_write(models, tmp_path, monkeypatch):
    plan = planned(models, RECIPE, shard_size=300_000)
    true, written = Writer.write, []
    monkeypatch.setattr(Writer, "write", lambda *given: (written.append(given[1].nbytes), true(*given)))
    run(plan, tmp_path / "merged")
    assert sum(written) == sum(job.bytes_written for job in plan.jobs)
    assert len(written) < len(plan.jobs) / 2  # some end where wider numbers cannot begin


def test_a_result_that_does_not_follow_or_fit_begins_another_buffer(tmp_path):
    (part,) = shard([("t", DTYPES["U8"], (100_000,))], 1 << 30)
    start = part.header.data_start
    pieces = [(0, 16, 8), (16, 41, 1), (57, 5, 1), (62, 8, 2), (70, 9_000, 4), (30_000, 16, 8), (20_000, 8, 8)]
    pieces += [(20_008, 9_000, 8), (29_008, 992, 8), (39_999, 3, 2), (40_002, 8, 4)]
    with Writer(tmp_path / "m", part) as writer, Outlet(9_500, 1, threading.Event()) as outlet:
        joined = Joined(outlet)
        for number, (offset, nbytes, width) in enumerate(pieces, 1):
            sink = joined.sink(writer, start + offset, width)
            raw = sink.take(0, nbytes)
            assert raw.ctypes.data % width == 0
            raw[:] = number
            sink.put(0, raw)
        joined.flush()
        joined.wait()
    wanted = np.zeros(100_000, np.uint8)
    for number, (offset, nbytes, _) in enumerate(pieces, 1):
        wanted[offset : offset + nbytes] = number
    assert (tmp_path / "m").read_bytes()[start:] == wanted.tobytes()


@pytest.fixture
def opened(models):
    plan = planned(models, RECIPE)
    with open_sources(plan) as sources:
        yield plan, sources


def test_a_window_shows_every_tensor_as_it_lies_in_its_file(opened):
    plan, sources = opened
    for first in range(0, len(plan.jobs), 7):
        jobs = plan.jobs[first : first + 7]
        window = sources.ahead(jobs)
        for job in jobs:
            start, stop = job.size // 3, job.size
            buffers = [np.empty(read.tensor.nbytes, np.uint8) for read in job.reads]
            loaded = sources.load(job.reads, start, stop, buffers)
            again = window.load(job.reads, start, stop, [np.empty_like(buffer) for buffer in buffers])
            there = window.seen(job.reads, start, stop) or again  # what lies askew is not shown
            for values in (again, there):
                assert all(np.array_equal(one, other) for one, other in zip(loaded, values, strict=True))
                assert all(each.ctypes.data % each.itemsize == 0 for each in values)
    assert sum(window.seen(job.reads, 0, 1) is not None for job in jobs) > len(jobs) / 2
    assert sources.seen(jobs[0].reads, 0, 1) is None


def test_side_by_side_is_one_read_and_each_byte_counts_once(models, tmp_path, monkeypatch):
    plan = planned(models, RECIPE)
    true, offsets = system.preadv, []
    monkeypatch.setattr(system, "preadv", lambda *given: (offsets.append(given[2]), true(*given))[1])
    report = run(plan, tmp_path / "merged")
    assert len(offsets) < len(plan.jobs) * 3 / 2  # of which a quarter is in yet another order, or askew
    assert report.bytes_read >= sum(job.bytes_read for job in plan.jobs)


def test_a_window_is_not_opened_when_the_run_is_given_up(opened):
    plan, sources = opened
    window = sources.ahead(plan.jobs[:2])
    sources.stop.set()
    with pytest.raises(Stopped):
        sources.ahead(plan.jobs)
    with pytest.raises(Stopped):
        window.seen(plan.jobs[0].reads, 0, 1)
