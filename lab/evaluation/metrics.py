"""Accuracies and mean losses of outputs, by group.

Everything is a function of the outputs f, the labels y (N,) and the groups, so that whatever
produced f (a network, a retrained head, an analysis) is judged the same way. For the shapes of f
and y see `losses`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch

from lab.evaluation.losses import Loss, class_index
from lab.splits.splits import Split, Task

QUANTITIES = ("avg_loss", "worst_loss", "avg_acc", "worst_acc", "adjusted_acc", "minority_acc",
              "majority_acc")  # fmt: skip


def float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device has no such type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def group_means(values: torch.Tensor, slices: Iterable[slice]) -> list[float]:
    """Mean over each group, in float64; NaN for an empty group."""
    values = float64(values).cpu()  # one transfer, not one per group
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


def summary(
    f: torch.Tensor, split: Split, loss: Loss, train_shares: Sequence[float]
) -> dict[str, float]:
    """Loss and accuracy of outputs f on a split: average, worst, adjusted, per group.

    `worst_*` is over the non-empty groups; `adjusted_acc` weights the group accuracies with the
    shares of the training split (Sagawa et al., 2020), NaN when a group with a share is empty
    here. `minority_acc` is over the samples that go against the shortcut (`Split.in_minority`),
    `majority_acc` over the others; NaN without such samples.
    """
    right, minority = float64(correct(f, split.y)).cpu(), split.in_minority.cpu()
    losses = group_means(loss.value(f, split.y), split.slices)
    accuracies = group_means(right, split.slices)
    nonempty = [g for g, count in enumerate(split.counts) if count]
    result = {
        "avg_loss": weighted(losses, split.shares),
        "worst_loss": worst(max, [losses[g] for g in nonempty]),
        "avg_acc": weighted(accuracies, split.shares),
        "worst_acc": worst(min, [accuracies[g] for g in nonempty]),
        "adjusted_acc": weighted(accuracies, train_shares),
        # The mean of no samples is NaN.
        "minority_acc": right[minority].mean().item(),
        "majority_acc": right[~minority].mean().item(),
    }
    for g in range(len(split.counts)):
        result[f"group_{g}_loss"] = losses[g]
        result[f"group_{g}_acc"] = accuracies[g]
    return result


def task_summaries(
    f: torch.Tensor, split: Split, tasks: Sequence[Task], loss: Loss, train: Split
) -> dict[str, float]:
    """`summary` of every task's outputs (N, T), with the task's name before each quantity.

    Without a name: means over the tasks, for `worst_*` the worst task's.
    """
    by_task = []
    for t, task in enumerate(tasks):
        order, part = split.of_task(t, task)
        shares = train.of_task(t, task)[1].shares
        by_task.append(summary(f[order, t], part, loss, shares))
    result = {}
    for name in QUANTITIES:
        values = [found[name] for found in by_task]
        extreme = {"worst_loss": max, "worst_acc": min}.get(name)
        result[name] = worst(extreme, values) if extreme else math.fsum(values) / len(values)
    for task, found in zip(tasks, by_task):
        result |= {f"{task.name}_{name}": value for name, value in found.items()}
    return result


def weighted(values: Iterable[float], weights: Iterable[float]) -> float:
    """Σ w_g v_g over the groups with a weight: an empty group without one (NaN) has no effect."""
    return math.fsum(w * v for w, v in zip(weights, values) if w)


def worst(extreme: Callable, values: Sequence[float]) -> float:
    """`extreme` (max or min) of the values, NaN when any of them is."""
    return math.nan if any(math.isnan(v) for v in values) else extreme(values)


def group_losses(summary: dict[str, float]) -> list[float]:
    """The mean losses R_g in a summary, in the order of the groups."""
    is_group_loss = re.compile(r"group_\d+_loss").fullmatch
    return [value for name, value in summary.items() if is_group_loss(name)]
