"""Matching keeps to what the plan states of its memory."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bench.matching import METHODS, measured


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is told by Linux only")
@pytest.mark.parametrize("method", METHODS)
def test_matching_takes_no_more_than_the_plan_states(method):
    found = measured(4096, method)
    assert 0.5 * found["stated"] < found["peak"] <= found["stated"]
