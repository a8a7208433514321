"""How far training is, on the console: one live bar on a terminal, plain log lines elsewhere."""

import logging
import math
import sys
import time

from tqdm import tqdm

from lab.evaluation import metrics
from lab.system import distributed
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


class Progress:
    """Shows every epoch's metrics and the time that is left. done: the last recorded epoch."""

    def __init__(self, done: int, epochs: int):
        self.done, self.epochs, self.live = done, epochs, sys.stderr.isatty()
        self.every = 1 if self.live else max(1, math.ceil(epochs / PLAIN_LINES))
        self.start = time.perf_counter()

    def __enter__(self) -> "Progress":
        self.bar = tqdm(
            total=self.epochs,
            disable=not self.live or distributed.rank() > 0,
            dynamic_ncols=True,
            bar_format="epoch {n_fmt}/{total_fmt} {bar} {desc} {remaining} left",
        )
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def show(self, epoch: int, summaries: Summaries) -> None:
        """Show the metrics of an epoch that has just been recorded."""
        shown = text(summaries)
        if self.live:
            self.bar.n = epoch
            self.bar.set_description_str(shown)
        if epoch % self.every == 0 or epoch == self.epochs:
            each = (time.perf_counter() - self.start) / (epoch - self.done)
            left = each * (self.epochs - epoch)
            level = logging.DEBUG if self.live else logging.INFO
            log.log(level, "epoch %d/%d  %s  %.0f s left", epoch, self.epochs, shown, left)
