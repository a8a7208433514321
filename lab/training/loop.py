"""The training loop: epochs, evaluation, analyses when due, checkpoints.

Every epoch, 0 (before the first step) included, ends with a row in `training_history.csv` and,
when analyses are due, their rows in `analysis.csv`.

A checkpoint holds the state after a whole step, and how long the tables were when the last whole
epoch was recorded. Training that goes on from it repeats, bit for bit, what an uninterrupted one
does: batches derive from (seed, epoch), so no generator's state has to survive.
"""

import logging
import math
import zipfile
from functools import partial

import numpy as np
import torch

from lab import methods
from lab.analyses import gram
from lab.analyses.measuring import Analyses
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics, predictions
from lab.networks.building import parameter_groups
from lab.splits.splits import Split, Splits
from lab.system import distributed, files
from lab.system.command import Stopped, whole_step
from lab.system.errors import DataError, UserError
from lab.system.progress import Progress
from lab.training import checkpoints

log = logging.getLogger(f"spurious.{__name__}")

PLAIN_LINES = 100  # at most about so many progress lines where there is no terminal


class Diverged(UserError):
    """The loss became infinite or NaN; the tables up to there are kept."""

    final = True  # resuming would only repeat it


def build_optimizer(model, config: Config, more=()) -> torch.optim.Optimizer:
    """SGD or AdamW with the learning rates of the parametrisation; more: further parameters."""
    groups = parameter_groups(model, config)
    if more:
        groups.append({"params": list(more), "lr": config.learning_rate})
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.optimizer == "SGD":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate_factor(config: Config, epoch: int) -> float:
    """By what the scheduler multiplies the learning rate in an epoch (from 1).

    cosine: (1 + cos(π·(epoch - 1)/epochs))/2 (Loshchilov & Hutter, 2017), from 1 towards 0.
    """
    if config.scheduler == "none":
        return 1.0
    return (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2


def has_batch_norm(model) -> bool:
    """Whether training mode looks at the statistics of a batch."""
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def minibatch_epoch(
    model, optimizer, split: Split, loss, batch_size: int | None, seed: int, method=None, first=0,
    after_step=None,
) -> None:  # fmt: skip
    """One epoch in random batches of the split; every step follows the method's batch loss.

    batch_size: None = all that the method takes in an epoch at once; method: None for ERM, one
    pass and the batch's mean loss; first: steps to leave out;
    after_step(i): called after the i-th step, as a part of it. Of several processes each takes its
    part of a batch.
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


def full_batch_step(model, optimizer, split: Split, loss, weights, batch_size: int) -> None:
    """One step along -Σ w_g ∇R_g over the whole split, `batch_size` samples in memory at once."""
    model.train()
    optimizer.zero_grad()
    plan = predictions.group_batches(split, batch_size, model)
    plan = [(g, batch) for g, batch in plan if weights[g]]
    for g, batch, x in predictions.batches(split, plan):
        losses = loss.value(model(x), split.y[batch])
        (losses.sum() * (weights[g] / split.counts[g])).backward()
    optimizer.step()


def train(model, splits: Splits, config: Config, run) -> tuple[dict, dict]:
    """Train the network and record everything in the run (a `tracking.Run`).

    Goes on from the run's last checkpoint, if there is one. Returns the last epoch's summaries
    (see `metrics.summary`) by split, and {"epoch", "score", "summaries"} of the epoch with the
    best validation accuracy (`selection_metric`), {} without validation data. Raises `Diverged`
    when the loss turns NaN or infinite, after recording that epoch.

    Ends after `epochs`, or when `early_stopping_patience` is over. Raises `DataError` for a
    patience without validation data.
    """
    return _Training(model, splits, config, run).all_epochs()


class _Training:
    def __init__(self, model, splits: Splits, config: Config, run):
        self.model, self.splits, self.config, self.run = model, splits, config, run
        self.loss = config.loss.load()
        self.method = methods.build(config, splits)
        self.optimizer = build_optimizer(model, config, self.method.prepare(model))
        self.analyses = Analyses(config, splits)
        self.data = splits.fingerprint()
        self.full_batch = takes_full_batch(config, self.method)
        # Where an epoch is one plain gradient step, the gap's change can be held against theory.
        self.plain_step = (
            self.full_batch
            and config.optimizer == "SGD"
            and config.momentum == 0
            and config.weight_decay == 0
            and config.scheduler == "none"
            and self.method.source is splits.train
            and not config.data_augmentation
            and config.jacobian_num_samples is None
            and config.gradient_gram_num_samples is None
        )
        self.checkpoints = run.folder / "checkpoints"
        self.leads = distributed.rank() == 0  # the one rank that writes
        if config.early_stopping_patience and splits.val is None:
            raise DataError(
                f"early_stopping_patience: given {config.early_stopping_patience}, but there are "
                "no validation data; raise num_val_samples, or take null"
            )
        if config.best_epoch_by == "minority_acc" and splits.val and not has_minority(splits):
            raise DataError(
                "best_epoch_by: given minority_acc, but the validation data hold no sample of a "
                "minority group (of every task, if there are several); raise num_val_samples, or "
                "take worst_acc or avg_acc"
            )
        self.lowest = (math.inf, 0)  # validation loss so far, and its epoch
        self.best: dict = {}  # epoch, score and summaries of the best epoch on validation data
        self.epoch = -1  # the last one that is recorded
        self.step = 0  # steps done since then
        self.summaries: dict[str, dict[str, float]] = {}  # of the last recorded epoch
        self.sizes: dict[str, int] = {}  # of the tables then
        self.grams: dict[int, tuple] = {}  # epoch -> (K, K_jacobian)

    def all_epochs(self):
        self.restore()
        try:
            with Progress(
                log,
                "epoch {done}/{total}  {text}  {left:.0f} s left",
                self.config.epochs,
                start=self.epoch,
                bar="epoch {n_fmt}/{total_fmt} {bar} {desc} {remaining} left",
                every_steps=max(1, math.ceil(self.config.epochs / PLAIN_LINES)),
            ) as progress:
                while not self.finished:
                    epoch = self.epoch + 1
                    if epoch:
                        with self.run.timed("training", epoch):
                            self.train_epoch(epoch)
                    with self.run.timed("evaluation and analyses", epoch):
                        self.record(epoch)
                    progress.show(epoch, shown(self.summaries))
                    if self.checkpoint_is_due():
                        self.checkpoint()
            if self.out_of_patience:
                log.info(
                    "Training ended at epoch %d: the validation loss was lowest at epoch %d",
                    *(self.epoch, self.lowest[1]),
                )
        except Stopped as stop:
            if not stop.torn:  # else the state is neither the last step's nor the next one's
                self.checkpoint()
            raise
        except Diverged:
            self.save_grams()
            raise
        if self.plain_step:
            # Of the last epoch; a longer run, resumed from the last checkpoint, knows it.
            self.run.analysis(self.analyses.measured_rows(self.epoch, lambda *_: math.nan))
        if self.leads:
            files.save(self.run.folder / "model.pt", partial(torch.save, self.model.state_dict()))
        return self.summaries, self.best

    @property
    def out_of_patience(self) -> bool:
        """Whether the validation loss has not become smaller for so many epochs."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.epoch - self.lowest[1] >= patience

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.out_of_patience

    def train_epoch(self, epoch: int) -> None:
        source, config = self.method.source, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(config, epoch)
        if config.data_augmentation:
            source = source.augmented(derive_seed(config.seed, "augmentation", epoch))
        if not self.full_batch:
            self.method.start_epoch(epoch, self.step)
            seed = derive_seed(config.seed, "batches", epoch)
            minibatch_epoch(
                self.model, self.optimizer, source, self.loss, config.train_batch_size, seed,
                self.method,
                first=self.step, after_step=self.stepped,
            )  # fmt: skip
        elif self.step == 0:
            losses = metrics.group_losses(self.summaries["train"])
            weights = self.method.step_weights(losses)
            with whole_step():
                self.method.advance(losses)
                full_batch_step(
                    self.model, self.optimizer, source, self.loss, weights, config.eval_batch_size
                )
                self.step = 1

    def stepped(self, steps: int) -> None:
        """So many steps of this epoch are done; called as a part of the step."""
        self.step = steps

    def record(self, epoch: int) -> None:
        """Evaluate, analyse what is due, write the rows."""
        config = self.config
        measurement = self.analyses.measure(self.model, epoch)
        summaries = self.evaluate(measurement)
        losses = metrics.group_losses(summaries["train"])
        finite = math.isfinite(summaries["train"]["avg_loss"])
        train = self.splits.train
        weights = [math.nan] * len(losses)
        if finite and losses:  # of the step from here to the next epoch
            weights = self.method.flow_weights(losses, train.counts)
        row = {"epoch": epoch}
        for name, summary in summaries.items():
            row |= {f"{name}_{quantity}": value for quantity, value in summary.items()}
        row |= {f"flow_weight_{g}": weight for g, weight in enumerate(weights)}
        self.run.history(row)
        last_layer = self.model.classifier.named_parameters()
        self.run.histograms(epoch, {f"classifier/{name}": p.detach() for name, p in last_layer})
        if epoch and self.plain_step:
            change = self.change(self.summaries, summaries)
            self.run.analysis(self.analyses.measured_rows(epoch - 1, change))
        if not finite:
            raise self.diverged(epoch, summaries["train"]["avg_loss"])
        self.run.analysis(self.analyses.rows(measurement, self.method, losses))
        if not self.plain_step:
            self.run.analysis(self.analyses.measured_rows(epoch, lambda *_: math.nan))
        self.run.analysis(
            [
                {"epoch": epoch, "split": "train", "analysis": config.debias_method, "pair": "",
                 "quantity": quantity, "value": value}
                for quantity, value in self.method.measured().items()
            ]
        )  # fmt: skip
        self.keep_best(epoch, summaries)
        if measurement.K is not None or measurement.K_jacobian is not None:
            self.grams[epoch] = (measurement.K, measurement.K_jacobian)
        loss = summaries.get("val", {}).get("avg_loss", math.inf)
        with whole_step():
            self.method.end_epoch(summaries)
            self.lowest = min(self.lowest, (loss, epoch))
            self.epoch, self.step, self.summaries = epoch, 0, summaries
            self.sizes = self.run.sizes()

    def diverged(self, epoch: int, loss: float) -> Diverged:
        rate = self.config.learning_rate
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
                f = predictions.outputs(self.model, split, self.config.eval_batch_size)
            train, tasks = self.splits.train, self.splits.tasks
            if len(tasks) > 1:
                found = metrics.task_summaries(f, split, tasks, self.loss, train)
            else:
                found = metrics.summary(f, split, self.loss, train.shares)
            summaries[name] = found
        return summaries

    def change(self, before, after):
        """change(side, g1, g2): what one step did to the loss gap, by the learning rate."""

        def gap(summaries, side, g1, g2):
            losses = metrics.group_losses(summaries[side])
            return losses[g1] - losses[g2]

        def change(side, g1, g2):
            now, then = gap(after, side, g1, g2), gap(before, side, g1, g2)
            return (now - then) / self.config.learning_rate

        return change

    def keep_best(self, epoch: int, summaries) -> None:
        """Keep the network in `checkpoints/best.pt` when validation accuracy is the best so far."""
        if "val" not in summaries:
            return
        score = summaries["val"][selection_metric(self.splits, self.config)]
        if score > self.best.get("score", -math.inf):
            best = {"epoch": epoch, "score": score, "summaries": summaries}
            if self.leads:
                state = best | {"model": self.model.state_dict(), "data": self.data}
                checkpoints.write_best(self.checkpoints, state)
            self.best = best

    def checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        return self.finished or bool(every and self.epoch and self.epoch % every == 0)

    def checkpoint(self) -> None:
        """Write the state after the last whole step, unless nothing is recorded yet."""
        if self.epoch < 0 or not self.leads:
            return
        self.save_grams()
        self.run.sync()
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state(),
            "summaries": self.summaries,
            "best": self.best,
            "lowest": self.lowest,
            "table_sizes": self.sizes,
            "gram_epochs": list(self.grams),
            "data": self.data,
        }
        checkpoints.write(self.checkpoints, state)

    def restore(self) -> None:
        """Go on from the last checkpoint, or from the beginning if there is none."""
        state = checkpoints.latest(self.checkpoints, self.run)
        if state:
            checkpoints.check_data(state, self.data, self.run.folder)
        distributed.barrier()  # all have read before the first rank writes
        sizes, epoch = (state["table_sizes"], state["epoch"]) if state else ({}, -1)
        self.run.rewind(sizes, epoch)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state(state["method"])
        self.epoch, self.step, self.summaries = state["epoch"], state["step"], state["summaries"]
        self.sizes, self.best = state["table_sizes"], state["best"]
        self.lowest = state["lowest"]
        self.load_grams(state["gram_epochs"])
        where = f"epoch {self.epoch}, step {self.step}" if self.step else f"epoch {self.epoch}"
        log.info("Continuing from %s", where)

    def save_grams(self) -> None:
        """Write `gram.npz`: epochs (E,), labels (16,), K (E, 16, 16).

        With sample caps that differ, `K_jacobian` holds the matrices of the Jacobian norms.
        """
        if not self.grams or not self.leads:
            return
        unknown = np.full((2 * gram.ROWS, 2 * gram.ROWS), np.nan)

        def stacked(which):
            return np.stack([unknown if Ks[which] is None else Ks[which] for Ks in found])

        found = list(self.grams.values())

        arrays = {"epochs": np.array(list(self.grams)), "labels": np.array(gram.labels())}
        arrays["K"] = stacked(0)
        if not self.analyses.one_pass:
            arrays["K_jacobian"] = stacked(1)
        files.save(self.run.folder / "gram.npz", lambda file: np.savez(file, **arrays))

    def load_grams(self, epochs: list[int]) -> None:
        """Take back the matrices of these epochs from what `save_grams` wrote."""
        if not epochs:
            return
        path = self.run.folder / "gram.npz"
        try:
            with np.load(path, allow_pickle=False) as kept:
                K, K_jacobian = kept["K"], kept.get("K_jacobian", [None] * len(kept["K"]))
                found = dict(zip(kept["epochs"].tolist(), zip(K, K_jacobian)))
            self.grams = {epoch: found[epoch] for epoch in epochs}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise checkpoints.Useless(
                f"{path}: missing or damaged ({error}); to start over, remove {self.checkpoints}"
            ) from None


