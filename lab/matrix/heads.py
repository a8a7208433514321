"""One MLP a task on the same features, all trained in one batched run.

Every head has the initial parameters, the batches and the steps of ERM that it would have in a run
of its own, so that it comes out the same up to rounding: the batches of an epoch derive from (seed,
epoch), and only the order in which a run stores its samples, group by group, depends on the task.
"""

import logging
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.func import functional_call, vmap

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics
from lab.networks import building
from lab.system import files, memory
from lab.system.command import Stopped, whole_step
from lab.system.errors import ConfigError
from lab.training import checkpoints, recording, schedule

log = logging.getLogger(f"spurious.{__name__}")

FILE = "heads.pt"
STATE = {"epoch", "step", "blocks", "optimizers", "data"}
BLOCK_BYTES = 2**24  # of weights of heads at once on a CPU: more leave its caches, and are slower


class Heads(nn.Module):
    """K MLPs of one configuration and initialisation: every parameter stacked, (K, …)."""

    def __init__(self, config: Config, inputs: int, count: int):
        super().__init__()
        self.mlp = building.build(config, (inputs,))
        for layer in cast(nn.ModuleList, self.mlp.layers):
            for name, one in list(layer.named_parameters()):
                stacked = one.detach().repeat(count, *[1] * one.dim())
                if one.dim() == 2:  # in the layout of its gradient, which is not copied then
                    stacked = stacked.mT.contiguous().mT
                setattr(layer, name, nn.Parameter(stacked, requires_grad=one.requires_grad))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs f (K, B) of inputs (K, B, d), or of the same (B, d) for all heads."""

        def one(parameters, x):
            return functional_call(self.mlp, parameters, (x,))

        return vmap(one, (0, 0 if x.dim() == 3 else None))(dict(self.mlp.named_parameters()), x)


def train(
    features: torch.Tensor,
    labels: torch.Tensor,
    orders: torch.Tensor,
    config: Config,
    folder: Path,
    data: str,
    names: list[str],
) -> list[Heads]:
    """Trained heads for K tasks on the features (N, d); continues from `heads.pt`, if it exists.

    They come in blocks, in the order of the tasks.

    labels: (N, K) of -1 and +1; orders: (K, N), where in `features` the samples are that a task's
    own run would store, in its order; data: a fingerprint of all this; names: of the tasks. Raises
    `Diverged` when parameters turn NaN or infinite, `DataError` for a checkpoint of other data.
    """
    return _Training(features, labels, orders, config, folder, data, names).all_epochs()


class _Training:
    def __init__(self, features, labels, orders, config, folder, data, names):
        size = _at_once(config, features.shape[1], len(orders), features.device)
        _check_memory(config, features.shape[1], *orders.shape, size)
        self.features, self.labels, self.orders = features, labels, orders
        self.config, self.folder, self.data, self.names = config, folder, data, names
        self.parts = torch.arange(len(orders)).split(size)
        self.blocks = [
            Heads(config, features.shape[1], len(part)).to(features.device) for part in self.parts
        ]
        self.optimizers = [schedule.build_optimizer(heads.mlp, config) for heads in self.blocks]
        self.loss = config.loss.load()
        self.epoch = self.step = 0  # the last whole one, and steps done since then

    def all_epochs(self) -> list[Heads]:
        self.restore()
        every = self.config.checkpoint_every
        try:
            while self.epoch < self.config.epochs:
                losses = self.train_epoch(self.epoch + 1)
                with whole_step():
                    self.epoch, self.step = self.epoch + 1, 0
                self.check_finite()
                worst = int(losses.argmax())
                log.info(
                    "epoch %d/%d  mean loss %.3g, the largest %.3g of %s",
                    *(self.epoch, self.config.epochs, losses.mean(), losses[worst]),
                    self.names[worst],
                )
                if self.epoch == self.config.epochs or (every and self.epoch % every == 0):
                    self.checkpoint()
        except Stopped as stop:
            if not stop.torn:  # else the state is neither the last step's nor the next one's
                self.checkpoint()
            raise
        return self.blocks

    def train_epoch(self, epoch: int) -> torch.Tensor:
        """The remaining steps of an epoch; mean losses (K,) of the heads over them."""
        config = self.config
        for group in (group for one in self.optimizers for group in one.param_groups):
            group["lr"] = group["initial_lr"] * schedule.learning_rate_factor(config, epoch)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "batches", epoch))
        order = torch.randperm(self.orders.shape[1], generator=generator)
        batches = list(enumerate(order.split(config.train_batch_size), 1))[self.step :]
        total = torch.zeros(len(self.orders), device=self.features.device)
        for i, places in batches:
            with whole_step():
                for heads, optimizer, tasks in zip(self.blocks, self.optimizers, self.parts):
                    total[tasks] += self.train_step(heads, optimizer, tasks, places)
                self.step = i
        return (total / max(1, len(batches))).cpu()

    def train_step(self, heads, optimizer, tasks, places) -> torch.Tensor:
        """One step of the heads of these tasks; returns their losses."""
        rows = self.orders[tasks][:, places]
        optimizer.zero_grad()
        losses = self.loss.value(heads(self.features[rows]), self.labels[rows, tasks[:, None]])
        losses = losses.mean(1)
        losses.sum().backward()  # the heads share nothing: each gets its own gradient
        optimizer.step()
        return losses.detach()

    def check_finite(self) -> None:
        for heads, tasks in zip(self.blocks, self.parts):
            for head, task in enumerate(tasks.tolist()):
                if not all(p[head].isfinite().all() for p in heads.parameters()):
                    raise recording.Diverged(
                        f"learning_rate: the network for {self.names[task]} is not finite at epoch "
                        f"{self.epoch} with learning rate {self.config.learning_rate:g}; lower it"
                    )

    def checkpoint(self) -> None:
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "blocks": [heads.state_dict() for heads in self.blocks],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "data": self.data,
        }
        files.save(self.folder / FILE, partial(torch.save, state))

    def restore(self) -> None:
        path = self.folder / FILE
        if not path.exists():
            return
        try:
            state = checkpoints.read(path, STATE)
        except Exception as error:  # damaged bytes can raise anything in torch
            raise checkpoints.Unusable(
                f"{path}: not readable ({error}); remove it to start over"
            ) from None
        checkpoints.check_data(state, self.data, self.folder)
        if len(state["blocks"]) != len(self.blocks):
            raise checkpoints.Unusable(
                f"{path}: written on another kind of device; resume there, "
                "or remove it to start over"
            )
        for mine, kept in (
            (self.blocks, state["blocks"]),
            (self.optimizers, state["optimizers"]),
        ):
            for one, values in zip(mine, kept, strict=True):
                one.load_state_dict(values)
        self.epoch, self.step = state["epoch"], state["step"]
        where = f"epoch {self.epoch}, step {self.step}" if self.step else f"epoch {self.epoch}"
        log.info("Continuing from %s", where)


def _weights(config: Config, inputs: int) -> int:
    """Weights of one head."""
    width = config.hidden_dim
    return width * (inputs + (config.num_hidden_layers - 1) * width + 1)


def _at_once(config: Config, inputs: int, count: int, device: torch.device) -> int:
    """How many of the heads are one block: all of them, except on a CPU."""
    if device.type != "cpu":
        return count
    return min(count, max(1, BLOCK_BYTES // (4 * _weights(config, inputs))))


def _check_memory(config: Config, inputs: int, count: int, samples: int, at_once: int) -> None:
    """Raises `ConfigError` if the heads and a batch of each in a block do not fit the memory."""
    width, depth, available = config.hidden_dim, config.num_hidden_layers, memory.available()
    kept = memory.training_bytes(_weights(config, inputs), config.optimizer, config.momentum)
    batch = 4 * min(config.train_batch_size or samples, samples) * (inputs + 3 * depth * width)
    needed = count * kept + at_once * batch
    if config.device != "cuda" and available and needed > available:
        raise ConfigError(
            f"hidden_dim, num_hidden_layers, train_batch_size: given {width}, {depth}, "
            f"{config.train_batch_size}, which for {count} tasks at once is "
            f"{memory.shown(needed)}, but {memory.shown(available)} are available; allowed: less"
        )


@torch.no_grad()
def correct(
    blocks: list[Heads], features: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """(N, K) bool, which heads classify which samples correctly: one pass over features (N, d).

    blocks: what `train` returns; labels: (N, K) of -1 and +1.
    """
    batches = features.split(batch_size)
    f = torch.cat([torch.cat([heads(x) for heads in blocks]) for x in batches], dim=1)
    return metrics.correct(f.flatten(), labels.T.flatten()).view(f.shape).T
