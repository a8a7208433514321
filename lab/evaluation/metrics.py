"""Losses and per-group evaluation.

Everything is a function of the outputs f, the labels y (N,) and the groups, so that whatever
produced f (a network, a retrained head, an analysis) is judged the same way. f is (N,) with y in
{-1, +1}, or (N, C) with one output a class and y a class index; two classes may be -1 and +1 there,
too.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Loss(NamedTuple):
    """A loss ℓ(f, y) (N,), its derivative ∂ℓ/∂f, and c₀(y) = ∂ℓ/∂f at f = 0.

    The derivatives are those of scalar outputs f (N,), None for a loss of outputs (N, C).
    """

    value: Callable
    derivative: Callable | None
    at_zero: Callable | None


def class_index(y: torch.Tensor) -> torch.Tensor:
    """Labels as class indices (N,) int64: indices as they are, -1 and +1 as 0 and 1."""
    return (y > 0).long() if y.is_floating_point() else y


LOSSES = {
    # log(1 + exp(-y f)), without overflow
    "logistic": Loss(
        lambda f, y: F.softplus(-y * f), lambda f, y: -y * torch.sigmoid(-y * f), lambda y: -y / 2
    ),
    "mse": Loss(lambda f, y: (f - y) ** 2, lambda f, y: 2 * (f - y), lambda y: -2 * y),
    # log Σ_c exp(f_c) - f_y
    "cross_entropy": Loss(
        lambda f, y: F.cross_entropy(f, class_index(y), reduction="none"), None, None
    ),
}


def float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device has no such type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _fitting(split, batch_size: int, model) -> int:
    """The batch size, or less where pictures or networks for them have a limit of their own."""
    limits = [getattr(limited, "max_batch", batch_size) for limited in (split.inputs, model)]
    return min(batch_size, *limits)


def group_batches(split, batch_size: int, model=None):
    """Yields (group, slice): the split in batches of one group each, in the split's order.

    Evaluation and analyses share these batches, so that they see the very same outputs. Pictures,
    and networks for them, have limits of their own on a batch, for the memory's sake.
    """
    batch_size = _fitting(split, batch_size, model)
    for group, part in enumerate(split.slices):
        for start in range(part.start, part.stop, batch_size):
            yield group, slice(start, min(start + batch_size, part.stop))


def evaluation_plan(split, batch_size: int, model=None) -> list:
    """The batches in which a split is evaluated, in its order, as a plan for `batches`.

    Those of `group_batches`, with which the analyses share them; but where there are many groups,
    and so no analyses, batches go across groups, of which most may be small.
    """
    if len(split.counts) <= 4:
        return list(group_batches(split, batch_size, model))
    batch_size = _fitting(split, batch_size, model)
    return [(None, slice(i, i + batch_size)) for i in range(0, len(split), batch_size)]


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
    """Outputs f, (N,) or (N, C), of a network in evaluation mode, in batches of `batch_size`."""
    model.eval()
    plan = evaluation_plan(split, batch_size, model)
    return torch.cat([model(x) for _, _, x in batches(split, plan)])


def group_means(values: torch.Tensor, slices) -> list[float]:
    """Mean over each group, in float64; NaN for an empty group."""
    values = float64(values).cpu()  # one transfer, not one a group
    return [values[s].mean().item() if s.stop > s.start else math.nan for s in slices]


def correct(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which outputs are right, (N,) bool: f·y > 0, or the label's output above all others.

    An output of exactly 0, a tie for the largest output, and NaN count as wrong.
    """
    if f.dim() == 1:
        return f * y > 0
    label = class_index(y)[:, None]
    others = f.scatter(1, label, -math.inf).amax(1)  # NaN where any of them is
    return f.gather(1, label)[:, 0] > others


def summary(f: torch.Tensor, split, loss: Loss, train_shares) -> dict[str, float]:
    """Loss and accuracy of outputs f on a split: average, worst, adjusted, per group.

    `worst_*` is over the non-empty groups; `adjusted_acc` weights the group accuracies with the
    shares of the training split (Sagawa et al., 2020), NaN when a group with a share is empty
    here. `minority_acc` is over the samples that go against the shortcut (`Split.in_minority`),
    `majority_acc` over the others; NaN where there are none.
    """
    right, minority = float64(correct(f, split.y)).cpu(), split.in_minority.cpu()
    losses = group_means(loss.value(f, split.y), split.slices)
    accuracies = group_means(right, split.slices)
    there = [g for g, count in enumerate(split.counts) if count]
    result = {
        "avg_loss": weighted(losses, split.shares),
        "worst_loss": worst(max, [losses[g] for g in there]),
        "avg_acc": weighted(accuracies, split.shares),
        "worst_acc": worst(min, [accuracies[g] for g in there]),
        "adjusted_acc": weighted(accuracies, train_shares),
        # The mean of nothing is NaN.
        "minority_acc": right[minority].mean().item(),
        "majority_acc": right[~minority].mean().item(),
    }
    for g in range(len(split.counts)):
        result[f"group_{g}_loss"] = losses[g]
        result[f"group_{g}_acc"] = accuracies[g]
    return result


def task_summaries(f: torch.Tensor, split, tasks, loss: Loss, train) -> dict[str, float]:
    """`summary` of every task's outputs (N, T), with the task's name before each quantity.

    Without a name: means over the tasks, for `worst_*` the worst task's.
    """
    found, result = [], {}
    for t, task in enumerate(tasks):
        order, part = split.of_task(t, task)
        shares = train.of_task(t, task)[1].shares
        found.append(summary(f[order, t], part, loss, shares))
    for name in ("avg_loss", "worst_loss", "avg_acc", "worst_acc", "adjusted_acc", "minority_acc",
                 "majority_acc"):  # fmt: skip
        values = [summary[name] for summary in found]
        extreme = {"worst_loss": max, "worst_acc": min}.get(name)
        result[name] = worst(extreme, values) if extreme else math.fsum(values) / len(values)
    for task, values in zip(tasks, found):
        result |= {f"{task.name}_{name}": value for name, value in values.items()}
    return result


def weighted(values, weights) -> float:
    """Σ w_g v_g over the groups with a weight, so that an empty group without one does no harm."""
    return math.fsum(w * v for w, v in zip(weights, values) if w)


def worst(extreme, values) -> float:
    """max or min that is NaN when any value is."""
    return math.nan if any(math.isnan(v) for v in values) else extreme(values)


def group_losses(summary: dict[str, float]) -> list[float]:
    """The mean losses R_g in a summary, in the order of the groups."""
    is_group_loss = re.compile(r"group_\d+_loss").fullmatch
    return [value for name, value in summary.items() if is_group_loss(name)]
