"""Small jobs that go to a worker together: what lies side by side is one call, and every byte is where it belongs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from plan.models import TIES, llama, planned, save

from mergetool.errors import NonFinite
from mergetool.execute import batch, run
from mergetool.execute.batch import batches, spans
from mergetool.execute.job import Outcome
from mergetool.execute.journal import JOURNAL, Journal, read_journal
from mergetool.storage import system


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
