"""What is evaluated and written at the end of every epoch."""

import math
from typing import Any

from lab.analyses.measuring import Analyses, Measurement
from lab.config.schema import Config
from lab.evaluation import metrics, predictions
from lab.methods.erm import ERM
from lab.splits.splits import Splits
from lab.system.errors import UserError
from lab.training.run import Run
from lab.training.state import Summaries
from lab.training.steps import is_plain_step


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
        self.run.analysis(self.analyses.rows(measurement, self.method, losses))
        if not self.plain_step:
            self._write_unknown(epoch)
        self._write_method(epoch)
        return summaries, measurement

    def end(self, epoch: int) -> None:
        """The row that is still missing when training ends after this epoch."""
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
        return summaries

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
