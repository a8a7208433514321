"""Simple data balancing: classes or groups sampled equally often, or cut to equal size.

Idrissi et al., "Simple data balancing achieves competitive worst-group-accuracy", 2022.
"""

import math

import numpy as np
import torch

import groups
from config import derive_seed
from methods.erm import ERM


def classes(split) -> torch.Tensor:
    """Class index of every group of a split's cells, from the labels of its samples, (N,)."""
    return torch.unique(split.y, return_inverse=True)[1]


class RWG(ERM):
    """Batches are drawn with replacement, so that every non-empty group is as likely as another."""

    samples = True

    def cells(self, split) -> torch.Tensor:
        """Which samples are balanced against each other: the index of a set for each, (N,)."""
        return split.group

    def flow_weights(self, group_losses, counts) -> list[float]:
        there = sum(count > 0 for count in counts)
        return [float(count > 0) / there for count in counts]

    def order(self, generator) -> torch.Tensor:
        """As many draws as there are samples, with probability 1/(sets · samples of its set)."""
        cell = self.cells(self.source).cpu()
        sizes = torch.bincount(cell)
        # A set uniformly, then one of its samples: exact, and no table of a probability a sample.
        there = torch.nonzero(sizes)[:, 0]
        drawn = there[torch.randint(len(there), (len(cell),), generator=generator)]
        members = torch.argsort(cell, stable=True)
        starts = sizes.cumsum(0) - sizes
        within = torch.rand(len(cell), generator=generator, dtype=torch.float64) * sizes[drawn]
        return members[starts[drawn] + within.long()]


class RWY(RWG):
    """Batches are drawn with replacement, so that every class is as likely as another."""

    def cells(self, split) -> torch.Tensor:
        return classes(split)

    def flow_weights(self, group_losses, counts) -> list[float]:
        labels = [y for y, _ in self.splits.cells]
        sizes = {label: sum(n for n, y in zip(counts, labels) if y == label) for label in labels}
        there = sum(size > 0 for size in sizes.values())
        return [n / (there * sizes[y]) if n else 0.0 for n, y in zip(counts, labels)]


class SUBG(ERM):
    """ERM on a random subset in which all groups are as large as the smallest non-empty one."""

    def __init__(self, config, splits):
        super().__init__(config, splits)
        train = splits.train
        cell = self.cells(train).cpu().numpy()
        rng = np.random.default_rng(derive_seed(config.seed, "subset"))
        sizes = np.bincount(cell)
        smallest = sizes[sizes > 0].min()
        chosen = [rng.permutation(np.flatnonzero(cell == c))[:smallest] for c in range(len(sizes))]
        rows = np.sort(np.concatenate(chosen))  # so that groups stay together
        group = train.group.cpu().numpy()
        counts = np.bincount(group[rows], minlength=len(train.counts)).tolist()
        self.subset = train.subset(torch.from_numpy(rows).to(train.y.device), counts)

    def cells(self, split) -> torch.Tensor:
        return split.group

    @property
    def source(self):
        return self.subset

    def flow_weights(self, group_losses, counts) -> list[float]:
        return [math.nan] * len(counts)  # the gradients are of a part of the training split

    def step_weights(self, group_losses) -> list[float]:
        return groups.shares(self.source.counts)


class SUBY(SUBG):
    """ERM on a random subset in which all classes are as large as the smallest one."""

    def cells(self, split) -> torch.Tensor:
        return classes(split)