def takes_full_batch(config: Config, method) -> bool:
    """Whether an epoch is one step on the whole split.

    Not with batch norm, which needs the groups mixed: there the whole split is one batch; nor where
    samples are weighted by drawing them, or several tasks are weighted.
    """
    size = config.train_batch_size
    drawn = config.method.draws_samples
    if config.network.batch_norm or drawn or len(method.splits.tasks) > 1:
        return False
    by_groups = config.method.weights_groups and config.group_batches == "full"
    return by_groups or size is None or size >= len(method.source)


def selection_metric(splits: Splits, config: Config) -> str:
    """What the best epoch is chosen by: `best_epoch_by`, else the worst of four groups, of more
    the minority.

    The worst of a hundred groups with a handful of samples each says nothing. Without a minority
    in the validation data the groups that are there are few again: one a label.
    """
    if config.best_epoch_by:
        return config.best_epoch_by
    few = len(splits.cells) <= 4 or not has_minority(splits)
    return "worst_acc" if few else "minority_acc"


def has_minority(splits: Splits) -> bool:
    """Whether validation data have samples that go against the shortcut, of every task."""
    val, tasks = splits.val, splits.tasks
    parts = [val.of_task(t, task)[1] for t, task in enumerate(tasks)] if len(tasks) > 1 else [val]
    return all(part.in_minority.any() for part in parts)


def shown(summaries) -> str:
    """The losses and the accuracy of an epoch that the progress bar shows."""
    train, test = summaries["train"], summaries["test"]
    name, accuracy = "worst", test["worst_acc"]
    if len(metrics.group_losses(test)) > 4 and not math.isnan(test["minority_acc"]):
        # The worst of many small groups says nothing.
        name, accuracy = "minority", test["minority_acc"]
    return (
        f"loss {train['avg_loss']:.3g}, test {test['avg_loss']:.3g}, test {name} acc {accuracy:.3f}"
    )
