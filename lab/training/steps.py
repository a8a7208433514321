"""The steps of an epoch: random batches, or one step on the whole split, along the method."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import Loss
from lab.methods.erm import ERM
from lab.splits.splits import Split
from lab.system import distributed
from lab.system.command import whole_step
from lab.training.schedule import build_optimizer, set_learning_rates
from lab.training.state import State


class Steps:
    """Trains the network epoch by epoch; holds its optimizer."""

    def __init__(self, model: nn.Module, method: ERM, config: Config):
        self.model, self.method, self.config = model, method, config
        self.loss = config.loss.load()
        self.optimizer = build_optimizer(model, config, method.prepare(model))
        self.full_batch = takes_full_batch(config, method)

    def train_epoch(self, epoch: int, state: State) -> None:
        """The steps of an epoch (from 1) that are left; each is noted in the state."""
        config, method, source = self.config, self.method, self.method.source
        set_learning_rates(self.optimizer, config, epoch)
        if config.data_augmentation:
            source = source.augmented(derive_seed(config.seed, "augmentation", epoch))
        if not self.full_batch:
            method.start_epoch(epoch, state.step)
            seed = derive_seed(config.seed, "batches", epoch)
            minibatch_epoch(
                self.model, self.optimizer, source, self.loss, config.train_batch_size, seed,
                method, first=state.step, after_step=state.end_step,
            )  # fmt: skip
        elif state.step == 0:
            losses = metrics.group_losses(state.summaries["train"])
            weights = method.step_weights(losses)
            with whole_step():
                method.advance(losses)
                full_batch_step(
                    self.model, self.optimizer, source, self.loss, weights, config.eval_batch_size
                )
                state.end_step(1)


def takes_full_batch(config: Config, method: ERM) -> bool:
    """Whether an epoch is one step on the whole split.

    Not with batch norm, which needs the groups mixed: there the whole split is one batch; nor where
    samples are weighted by drawing them, several tasks are weighted, or the method has no weights
    of groups for a step.
    """
    size = config.train_batch_size
    drawn = config.method.draws_samples
    if config.network.batch_norm or drawn or len(method.splits.tasks) > 1:
        return False
    if any(math.isnan(weight) for weight in method.step_weights([0.0] * len(method.counts))):
        return False
    by_groups = config.method.weights_groups and config.group_batches == "full"
    return by_groups or size is None or size >= len(method.source)


def is_plain_step(config: Config, method: ERM) -> bool:
    """Whether an epoch is one gradient step on the whole training split, without anything else.

    Then the change of the gap between groups can be compared with what theory predicts.
    """
    return (
        takes_full_batch(config, method)
        and config.optimizer == "SGD"
        and config.momentum == 0
        and config.weight_decay == 0
        and config.scheduler == "none"
        and method.source is method.splits.train
        and not config.data_augmentation
        and config.jacobian_num_samples is None
        and config.gradient_gram_num_samples is None
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether training mode uses the statistics of a batch."""
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def minibatch_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    loss: Loss,
    batch_size: int | None,
    seed: int,
    method: ERM | None = None,
    first: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """One epoch in random batches of the split; every step follows the method's batch loss.

    batch_size: None = all that the method takes in an epoch at once; method: None for ERM, one
    pass and the batch's mean loss; first: steps to leave out; after_step(i): called after the i-th
    step, as a part of it. Of several processes each takes its part of a batch.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed)
    if method is None:
        order = torch.randperm(len(split), generator=generator)
    else:
        order = method.order(generator)
    whole = list(order.to(split.y.device).split(batch_size or len(order)))
    if len(whole) > 1 and len(whole[-1]) == 1 and has_batch_norm(model):
        whole[-2:] = [torch.cat(whole[-2:])]  # a single sample has no variance
    parts = (batch[distributed.rank() :: distributed.world()] for batch in whole)
    group = split.group
    for i, index, x in predictions.batches(split, list(enumerate(parts, 1))[first:]):
        with whole_step():
            optimizer.zero_grad()
            if method is None:
                loss.value(model(x), split.y[index]).mean().backward()
            else:
                method.backward(model, loss, x, split.y[index], group[index])
            optimizer.step()
            if after_step:
                after_step(i)


def full_batch_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    loss: Loss,
    weights: Sequence[float],
    batch_size: int,
) -> None:
    """One step along -Σ w_g ∇R_g over the whole split, `batch_size` samples in memory at once."""
    model.train()
    optimizer.zero_grad()
    batches = predictions.group_batches(split, batch_size, model)
    plan = [(g, batch) for g, batch in batches if weights[g]]
    for g, batch, x in predictions.batches(split, plan):
        losses = loss.value(model(x), split.y[batch])
        (losses.sum() * (weights[g] / split.counts[g])).backward()
    optimizer.step()
