"""Empirical risk minimisation: every sample counts the same."""

import math

import torch

from lab.methods.task_weights import TaskWeights
from lab.splits import groups
from lab.system import distributed
from lab.system.errors import DataError


def _unknown_flow(self, group_losses, counts) -> list[float]:
    """NaN for every group: no weights of the groups are known that make up the flow."""
    return [math.nan] * len(counts)


def _unknown_step(self, group_losses) -> list[float]:
    """NaN for every group: a step follows `batch_loss` only."""
    return [math.nan] * len(self.counts)


class ERM:
    """Base of all methods. The flow of ERM is -∇R = -Σ π_g ∇R_g.

    A subclass that changes what a step follows (`STEP`) has no known flow until it gives its own
    `flow_weights`: they are NaN, and the whole split is one batch where others step group by group.
    """

    STEP = ("batch_loss", "backward", "order", "source")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls)
        if "flow_weights" not in own and any(name in own for name in ERM.STEP):
            cls.flow_weights = _unknown_flow  # type: ignore[method-assign]
            if "step_weights" not in own:
                cls.step_weights = _unknown_step  # type: ignore[method-assign]
        elif "flow_weights" in own and cls.step_weights is _unknown_step:
            cls.step_weights = ERM.step_weights  # type: ignore[method-assign]

    def __init__(self, config, splits):
        """splits: a `splits.Splits`; raises `DataError` if they do not suit the method."""
        self.config, self.splits = config, splits
        self.counts = list(splits.train.counts)
        self.tasks = TaskWeights(config, splits)

    @property
    def source(self):
        """The split that batches come from."""
        return self.splits.train

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Indices into `source`, in the order in which an epoch takes them, on the CPU."""
        return torch.randperm(len(self.source), generator=generator)

    def flow_weights(self, group_losses, counts) -> list[float]:
        """Weights w_g of the flow -Σ w_g ∇R_g on the training split; NaN if it is no such flow.

        group_losses: mean losses R_g on the training split before the step; counts: samples per
        group of the split whose gradients are weighted (training's own for a step). Changes
        nothing.
        """
        return groups.shares(counts)

    def step_weights(self, group_losses) -> list[float]:
        """Weights w_g of a full-batch step on `source`."""
        return self.flow_weights(group_losses, self.source.counts)

    def advance(self, group_losses) -> None:
        """Update the method's state before a full-batch step from the mean losses R_g."""

    def batch_loss(self, losses, group):
        """What a step on a batch follows, from its losses (B,) and group indices (B,).

        With several processes these are this rank's part; the steps follow the sum over ranks.
        """
        return losses.mean() if not distributed.grouped() else losses.sum() / _size(losses)

    def prepare(self, model) -> list:
        """Build what is trained besides the network; returns its parameters."""
        return []

    def start_epoch(self, epoch: int, first: int) -> None:
        """Called before the steps of an epoch from the step `first` on."""
        self.tasks.start_epoch(first)

    def end_epoch(self, summaries) -> None:
        """Called after every epoch's evaluation, with its summaries by split."""
        self.tasks.end_epoch(summaries, self.splits)

    def backward(self, model, loss, x, y, group) -> None:
        """Fill the gradients for a step on a batch: inputs x (B, ...), labels y, groups (B,)."""
        losses = self.tasks.combine(loss.value(model(x), y))
        self.batch_loss(losses, group).backward()
        distributed.sum_gradients(model.parameters())

    def measured(self) -> dict[str, float]:
        """What the method measured in the epoch's steps so far: {quantity: value}."""
        return {}

    def state(self) -> dict:
        """What a checkpoint has to hold of the method."""
        return self.tasks.state()

    def load_state(self, state: dict) -> None:
        """Take back what `state` gave."""
        self.tasks.load_state(state)


class ERMTarget(ERM):
    """ERM on the target set alone: small, but without the spurious correlation."""

    def __init__(self, config, splits):
        super().__init__(config, splits)
        if splits.target is None:
            raise DataError(
                f"debias_method: {config.debias_method} trains on a target set, which these "
                "settings do not make; raise val_target_size"
            )

    @property
    def source(self):
        return self.splits.target

    def step_weights(self, group_losses) -> list[float]:
        return groups.shares(self.source.counts)


def even_weights(counts) -> list[float]:
    """The same weight for every non-empty group, 0 for the others; they add up to 1."""
    nonempty = sum(count > 0 for count in counts)
    return [float(count > 0) / nonempty for count in counts]


def _size(losses) -> int:
    """Samples of the whole batch, over all ranks."""
    return int(distributed.total(losses.new_tensor([len(losses)])).item())
