"""Models made once for all tests of plans."""

from __future__ import annotations

import pytest

from plan.models import planned, trio


@pytest.fixture(scope="session")
def trio_folder(tmp_path_factory):
    """The models ``base``, ``a`` and ``b``; tests write only recipes beside them."""
    return trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture
def trio_plan(trio_folder):
    """A TIES merge of the three."""
    return planned(trio_folder)
