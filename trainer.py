"""The training loop: epochs, evaluation, analyses when due, checkpoints.

Every epoch, 0 (before the first step) included, ends with a row in `training_history.csv` and,
when analyses are due, their rows in `analysis.csv`.
"""

import logging
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import analysis
import files
import methods
import metrics
from analysis import Analyses
from config import Config, derive_seed
from data_loader import Split, Splits
from errors import UserError
from model import parameter_groups

log = logging.getLogger(f"spurious.{__name__}")

KEPT_CHECKPOINTS = 2
PLAIN_LINES = 100  # at most about so many progress lines where there is no terminal


class Diverged(UserError):
    """The loss became infinite or NaN; the tables up to there are kept."""


def build_optimizer(model, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW with the learning rates of the parametrisation."""
    groups = parameter_groups(model, config)
    if config.optimizer == "SGD":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def minibatch_epoch(model, optimizer, split: Split, loss, batch_size: int, seed: int) -> None:
    """One pass over the split in random batches; every step follows the batch's mean loss."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator).to(split.y.device)
    for _, index, x in metrics.batches(split, enumerate(order.split(batch_size))):
        optimizer.zero_grad()
        loss.value(model(x), split.y[index]).mean().backward()
        optimizer.step()


def full_batch_step(model, optimizer, split: Split, loss, weights, batch_size: int) -> None:
    """One step along -Σ w_g ∇R_g over the whole split, `batch_size` samples in memory at once."""
    model.train()
    optimizer.zero_grad()
    plan = metrics.group_batches(split, batch_size, model)
    plan = [(g, batch) for g, batch in plan if weights[g]]
    for g, batch, x in metrics.batches(split, plan):
        losses = loss.value(model(x), split.y[batch])
        (losses.sum() * (weights[g] / split.counts[g])).backward()
    optimizer.step()


def train(model, splits: Splits, config: Config, run) -> dict[str, dict[str, float]]:
    """Train the network and record everything in the run (a `tracking.Run`).

    Returns the last epoch's summaries (see `metrics.summary`) by split. Raises `Diverged` when
    the loss turns NaN or infinite, after recording that epoch.
    """
    return _Training(model, splits, config, run).all_epochs()


class _Training:
    def __init__(self, model, splits: Splits, config: Config, run):
        self.model, self.splits, self.config, self.run = model, splits, config, run
        self.loss = metrics.LOSSES[config.loss_function]
        self.method = methods.build(config, splits.train.counts)
        self.optimizer = build_optimizer(model, config)
        self.analyses = Analyses(config, splits)
        batch = config.train_batch_size
        self.full_batch = self.method.full_batch or batch is None or batch >= len(splits.train)
        # Where an epoch is one plain gradient step, the gap's change can be held against theory.
        self.plain_step = (
            self.full_batch
            and config.optimizer == "SGD"
            and config.momentum == 0
            and config.weight_decay == 0
            and config.jacobian_num_samples is None
            and config.gradient_gram_num_samples is None
        )
        self.summaries: dict[str, dict[str, float]] = {}
        self.grams: dict[int, tuple] = {}  # epoch -> (K, K_jacobian)

    def all_epochs(self):
        try:
            with _Progress(self.config.epochs) as progress:
                for epoch in range(self.config.epochs + 1):
                    if epoch:
                        with self.run.timed("training", epoch):
                            self.train_epoch(epoch)
                    with self.run.timed("evaluation and analyses", epoch):
                        self.record(epoch)
                    progress.show(epoch, self.summaries)
                    self.checkpoint(epoch)
        finally:
            self.save_grams()
        with files.complete(self.run.folder / "model.pt") as temporary:
            _save(self.model.state_dict(), temporary)
        return self.summaries

    def train_epoch(self, epoch: int) -> None:
        train, config = self.splits.train, self.config
        losses = metrics.group_losses(self.summaries["train"])
        self.method.advance(losses)
        if self.full_batch:
            full_batch_step(
                self.model, self.optimizer, train, self.loss, self.weights, config.eval_batch_size
            )
        else:
            seed = derive_seed(config.seed, "batches", epoch)
            minibatch_epoch(
                self.model, self.optimizer, train, self.loss, config.train_batch_size, seed
            )

    def record(self, epoch: int) -> None:
        """Evaluate, analyse what is due, write the rows."""
        before, config = self.summaries, self.config
        measurement = self.analyses.measure(self.model, epoch)
        self.summaries = self.evaluate(measurement)
        losses = metrics.group_losses(self.summaries["train"])
        finite = math.isfinite(self.summaries["train"]["avg_loss"])
        train = self.splits.train
        # The weights of the step from here to the next epoch.
        self.weights = (
            self.method.flow_weights(losses, train.counts) if finite else [math.nan] * len(losses)
        )
        row = {"epoch": epoch}
        for name, summary in self.summaries.items():
            row |= {f"{name}_{quantity}": value for quantity, value in summary.items()}
        row |= {f"flow_weight_{g}": weight for g, weight in enumerate(self.weights)}
        self.run.history(row)
        if epoch and self.plain_step:
            self.run.analysis(self.analyses.measured_rows(epoch - 1, self.change_since(before)))
        if not finite:
            raise self.diverged(epoch)
        self.run.analysis(self.analyses.rows(measurement, self.method, losses))
        if epoch == config.epochs or not self.plain_step:
            unknown = self.analyses.measured_rows(epoch, lambda *_: math.nan)
            self.run.analysis(unknown)
        if measurement.K is not None or measurement.K_jacobian is not None:
            self.grams[epoch] = (measurement.K, measurement.K_jacobian)

    def diverged(self, epoch: int) -> Diverged:
        loss, rate = self.summaries["train"]["avg_loss"], self.config.learning_rate
        if epoch == 0:
            return Diverged(
                f"activation_function: the training loss of the untrained network is {loss} (epoch "
                f"0, learning rate {rate:g}); take another activation_function or "
                "initialization_method, fewer num_hidden_layers, or normalize_inputs: true"
            )
        return Diverged(
            f"learning_rate: the training loss is {loss} at epoch {epoch} with learning rate "
            f"{rate:g}; lower it"
        )

    def evaluate(self, measurement) -> dict[str, dict[str, float]]:
        """Summaries of all splits; outputs that the analyses already computed are used again."""
        summaries = {}
        for name, split in self.splits.evaluated().items():
            f = measurement.outputs.get(name)
            if f is None:
                f = metrics.outputs(self.model, split, self.config.eval_batch_size)
            summaries[name] = metrics.summary(f, split, self.loss, self.splits.train.shares)
        return summaries

    def change_since(self, before):
        """change(side, g1, g2): what one step did to the loss gap, by the learning rate."""

        def gap(summaries, side, g1, g2):
            losses = metrics.group_losses(summaries[side])
            return losses[g1] - losses[g2]

        def change(side, g1, g2):
            now, then = gap(self.summaries, side, g1, g2), gap(before, side, g1, g2)
            return (now - then) / self.config.learning_rate

        return change

    def checkpoint(self, epoch: int) -> None:
        every = self.config.checkpoint_every
        if not every or epoch == 0 or epoch % every:
            return
        folder = self.run.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        state = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state(),
        }
        with files.complete(folder / f"epoch_{epoch:07d}.pt") as temporary:
            _save(state, temporary)
        for old in sorted(folder.glob("epoch_*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def save_grams(self) -> None:
        """Write `gram.npz`: epochs (E,), labels (16,), K (E, 16, 16).

        With sample caps that differ, `K_jacobian` holds the matrices of the Jacobian norms.
        """
        if not self.grams:
            return
        unknown = np.full((2 * analysis.ROWS, 2 * analysis.ROWS), np.nan)

        def stacked(which):
            return np.stack([unknown if Ks[which] is None else Ks[which] for Ks in found])

        found = list(self.grams.values())

        arrays = {"epochs": np.array(list(self.grams)), "labels": np.array(analysis.labels())}
        arrays["K"] = stacked(0)
        if not self.analyses.one_pass:
            arrays["K_jacobian"] = stacked(1)
        with files.complete(self.run.folder / "gram.npz") as temporary:
            np.savez(temporary, **arrays)


def _save(state: dict, path) -> None:
    # Through an open file: by name, torch would write the temporary name into the file.
    with open(path, "wb") as file:
        torch.save(state, file)


class _Progress:
    """One live bar on a terminal, plain log lines elsewhere."""

    def __init__(self, epochs: int):
        self.epochs, self.live = epochs, sys.stderr.isatty()
        self.every = 1 if self.live else max(1, math.ceil(epochs / PLAIN_LINES))
        self.start = time.perf_counter()

    def __enter__(self):
        self.bar = tqdm(
            total=self.epochs,
            disable=not self.live,
            dynamic_ncols=True,
            bar_format="epoch {n_fmt}/{total_fmt} {bar} {desc} {remaining} left",
        )
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, epoch: int, summaries) -> None:
        train, test = summaries["train"], summaries["test"]
        text = (
            f"loss {train['avg_loss']:.3g}, test {test['avg_loss']:.3g}, "
            f"test worst acc {test['worst_acc']:.3f}"
        )
        if self.live:
            self.bar.n = epoch
            self.bar.set_description_str(text)
        if epoch % self.every == 0 or epoch == self.epochs:
            left = (time.perf_counter() - self.start) / (epoch + 1) * (self.epochs - epoch)
            level = logging.DEBUG if self.live else logging.INFO
            log.log(level, "epoch %d/%d  %s  %.0f s left", epoch, self.epochs, text, left)
