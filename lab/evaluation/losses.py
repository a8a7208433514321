"""The losses ℓ(f, y) of outputs f and labels y (N,), with their derivatives.

f is (N,) with y in {-1, +1}, or (N, C) with one output per class and y a class index; with two
classes y may be -1 and +1 in the second case, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Loss(NamedTuple):
    """A loss ℓ(f, y) (N,), its derivative ∂ℓ/∂f, and c₀(y) = ∂ℓ/∂f at f = 0.

    The derivatives are those of scalar outputs f (N,), None for a loss of outputs (N, C).
    """

    value: Callable
    derivative: Any = None
    at_zero: Any = None


def class_index(y: torch.Tensor) -> torch.Tensor:
    """Labels as class indices (N,) int64: indices as they are, -1 and +1 as 0 and 1."""
    return (y > 0).long() if y.is_floating_point() else y


# log(1 + exp(-y f)), without overflow
LOGISTIC = Loss(
    value=lambda f, y: F.softplus(-y * f),
    derivative=lambda f, y: -y * torch.sigmoid(-y * f),
    at_zero=lambda y: -y / 2,
)
MSE = Loss(
    value=lambda f, y: (f - y) ** 2,
    derivative=lambda f, y: 2 * (f - y),
    at_zero=lambda y: -2 * y,
)
# log Σ_c exp(f_c) - f_y
CROSS_ENTROPY = Loss(value=lambda f, y: F.cross_entropy(f, class_index(y), reduction="none"))
