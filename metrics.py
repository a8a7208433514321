"""Losses and per-group evaluation.

Everything is a function of the outputs f (N,), the labels y in {-1, +1} (N,) and the groups, so
that whatever produced f (a network, a retrained head, an analysis) is judged the same way.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Loss(NamedTuple):
    """A loss ℓ(f, y), its derivative ∂ℓ/∂f, and c₀(y) = ∂ℓ/∂f at f = 0."""

    value: callable
    derivative: callable
    at_zero: callable


LOSSES = {
    # log(1 + exp(-y f)), without overflow
    "logistic": Loss(
        lambda f, y: F.softplus(-y * f), lambda f, y: -y * torch.sigmoid(-y * f), lambda y: -y / 2
    ),
    "mse": Loss(lambda f, y: (f - y) ** 2, lambda f, y: 2 * (f - y), lambda y: -2 * y),
}


def float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device has no such type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def group_batches(split, batch_size: int, model=None):
    """Yields (group, slice): the split in batches of one group each, in the split's order.

    Evaluation and analyses share these batches, so that they see the very same outputs. Pictures,
    and networks for them, have limits of their own on a batch, for the memory's sake.
    """
    for limited in (split.inputs, model):
        batch_size = min(batch_size, getattr(limited, "max_batch", batch_size))
    for group, part in enumerate(split.slices):
        for start in range(part.start, part.stop, batch_size):
            yield group, slice(start, min(start + batch_size, part.stop))


def batches(split, plan):
    """Yields (tag, index, inputs[index]) for a list of pairs (tag, index), in order.

    The way to iterate over a split: pictures are decoded ahead of use.
    """
    plan = list(plan)
    inputs, indices = split.inputs, [index for _, index in plan]
    if isinstance(inputs, torch.Tensor):
        loaded = (inputs[index] for index in indices)
    else:
        loaded = inputs.batches(indices)
    for (tag, index), x in zip(plan, loaded):
        yield tag, index, x


@torch.no_grad()
def outputs(model, split, batch_size: int) -> torch.Tensor:
    """Outputs f (N,) of a network in evaluation mode, at most `batch_size` samples at a time."""
    model.eval()
    plan = group_batches(split, batch_size, model)
    return torch.cat([model(x) for _, _, x in batches(split, plan)])


def group_means(values: torch.Tensor, slices) -> list[float]:
    """Mean over each group, in float64; NaN for an empty group."""
    values = float64(values)
    return [values[s].mean().item() if s.stop > s.start else math.nan for s in slices]


def summary(f: torch.Tensor, split, loss: Loss, train_shares) -> dict[str, float]:
    """Loss and accuracy of outputs f (N,) on a split: average, worst, adjusted, per group.

    An output of exactly 0 counts as wrong. `worst_*` is over the non-empty groups; `adjusted_acc`
    weights the group accuracies with the shares of the training split (Sagawa et al., 2020), NaN
    when a group with a share is empty here.
    """
    losses = group_means(loss.value(f, split.y), split.slices)
    accuracies = group_means(f * split.y > 0, split.slices)
    there = [g for g, count in enumerate(split.counts) if count]
    result = {
        "avg_loss": weighted(losses, split.shares),
        "worst_loss": worst(max, [losses[g] for g in there]),
        "avg_acc": weighted(accuracies, split.shares),
        "worst_acc": worst(min, [accuracies[g] for g in there]),
        "adjusted_acc": weighted(accuracies, train_shares),
    }
    for g in range(len(split.counts)):
        result[f"group_{g}_loss"] = losses[g]
        result[f"group_{g}_acc"] = accuracies[g]
    return result


def weighted(values, weights) -> float:
    """Σ w_g v_g over the groups with a weight, so that an empty group without one does no harm."""
    return math.fsum(w * v for w, v in zip(weights, values) if w)


def worst(extreme, values) -> float:
    """max or min that is NaN when any value is."""
    return math.nan if any(math.isnan(v) for v in values) else extreme(values)


def group_losses(summary: dict[str, float], num_groups: int = 4) -> list[float]:
    """The mean losses R_g in a summary."""
    return [summary[f"group_{g}_loss"] for g in range(num_groups)]
