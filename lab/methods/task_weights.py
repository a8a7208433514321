"""How the losses of several tasks add up to one.

The loss of a sample is Σ_t w_t·ℓ_t. w is fixed (`task_weights`); or balances the losses (Liu et
al., "Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning", 2019): in
every step w_t = (L_t/L_t⁰)^α, with L_t the batch's mean loss and L_t⁰ that of the epoch's first
batch; or follows how spurious the tasks are (`task_weighting: delta`): in every epoch the softmax
of δ_t/100. None of them carries a gradient.
"""

import math

import torch

from lab.evaluation import shortcuts
from lab.system import distributed


class TaskWeights:
    """The weights of an experiment's tasks; with one task they do nothing."""

    def __init__(self, config, splits):
        self.config, self.tasks = config, splits.tasks
        self.weights = list(config.task_weights or [1.0] * len(self.tasks))
        self.first: list[float] | None = None  # mean losses of the epoch's first batch

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (B,) of the samples from those of their tasks, (B, T); (B,) stay as they are.

        With several processes these are this rank's samples.
        """
        if losses.dim() == 1:
            return losses
        weights = self.weights
        if self.config.loss_balanced_task_weighting:
            sums = torch.cat([losses.detach().sum(0), losses.new_tensor([len(losses)])])
            *totals, size = distributed.total(sums).tolist()
            means = [value / size for value in totals]
            self.first = means if self.first is None else self.first
            now, then = (torch.tensor(x, dtype=torch.float64) for x in (means, self.first))
            # A task without any loss at first has none to be balanced.
            weights = torch.where(then > 0, (now / then) ** self.config.lbtw_alpha, 1.0).tolist()
        return losses @ losses.new_tensor(weights)

    def start_epoch(self, first: int) -> None:
        """Called before the steps of an epoch from the step `first` on."""
        if first == 0:
            self.first = None

    def end_epoch(self, summaries: dict[str, dict[str, float]], splits) -> None:
        """Take the weights of the next epoch from this one's validation accuracies."""
        if self.config.task_weighting != "delta" or len(self.tasks) == 1:
            return
        deltas = []
        for t, task in enumerate(self.tasks):
            _, val = splits.val.of_task(t, task)
            found = [summaries["val"][f"{task.name}_group_{g}_acc"] for g in range(4)]
            right = [a * n if n else 0.0 for a, n in zip(found, val.counts)]
            delta = shortcuts.delta(right, val.counts)
            deltas.append(0.0 if math.isnan(delta) else delta)
        self.weights = torch.softmax(torch.tensor(deltas).double() / 100, 0).tolist()

    def state(self) -> dict:
        """What a checkpoint has to hold; nothing with one task."""
        if len(self.tasks) == 1:
            return {}
        return {"task_weights": self.weights, "first_losses": self.first}

    def load_state(self, state: dict) -> None:
        """Take back what `state` gave."""
        if len(self.tasks) > 1:
            self.weights, self.first = state["task_weights"], state["first_losses"]
