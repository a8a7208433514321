"""Losses against autograd and loops."""

import math

import pytest
import torch
from helpers import many_groups

from lab.evaluation.losses import CROSS_ENTROPY, LOGISTIC, MSE


@pytest.mark.parametrize("loss", [LOGISTIC, MSE], ids=["logistic", "mse"])
def test_derivatives_are_those_of_the_value(loss):
    f = torch.tensor([-3.0, 0.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss.value(f, y).sum(), f)
    assert torch.allclose(loss.derivative(f.detach(), y), expected)
    zero = torch.zeros_like(f, requires_grad=True)
    (expected,) = torch.autograd.grad(loss.value(zero, y).sum(), zero)
    assert torch.allclose(loss.at_zero(y), expected)


def test_the_logistic_loss_does_not_overflow():
    loss = LOGISTIC
    y = torch.tensor([1.0, -1.0])
    assert torch.equal(loss.value(torch.tensor([-1e30, -1e30]), y), torch.tensor([1e30, 0.0]))


def test_cross_entropy_against_a_loop():
    split = many_groups((3, 1, 2, 0, 4, 2), num_attributes=2)
    f = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = CROSS_ENTROPY.value(f, split.y)
    assert found.tolist() == pytest.approx(
        [math.log(sum(math.exp(v) for v in row)) - row[c] for row, c in zip(f.tolist(), split.y)]
    )
    large = torch.tensor([[1e4, -1e4]])
    assert CROSS_ENTROPY.value(large, torch.tensor([1])).item() == 2e4
