"""How far training is, apart from what the network, its optimizer and its method hold."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lab.config.schema import Config

Summaries = dict[str, dict[str, float]]  # by split, see `metrics.summary`
Matrices = tuple[np.ndarray | None, np.ndarray | None]  # K, and K of the Jacobian norms


@dataclass
class State:
    """The position of training after a whole step.

    epoch: the last one that is recorded, -1 before the first; step: steps done since then;
    summaries, table_sizes: of that epoch, and of the tables then; lowest: (validation loss, epoch)
    of the smallest validation loss so far; best: epoch, score and summaries of the best epoch on
    validation data, {} without such data; grams: Gram matrices by epoch.
    """

    epoch: int = -1
    step: int = 0
    summaries: Summaries = field(default_factory=dict)
    table_sizes: dict[str, int] = field(default_factory=dict)
    lowest: tuple[float, int] = (math.inf, 0)
    best: dict[str, Any] = field(default_factory=dict)
    grams: dict[int, Matrices] = field(default_factory=dict)

    def end_step(self, step: int) -> None:
        """The step of this number, from 1, is done; called as a part of it."""
        self.step = step

    def end_epoch(self, epoch: int, summaries: Summaries, table_sizes: dict[str, int]) -> None:
        """The epoch is trained, evaluated and recorded."""
        loss = summaries.get("val", {}).get("avg_loss", math.inf)
        self.lowest = min(self.lowest, (loss, epoch))
        self.epoch, self.step = epoch, 0
        self.summaries, self.table_sizes = summaries, table_sizes

    def out_of_patience(self, config: Config) -> bool:
        """Whether the validation loss has not decreased for `early_stopping_patience` epochs."""
        patience = config.early_stopping_patience
        return patience is not None and self.epoch - self.lowest[1] >= patience

    def finished(self, config: Config) -> bool:
        """Whether no epoch is left."""
        return self.epoch >= config.epochs or self.out_of_patience(config)

    def checkpoint_is_due(self, config: Config) -> bool:
        """Whether a checkpoint is to be written after this epoch."""
        every = config.checkpoint_every
        return self.finished(config) or bool(every and self.epoch and self.epoch % every == 0)
