"""Every loss and penalty against a loop over positions and tokens."""

import math
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from mergetool.anatomy import Part  # noqa: E402
from mergetool.facts.dam import slots  # noqa: E402
from mergetool.facts.dam_losses import LOSSES, Target, condense, kl  # noqa: E402
from mergetool.facts.dam_merge import Reads  # noqa: E402
from mergetool.facts.dam_penalties import (  # noqa: E402
    interference,
    marginals,
    norms,
    overlap,
    penalty,
    similarity,
    sum_to,
)

P, V = 5, 11


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(2, P, V, dtype=torch.float64)


def softmax(values, heat):
    exponentials = [math.exp(value / heat) for value in values]
    return [each / sum(exponentials) for each in exponentials]


def grouped(probabilities, kept):
    """The probabilities of the tokens that are kept, and of all others together."""
    rest = [p for token, p in enumerate(probabilities) if token not in kept]
    return [probabilities[token] for token in kept] + ([sum(rest)] if rest else [])


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive(name, teacher, student, kept, heat):
    p, q = grouped(softmax(teacher, heat), kept), grouped(softmax(student, heat), kept)
    if name == "kl":
        return heat**2 * divergence(p, q)
    if name == "js":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return heat**2 * (divergence(p, middle) + divergence(q, middle)) / 2
    if name == "mse":
        return sum((teacher[token] - student[token]) ** 2 for token in kept) / len(kept)
    return -sum(each * math.log(each) for each in softmax(student, 1.0))


@pytest.mark.parametrize("heat", [1.0, 2.0])
@pytest.mark.parametrize("k", [0, 1, 4, V, V + 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_a_loop(logits, name, k, heat):
    teacher, student = logits
    target = condense(teacher, k, heat)
    kept = [row.tolist() for row in teacher.argsort(-1, descending=True)[:, : k or V]]
    found = LOSSES[name](student, target, heat)
    wanted = [naive(name, t, s, tokens, heat) for t, s, tokens in zip(teacher.tolist(), student.tolist(), kept)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_agrees_with_finite_differences(logits, name, k):
    target = condense(logits[0], k, 2.0)
    student = logits[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, target, 2.0), (student,))


def test_k_buckets_and_the_rest_bound_the_whole_divergence_from_below(logits):
    teacher, student = logits
    whole = kl(student, Target(teacher), 2.0)
    parts = [kl(student, condense(teacher, k, 2.0), 2.0) for k in (1, 4, 8)]
    assert all((part <= whole + 1e-12).all() for part in parts)
    assert all((less <= more + 1e-12).all() for less, more in pairwise(parts))


@pytest.mark.parametrize("name", ["kl", "js", "mse"])
@pytest.mark.parametrize("k", [0, 4])
def test_a_student_that_agrees_has_no_loss(logits, name, k):
    assert LOSSES[name](logits[0], condense(logits[0], k, 2.0), 2.0).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["kl", "js", "entropy"])
def test_tokens_that_are_ruled_out_and_huge_logits_leave_the_loss_finite(logits, name):
    teacher, student = logits.clone()
    teacher[:, 0] = -math.inf
    student[:, 0] = -math.inf
    student[0, 3], teacher[1, 3] = 1e4, 1e4
    student.requires_grad_()
    loss = LOSSES[name](student, condense(teacher, 0, 2.0), 2.0).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.fixture
def coefficients():
    torch.manual_seed(1)
    return [torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]


PAIRS = [(0, 1), (0, 2), (1, 2)]


def test_similarity_is_the_mean_cosine_of_pairs_summed_over_tensors(coefficients):
    def cosine(a, b):
        a, b = a.reshape(-1), b.reshape(-1)
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    wanted = sum(sum(cosine(c[i], c[j]) for i, j in PAIRS) / 3 for c in coefficients)
    assert float(similarity(coefficients)) == pytest.approx(wanted)


def test_overlap_is_the_smaller_magnitude_weighted_by_interference(coefficients):
    weights = [torch.rand(3, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)]

    def summed(c, weight):
        each = [(torch.minimum(c[i].abs(), c[j].abs()) * w).sum() for (i, j), w in zip(PAIRS, weight)]
        return float(sum(each)) / 3

    ones = [torch.ones_like(weight) for weight in weights]
    assert float(overlap(coefficients)) == pytest.approx(sum(map(summed, coefficients, ones)))
    assert float(overlap(coefficients, weights)) == pytest.approx(sum(map(summed, coefficients, weights)))


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_not_squared(coefficients, order):
    wanted = sum(
        sum(abs(x) ** order for x in row.reshape(-1).tolist()) ** (1 / order) for c in coefficients for row in c
    )
    assert float(norms(coefficients, order)) == pytest.approx(wanted)


@pytest.mark.parametrize(("angle", "wanted"), [(0, 0.0), (45, 1.0), (90, 0.0), (180, 0.0), (30, 0.75)])
def test_interference_is_greatest_where_deltas_are_half_way_between_parallel_and_orthogonal(angle, wanted):
    class Source:
        def __init__(self, tensor):
            self.tensor = tensor

        def get(self, name):
            return self.tensor

    (slot,) = slots({"w": Part("mlp.up", "", None, 0, 0.0, None, None, False)}, {"w": (2, 1)})
    turn = math.radians(angle)
    base = torch.tensor([[5.0], [7.0]])
    deltas = [[[1.0], [0.0]], [[math.cos(turn)], [math.sin(turn)]]]
    sources = [Source(base + torch.tensor(delta)) for delta in deltas]
    found = interference(Reads(slot, sources, Source(base), dtype=torch.float64))
    assert found.tolist() == [[pytest.approx(wanted, abs=1e-5)]]


def test_coefficients_are_moved_to_sum_to_by_as_much_each(coefficients):
    for each in coefficients:
        assert torch.allclose(sum_to(0.0, each).sum(0), torch.zeros_like(each[0]))
        moved = sum_to(1.0, each)
        assert torch.allclose(moved.sum(0), torch.ones_like(moved[0]))
        assert torch.allclose((moved - each).std(0), torch.zeros_like(moved[0]), atol=1e-12)


@pytest.mark.parametrize(
    ("role", "shape"), [("mlp.up", (5, 3)), ("embedding.patch", (6, 3, 2, 2)), ("expert.up", (3, 6, 4)), ("norm", (4,))]
)
def test_penalties_see_columns_and_rows_in_the_mean_of_the_other(role, shape):
    (slot,) = slots({"w": Part(role, "", None, 0, 0.0, None, None, False)}, {"w": shape})
    torch.manual_seed(3)
    given = [torch.randn(each.coefficients(2), dtype=torch.float64) for each in slot.sets]
    entries = sum(c.reshape(each.over_weight(2)) for each, c in zip(slot.sets, given)).expand(2, *shape)
    found = marginals(slot, given)
    assert len(found) == len(slot.sets)
    for each, mean in zip(slot.sets, found):
        away = [1 + axis for axis in each.summed]
        assert torch.allclose(mean, entries.mean(away) if away else entries)
    if slot.rows is not None:
        moved = marginals(slot, [given[0] + 0.7, given[1] - 0.7])
        assert all(torch.allclose(one, other) for one, other in zip(found, moved))


def test_penalties_are_added_with_their_factors(coefficients):
    found = penalty(coefficients, {"similarity": 2.0, "overlap": 0.0, "l1": 0.5, "l2": 0.25})
    wanted = 2 * similarity(coefficients) + norms(coefficients, 1) / 2 + norms(coefficients, 2) / 4
    assert float(found) == pytest.approx(float(wanted))
    assert float(penalty(coefficients, {"similarity": 0.0})) == 0.0
