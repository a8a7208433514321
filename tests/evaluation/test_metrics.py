"""Accuracies and mean losses by group, by hand and against loops."""

import math

import pytest
import torch
from helpers import make_split, many_groups

from lab.evaluation import metrics
from lab.evaluation.losses import CROSS_ENTROPY, LOGISTIC, MSE


def test_summary_by_hand():
    split = make_split((2, 1, 0, 3), dtype=torch.float32)
    f = torch.tensor([-1.0, 1.0, 0.0, 2.0, -0.5, 3.0])  # 0 counts as wrong
    found = metrics.summary(f, split, MSE, [0.4, 0.1, 0.0, 0.5])
    losses = [(0 + 4) / 2, 1.0, math.nan, (1 + 2.25 + 4) / 3]
    accuracies = [0.5, 0.0, math.nan, 2 / 3]
    for g in range(4):
        assert found[f"group_{g}_loss"] == pytest.approx(losses[g], nan_ok=True)
        assert found[f"group_{g}_acc"] == pytest.approx(accuracies[g], nan_ok=True)
    assert found["avg_loss"] == pytest.approx((4 + 1 + 7.25) / 6)
    assert found["worst_loss"] == pytest.approx(7.25 / 3)
    assert found["avg_acc"] == pytest.approx(0.5)
    assert found["worst_acc"] == 0.0
    assert found["adjusted_acc"] == pytest.approx(0.4 * 0.5 + 0.5 * 2 / 3)


def test_adjusted_accuracy_is_unknown_when_a_group_with_a_share_is_empty():
    split = make_split((2, 0, 1, 1), dtype=torch.float32)
    found = metrics.summary(torch.ones(4), split, MSE, [0.25] * 4)
    assert math.isnan(found["adjusted_acc"])
    assert found["avg_acc"] == 0.5


def test_a_nan_output_is_not_hidden_by_the_worst_group():
    split = make_split((1, 1, 1, 1), dtype=torch.float32)
    f = torch.tensor([math.nan, -1.0, 1.0, 1.0])
    assert math.isnan(metrics.summary(f, split, MSE, [0.25] * 4)["worst_loss"])


def with_nan(f):
    f[1, 0] = f[4, 2] = math.nan
    f[2] = f[2, 0]  # a tie of all
    f[5, 1] = math.inf
    return f


def cross_entropy_twin(f, y):
    return [math.log(sum(math.exp(v) for v in row)) - row[c] for row, c in zip(f.tolist(), y)]


def correct_twin(f, y):
    """One sample at a time: no other output is as large as the label's; NaN is wrong."""
    right = []
    for row, c in zip(f.tolist(), y.tolist()):
        others = [value for k, value in enumerate(row) if k != c]
        bad = any(math.isnan(value) for value in row)
        right.append(not bad and all(row[c] > value for value in others))
    return right


def test_two_classes_may_be_signs():
    signs, f = torch.tensor([-1.0, 1.0, 1.0]), torch.randn(3, dtype=torch.float64)
    two = torch.stack([-f / 2, f / 2], 1)
    expected = LOGISTIC.value(f, signs.double())
    assert torch.allclose(CROSS_ENTROPY.value(two, signs), expected)
    assert torch.equal(metrics.correct(two, signs), metrics.correct(f, signs))


def test_what_is_correct_against_a_loop():
    y = torch.arange(30) % 3
    f = with_nan(torch.randint(-2, 3, (30, 3), generator=torch.Generator().manual_seed(0)).float())
    expected = correct_twin(f, y)
    assert metrics.correct(f, y).tolist() == expected
    assert not expected[1] and not expected[2] and not expected[4]
    assert expected[5] == (y[5] == 1)
    assert any(expected)
    scalar = torch.tensor([2.0, 0.0, -1.0, math.nan, -math.inf])
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    assert metrics.correct(scalar, signs).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("counts", [(4, 2, 0, 3, 5, 1, 0, 2, 6), (4, 0, 0, 0, 3, 0, 0, 0, 2)])
def test_the_summary_of_nine_groups_against_a_loop(counts):
    split = many_groups(counts, num_attributes=3)
    f = torch.randn(len(split), 3, generator=torch.Generator().manual_seed(2))
    shares = [(g + 1) / 45 if n else 0 for g, n in enumerate(counts)]
    found = metrics.summary(f, split, CROSS_ENTROPY, shares)
    right, losses = correct_twin(f, split.y), cross_entropy_twin(f, split.y)
    by_group, kinds = {}, {True: [], False: []}
    for ok, loss, y, a in zip(right, losses, split.y.tolist(), split.a.tolist()):
        by_group.setdefault(3 * y + a, []).append((ok, loss))
        kinds[y == a].append(ok)

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    accuracy = {g: mean([ok for ok, _ in by_group.get(g, [])]) for g in range(9)}
    loss = {g: mean([value for _, value in by_group.get(g, [])]) for g in range(9)}
    expected = {
        "avg_loss": mean(losses),
        "worst_loss": max(loss[g] for g in by_group),
        "avg_acc": mean(right),
        "worst_acc": min(accuracy[g] for g in by_group),
        "adjusted_acc": sum(shares[g] * accuracy[g] for g in by_group),
        "minority_acc": mean(kinds[False]),
        "majority_acc": mean(kinds[True]),
    }
    for g in range(9):
        expected |= {f"group_{g}_loss": loss[g], f"group_{g}_acc": accuracy[g]}
    assert found == pytest.approx(expected, nan_ok=True, rel=1e-6)
    assert list(found) == list(expected)
    expected_losses = pytest.approx(list(loss.values()), nan_ok=True, rel=1e-6)
    assert metrics.group_losses(found) == expected_losses


def test_minority_and_majority_of_two_classes():
    split = make_split((2, 1, 0, 3), dtype=torch.float32)
    f = torch.tensor([-1.0, 1.0, -2.0, 2.0, -0.5, 3.0])
    found = metrics.summary(f, split, LOGISTIC, [0.25] * 4)
    assert found["minority_acc"] == 1.0
    assert found["majority_acc"] == pytest.approx(3 / 5)
    assert len(metrics.group_losses(found)) == 4


def test_the_minority_can_be_given_by_group():
    split = make_split((2, 1, 1, 2))
    split.minority = (False, False, False, True)
    f = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    found = metrics.summary(f, split, LOGISTIC, split.shares)
    assert found["minority_acc"] == 0.5  # of the last two samples
    assert found["majority_acc"] == 0.75  # of the first four
