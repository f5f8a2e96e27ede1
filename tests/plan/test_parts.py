"""Shares of a plan's jobs: every job in exactly one of them, neighbours together, about equal bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.anatomy import Part
from mergetool.errors import PlanError
from mergetool.plan import Job
from mergetool.plan.parts import Share, needed, share
from mergetool.storage.dtypes import dtype
from plan.models import TIES, planned


def job(name, size):
    return Job(name, (size,), dtype("U8"), Part("other", "", None, 0, 0.0, None, None, False), "", ())


sizes = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 1 << 40)), max_size=40)


@given(sizes, st.integers(1, 60))
def test_shares_divide_the_jobs_and_keep_their_order(sizes, parts):
    jobs = [job(str(i), size) for i, size in enumerate(sizes)]
    shares = [share(jobs, part, parts) for part in range(1, parts + 1)]
    assert [i for found in shares for i in found] == list(range(len(jobs)))


@given(sizes.filter(bool), st.integers(1, 12))
def test_no_share_has_more_than_an_equal_one_and_one_job(sizes, parts):
    jobs = [job(str(i), size) for i, size in enumerate(sizes)]
    costs = [size + 1 for size in sizes]
    for part in range(1, parts + 1):
        mine = [costs[i] for i in share(jobs, part, parts)]
        assert sum(mine) <= sum(costs) / parts + max(costs)


def test_jobs_alike_are_dealt_out_alike():
    jobs = [job(str(i), 8) for i in range(12)]
    assert [len(share(jobs, part, 4)) for part in range(1, 5)] == [3, 3, 3, 3]
    assert [share(jobs[:5], part, 3) for part in (1, 2, 3)] == [(0, 1), (2,), (3, 4)]
    assert [share(jobs[:1], part, 3) for part in (1, 2, 3)] == [(), (0,), ()]


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_the_parts_of_a_plan_are_its_jobs(trio_plan, parts):
    found = [job for each in Share(1, parts).all() for job in each.of(trio_plan.jobs)]
    assert tuple(found) == trio_plan.jobs


def test_memory_and_workers_do_not_decide_who_makes_what(trio_folder):
    plans = [planned(trio_folder, workers=workers, memory=memory) for workers, memory in ((1, 1 << 30), (7, 1 << 33))]
    for each in Share(1, 3).all():
        assert len({tuple(job.name for job in each.of(plan.jobs)) for plan in plans}) == 1


@pytest.mark.parametrize(("part", "parts"), [(0, 8), (9, 8), (-1, 8), (1, 0)])
def test_a_part_that_does_not_exist_is_refused(part, parts):
    with pytest.raises(PlanError, match="no part"):
        Share(part, parts)


def test_what_is_measured_over_the_whole_model_is_needed_by_every_part(trio_folder):
    plan = planned(trio_folder, f"{TIES}  scope: model\nrules: [{{where: {{part: norm}}, keep: a}}]\n")
    measured = {job.name for job in plan.jobs if job.facts}
    assert 1 < len(measured) < len(plan.jobs)
    for job in plan.jobs:
        names = {each.name for each in needed(plan, [job]).jobs}
        assert names == (measured if job.facts else {job.name})
