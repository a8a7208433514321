"""Just train twice: training samples that a first network got wrong count many times.

Liu et al., "Just Train Twice: Improving Group Robustness without Training Group Information", 2021.
The first stage, which finds these samples, is `lab.training.identification`.
"""

import math

import torch

from lab.methods.erm import ERM


class JTT(ERM):
    """ERM in which every sample appears `Splits.repeats` times an epoch."""

    def flow_weights(self, group_losses, counts) -> list[float]:
        return [math.nan] * len(counts)  # weights differ within a group

    def order(self, generator) -> torch.Tensor:
        repeats = self.splits.repeats.cpu()
        rows = torch.arange(len(repeats)).repeat_interleave(repeats)
        return rows[torch.randperm(len(rows), generator=generator)]
