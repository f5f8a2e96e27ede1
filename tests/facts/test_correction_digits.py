"""On digits the corrections do what their papers say: perm < perm + REPAIR < perm + TACT < experts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PAPERS = Path(__file__).parents[2] / "examples" / "papers"


@pytest.fixture(scope="module")
def digits():
    """The module of protocols, imported as the script imports its neighbours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPERS))
        import digits

        yield digits
    torch.set_num_threads(before)
    for name in [name for name in sys.modules if name.startswith("digits")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def fetched(digits):
    """The same, with the digits at hand."""
    from digits_data import UnavailableError, fetch

    try:
        fetch()
    except UnavailableError as error:
        pytest.skip(str(error))
    return digits


@pytest.mark.slow
def test_one_task(fetched):
    rows = fetched.one_task(0, None)
    accuracy = {row: values["accuracy"] for row, values in rows.items()}
    for way in ("weight matching", "activation matching"):
        assert accuracy["naive"] < accuracy[way] < accuracy[f"{way} + REPAIR"] <= accuracy["network A"] + 1
        *collapsed, last = [value for name, value in rows[way].items() if "σ" in name]
        assert collapsed == sorted(collapsed, reverse=True)
        assert last < collapsed[-1] < 100
        repaired = [value for name, value in rows[f"{way} + REPAIR"].items() if "σ" in name]
        np.testing.assert_allclose(repaired, 100, atol=1)


@pytest.mark.slow
def test_two_tasks_with_heads_of_their_own(fetched):
    rows = {row: np.mean(list(values.values())) for row, values in fetched.two_tasks(0, None).items()}
    order = [
        "naive",
        "activation matching",
        "activation matching + REPAIR",
        "activation matching + TACT, output",
        "activation matching + TACT, all layers",
        "experts",
    ]
    means = [rows[row] for row in order]
    assert means == sorted(means)
    assert rows["activation matching + TACT, all layers, 64 images"] > means[-2] - 2


def test_a_saved_network_and_its_data_are_read_back_by_the_adapter(digits, tmp_path):
    import digits_adapter
    from digits_data import Data, Task
    from digits_networks import load, logits

    draw = torch.Generator().manual_seed(0)
    data = Data(torch.rand(300, 64, generator=draw), torch.randint(10, (300,), generator=draw))
    weights = digits.learnt(Task("noise, relabelled", data, data), 3, tmp_path, steps=2)

    folder = tmp_path / "networks" / "noise-relabelled-3"
    net = digits_adapter.network(json.loads((folder / "config.json").read_text()))
    net.load_state_dict(load(folder))
    path = tmp_path / "data" / "noise-relabelled-test.csv"
    (few,) = digits_adapter.read(path, samples=40, seed=1)
    both = digits_adapter.read(path, samples=10_000, seed=1)

    assert few["pixels"].shape == (40, 64)
    torch.testing.assert_close(net(few["pixels"]), logits(weights, few["pixels"]))
    assert [len(batch["labels"]) for batch in both] == [256, 44]
    order = np.random.default_rng(1).permutation(300)
    torch.testing.assert_close(torch.cat([batch["pixels"] for batch in both]), data.x[order], rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cat([batch["labels"] for batch in both]), data.y[order])
