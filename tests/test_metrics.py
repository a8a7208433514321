"""Losses and per-group evaluation by hand."""

import math

import pytest
import torch
from conftest import make_split

import metrics


@pytest.mark.parametrize("name", [n for n, loss in metrics.LOSSES.items() if loss.derivative])
def test_derivatives_are_those_of_the_value(name):
    loss = metrics.LOSSES[name]
    f = torch.tensor([-3.0, 0.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss.value(f, y).sum(), f)
    assert torch.allclose(loss.derivative(f.detach(), y), expected)
    zero = torch.zeros_like(f, requires_grad=True)
    (expected,) = torch.autograd.grad(loss.value(zero, y).sum(), zero)
    assert torch.allclose(loss.at_zero(y), expected)


def test_the_logistic_loss_does_not_overflow():
    loss = metrics.LOSSES["logistic"]
    y = torch.tensor([1.0, -1.0])
    assert torch.equal(loss.value(torch.tensor([-1e30, -1e30]), y), torch.tensor([1e30, 0.0]))


def test_summary_by_hand():
    split = make_split((2, 1, 0, 3), dtype=torch.float32)
    f = torch.tensor([-1.0, 1.0, 0.0, 2.0, -0.5, 3.0])  # 0 counts as wrong
    found = metrics.summary(f, split, metrics.LOSSES["mse"], [0.4, 0.1, 0.0, 0.5])
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
    found = metrics.summary(torch.ones(4), split, metrics.LOSSES["mse"], [0.25] * 4)
    assert math.isnan(found["adjusted_acc"])
    assert found["avg_acc"] == 0.5


def test_a_nan_output_is_not_hidden_by_the_worst_group():
    split = make_split((1, 1, 1, 1), dtype=torch.float32)
    f = torch.tensor([math.nan, -1.0, 1.0, 1.0])
    assert math.isnan(metrics.summary(f, split, metrics.LOSSES["mse"], [0.25] * 4)["worst_loss"])


def test_outputs_in_batches_keep_the_order():
    split = make_split((5, 0, 7, 1), shape=(2, 2), dtype=torch.float32)

    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1)

    expected = split.inputs.flatten(1).sum(1)
    for size in (1, 3, 100):
        assert torch.equal(metrics.outputs(Sum(), split, size), expected)
