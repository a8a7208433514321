"""How far training is, on the console: losses and accuracies of the last epoch, time left."""

import logging
import math

from lab.evaluation import metrics
from lab.system.progress import Progress
from lab.training.state import Summaries

log = logging.getLogger(f"spurious.{__name__}")

PLAIN_LINES = 100  # at most about so many progress lines without a terminal


def text(summaries: Summaries) -> str:
    """The losses, and the test accuracy of the worst group, of many groups of the minority."""
    train, test = summaries["train"], summaries["test"]
    name, accuracy = "worst", test["worst_acc"]
    # The worst of many small groups means nothing.
    if len(metrics.group_losses(test)) > 4 and not math.isnan(test["minority_acc"]):
        name, accuracy = "minority", test["minority_acc"]
    losses = f"loss {train['avg_loss']:.3g}, test {test['avg_loss']:.3g}"
    return f"{losses}, test {name} acc {accuracy:.3f}"


def progress_of(done: int, epochs: int) -> Progress:
    """The progress of training. done: the last recorded epoch."""
    return Progress(
        log,
        "epoch {done}/{total}  {text}  {left:.0f} s left",
        epochs,
        start=done,
        bar="epoch {n_fmt}/{total_fmt} {bar} {desc} {remaining} left",
        every_steps=max(1, math.ceil(epochs / PLAIN_LINES)),
    )
