"""Simple data balancing: classes or groups sampled equally often, or cut to equal size.

Idrissi et al., "Simple data balancing achieves competitive worst-group-accuracy", 2022.
"""

import math

import numpy as np
import torch

from lab.config.seeds import derive_seed
from lab.methods import entropy
from lab.methods.erm import ERM, even_weights
from lab.splits import groups


def classes(split) -> torch.Tensor:
    """Class index of every sample, of several tasks the index of its pattern of labels, (N,)."""
    dim = 0 if split.y.dim() > 1 else None
    return torch.unique(split.y, dim=dim, return_inverse=True)[1]


def label_shares(split, tasks) -> torch.Tensor:
    """How likely each class (or pattern of labels) is to be when the classes are equally likely."""
    if split.y.dim() == 1:
        present = len(split.y.unique())
        return torch.full((present,), 1 / present, dtype=torch.float64)
    patterns, counts = torch.unique(split.y.cpu(), dim=0, return_counts=True)
    names = [task.name for task in tasks]
    weights = entropy.pattern_weights(patterns.numpy(), counts.numpy(), names)
    return torch.from_numpy(weights * counts.numpy())


class RWG(ERM):
    """Batches are drawn with replacement, so that every non-empty group is as likely as another."""

    def cells(self, split) -> torch.Tensor:
        """Which samples are balanced against each other: the index of a set for each, (N,)."""
        return split.group

    def flow_weights(self, group_losses, counts) -> list[float]:
        return even_weights(counts)

    def shares(self, sizes: torch.Tensor) -> torch.Tensor:
        """How likely each set is to be drawn, from their sizes, (sets,)."""
        return (sizes > 0).double()

    def order(self, generator) -> torch.Tensor:
        """As many draws as there are samples: a set by its share, then one of its samples."""
        cell = self.cells(self.source).cpu()
        sizes = torch.bincount(cell)
        shares = self.shares(sizes)
        drawn = torch.multinomial(shares, len(cell), replacement=True, generator=generator)
        members = torch.argsort(cell, stable=True)
        starts = sizes.cumsum(0) - sizes
        within = torch.rand(len(cell), generator=generator, dtype=torch.float64) * sizes[drawn]
        return members[starts[drawn] + within.long()]


class RWY(RWG):
    """Batches are drawn with replacement, so that every class is as likely as another.

    Of several tasks those of each task are, with the weights of maximal entropy.
    """

    def __init__(self, config, splits):
        super().__init__(config, splits)
        self.label_shares = label_shares(splits.train, splits.tasks)

    def cells(self, split) -> torch.Tensor:
        return classes(split)

    def shares(self, sizes: torch.Tensor) -> torch.Tensor:
        return self.label_shares

    def flow_weights(self, group_losses, counts) -> list[float]:
        labels = [y for y, _ in self.splits.cells]
        sizes = {label: sum(n for n, y in zip(counts, labels) if y == label) for label in labels}
        present = sum(size > 0 for size in sizes.values())
        return [n / (present * sizes[y]) if n else 0.0 for n, y in zip(counts, labels)]


class SUBG(ERM):
    """ERM on a random subset in which all groups are as large as the smallest non-empty one."""

    def __init__(self, config, splits):
        super().__init__(config, splits)
        train = splits.train
        rng = np.random.default_rng(derive_seed(config.seed, "subset"))
        rows = np.sort(self.chosen(train, rng))  # so that groups stay together
        group = train.group.cpu().numpy()
        counts = np.bincount(group[rows], minlength=len(train.counts)).tolist()
        self.subset = train.subset(torch.from_numpy(rows).to(train.y.device), counts)

    def cells(self, split) -> torch.Tensor:
        return split.group

    def chosen(self, train, rng) -> np.ndarray:
        """The rows of the subset."""
        cell = self.cells(train).cpu().numpy()
        sizes = np.bincount(cell)
        smallest = sizes[sizes > 0].min()
        chosen = [rng.permutation(np.flatnonzero(cell == c))[:smallest] for c in range(len(sizes))]
        return np.concatenate(chosen)

    @property
    def source(self):
        return self.subset

    def flow_weights(self, group_losses, counts) -> list[float]:
        return [math.nan] * len(counts)  # the gradients are of a part of the training split

    def step_weights(self, group_losses) -> list[float]:
        return groups.shares(self.source.counts)


class SUBY(SUBG):
    """ERM on a random subset in which all classes are as large as the smallest one.

    Of several tasks a sample with the weight w of maximal entropy stays with probability w/max w.
    """

    def cells(self, split) -> torch.Tensor:
        return classes(split)

    def chosen(self, train, rng) -> np.ndarray:
        if train.y.dim() == 1:
            return super().chosen(train, rng)
        pattern = classes(train).cpu().numpy()
        weights = label_shares(train, self.splits.tasks).numpy() / np.bincount(pattern)
        kept = rng.random(len(pattern)) < weights[pattern] / weights.max()
        return np.flatnonzero(kept)
