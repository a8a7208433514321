"""What is evaluated and written at the end of every epoch."""

import logging
import math
from typing import Any

import torch

from lab.analyses.measuring import Analyses, Measurement
from lab.config.schema import Config
from lab.evaluation import metrics, predictions
from lab.methods.erm import ERM
from lab.splits.splits import Splits
from lab.system.errors import UserError
from lab.training.run import Run
from lab.training.state import Summaries
from lab.training.steps import is_plain_step

log = logging.getLogger(f"spurious.{__name__}")


class Diverged(UserError):
    """The loss became infinite or NaN; the tables up to there are kept."""

    final = True  # resuming would only repeat it


class Recorder:
    """Evaluates the network, makes the analyses that are due, and writes both to the run."""

    def __init__(self, model: Any, method: ERM, splits: Splits, config: Config, run: Run):
        self.model, self.method, self.splits = model, method, splits
        self.config, self.run = config, run
        self.loss = config.loss.load()
        self.analyses = Analyses(config, splits)
        self.plain_step = is_plain_step(config, method)
        self.train_outputs: torch.Tensor | None = None  # of the last epoch

    def record(self, epoch: int, before: Summaries) -> tuple[Summaries, Measurement]:
        """The rows of an epoch; returns what they are from.

        before: the summaries of the epoch before. Raises `Diverged`, after the row of the history,
        when the training loss is NaN or infinite.
        """
        measurement = self.analyses.measure(self.model, epoch)
        summaries = self.evaluate(measurement)
        self._write_history(epoch, summaries)
        if epoch and self.plain_step:
            self._write_measured(epoch - 1, before, summaries)
        loss = summaries["train"]["avg_loss"]
        if not math.isfinite(loss):
            raise _diverged(epoch, loss, self.config.learning_rate)
        losses = metrics.group_losses(summaries["train"])
        if epoch == 0:
            self.warn(epoch, summaries["train"]["avg_acc"])
        self.run.analysis(self.analyses.rows(measurement, self.method, losses))
        if not self.plain_step:
            self._write_unknown(epoch)
        self._write_method(epoch)
        return summaries, measurement

    def end(self, epoch: int, summaries: Summaries) -> None:
        """The rows and warnings that are still missing when training ends after this epoch."""
        if epoch > 0:
            self.warn(epoch, summaries["train"]["avg_acc"])
        if self.plain_step:
            # A longer run, resumed from the last checkpoint, measures it.
            self._write_unknown(epoch)

    def evaluate(self, measurement: Measurement) -> Summaries:
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
            if name == "train":
                self.train_outputs = f
        return summaries

    def warn(self, epoch: int, average: float) -> None:
        """Report outputs on training data that are no predictions.

        average: the training accuracy. Before training these are outputs that are all 0, each
        wrong (see `metrics.correct`); after it also one class for every sample, or an accuracy
        below half of what guessing gives.
        """
        f = self.train_outputs
        if f is None:  # nothing was evaluated: the run was finished before it was resumed
            return
        if not f.any():
            level = logging.WARNING if epoch else logging.INFO
            log.log(
                level,
                "Epoch %d: all outputs are 0, so that no class is predicted and all is wrong",
                epoch,
            )
            return
        if not epoch or len(self.splits.tasks) > 1:
            return
        classes = f.argmax(1) if self.config.loss.class_outputs else f > 0
        if (classes == classes[0]).all() and len(self.splits.train.y.unique()) > 1:
            log.warning("Epoch %d: the network predicts one class for all training samples", epoch)
        elif average < 0.5 / self.splits.num_classes:
            log.warning("Epoch %d: the training accuracy is %.3f, below chance", epoch, average)

    def _write_history(self, epoch: int, summaries: Summaries) -> None:
        """The row of `training_history.csv`, and the last layer's histograms."""
        losses = metrics.group_losses(summaries["train"])
        weights = [math.nan] * len(losses)
        if losses and math.isfinite(summaries["train"]["avg_loss"]):
            # Of the step from here to the next epoch.
            weights = self.method.flow_weights(losses, self.splits.train.counts)
        row: dict[str, float] = {"epoch": epoch}
        for name, summary in summaries.items():
            row |= {f"{name}_{quantity}": value for quantity, value in summary.items()}
        row |= {f"flow_weight_{g}": weight for g, weight in enumerate(weights)}
        self.run.history(row)
        last_layer = self.model.classifier.named_parameters()
        self.run.histograms(epoch, {f"classifier/{name}": p.detach() for name, p in last_layer})

    def _write_measured(self, epoch: int, before: Summaries, after: Summaries) -> None:
        """What the step after this epoch did to the loss gaps, by the learning rate."""

        def gap(summaries: Summaries, side: str, g1: int, g2: int) -> float:
            losses = metrics.group_losses(summaries[side])
            return losses[g1] - losses[g2]

        def change(side: str, g1: int, g2: int) -> float:
            now, then = gap(after, side, g1, g2), gap(before, side, g1, g2)
            return (now - then) / self.config.learning_rate

        self.run.analysis(self.analyses.measured_rows(epoch, change))

    def _write_unknown(self, epoch: int) -> None:
        """NaN for `measured`: the epoch after this one is no plain gradient step, or not made."""
        self.run.analysis(self.analyses.measured_rows(epoch, lambda *_: math.nan))

    def _write_method(self, epoch: int) -> None:
        """What the method itself measured in the epoch's steps."""
        about = {"epoch": epoch, "split": "train", "analysis": self.config.debias_method}
        rows = [
            about | {"pair": "", "quantity": quantity, "value": value}
            for quantity, value in self.method.measured().items()
        ]
        self.run.analysis(rows)


def _diverged(epoch: int, loss: float, rate: float) -> Diverged:
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
