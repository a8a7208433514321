"""Group-structured splits: what every data set is loaded to, and everything downstream takes."""

import hashlib
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

import groups
from composites import Composites
from pictures import Pictures


@dataclass
class Split:
    """Samples of one split, stored group by group (so that a group is a slice, not a copy).

    inputs: (N, ...) float32, indexable by slices and index tensors: a tensor, or pictures that
    are made when indexed (use `metrics.batches` to have that done ahead); y, a: (N,), -1 or +1 in
    float32, or class indices in int64; counts: samples per group, in the order of `Splits.cells`;
    minority: for every group whether it goes against the shortcut, None = where y != a.
    """

    inputs: torch.Tensor | Pictures | Composites
    y: torch.Tensor
    a: torch.Tensor
    counts: list[int]
    minority: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def group(self) -> torch.Tensor:
        """Group index of every sample, (N,) int64."""
        return torch.repeat_interleave(torch.tensor(self.counts, device=self.y.device))

    @property
    def in_minority(self) -> torch.Tensor:
        """Which samples go against the shortcut, (N,) bool."""
        if self.minority is None:
            return self.y != self.a
        return torch.tensor(self.minority, device=self.y.device)[self.group]

    @property
    def slices(self) -> list[slice]:
        """Where each group stands."""
        ends = np.cumsum(self.counts).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts)]

    @property
    def shares(self) -> list[float]:
        """Share π_g of every group."""
        return groups.shares(self.counts)

    @property
    def moments(self) -> groups.Moments:
        """E[Y], E[A] and Cov(Y, A), where there are four groups."""
        return groups.moments(self.counts)

    def to(self, device) -> "Split":
        inputs, y, a = (part.to(device) for part in (self.inputs, self.y, self.a))
        return replace(self, inputs=inputs, y=y, a=a)

    def subset(self, index: torch.Tensor, counts: list[int]) -> "Split":
        """The samples at these indices, which have these group counts; pictures stay undecoded."""
        there = isinstance(self.inputs, torch.Tensor)
        inputs = self.inputs[index] if there else self.inputs.subset(index)
        return replace(self, inputs=inputs, y=self.y[index], a=self.a[index], counts=counts)

    def augmented(self, seed: int) -> "Split":
        """The split with randomly changed pictures for training; itself if its inputs have none.

        What happens to a sample depends on the seed and on its place in the split only.
        """
        if not hasattr(self.inputs, "augmented"):
            return self
        return replace(self, inputs=self.inputs.augmented(seed))

    def digest(self) -> str:
        """SHA-256 of the inputs' content, the labels, the attributes and the group counts."""
        found = hashlib.sha256(repr(self.counts).encode())
        for values in (self.y, self.a, self.inputs):
            if isinstance(values, torch.Tensor):
                found.update(f"{values.dtype} {tuple(values.shape)}".encode())
                found.update(values.cpu().flatten().numpy())
            else:
                found.update(values.identity.encode())
        return found.hexdigest()


@dataclass
class Splits:
    """All splits of an experiment. All but `train` and `test` may be missing.

    target: a small unbiased set for methods that train on it; dfr: the data for retraining;
    more: further evaluation sets by name.
    cells: (y, a) of every group; num_classes: labels that there are.
    masks: (G, H, W) bool, for every group the pixels on which its shortcut is drawn, or None.
    samples: arrays `pictures` (M, H, W, C) in [0, 1], `y`, `a`, `group`, for looking at.
    skipped: for some splits, the samples of each group that were left out as unreadable.
    facts: where the data came from, as plain data.
    """

    train: Split
    test: Split
    group_names: list[str]
    val: Split | None = None
    target: Split | None = None
    dfr: Split | None = None
    cells: tuple[tuple[int, int], ...] = groups.GROUPS
    num_classes: int = 2
    more: dict[str, Split] = field(default_factory=dict)
    masks: torch.Tensor | None = None
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def named(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        present = {name: split for name, split in present.items() if isinstance(split, Split)}
        return present | self.more

    def evaluated(self) -> dict[str, Split]:
        """The splits on which the network is evaluated: all but DFR's."""
        return {name: split for name, split in self.named().items() if name != "dfr"}

    def changed(self, change) -> "Splits":
        """The same with `change(name, split)` in place of every split."""
        changed = {name: change(name, split) for name, split in self.named().items()}
        more = {name: changed.pop(name) for name in self.more}
        return replace(self, **changed, more=more)

    def to(self, device) -> "Splits":
        """The same splits with their tensors on `device`."""
        moved = self.changed(lambda _, split: split.to(device))
        moved.masks = None if self.masks is None else self.masks.to(device)
        return moved

    def fingerprint(self) -> str:
        """SHA-256 that changes with any sample, label, attribute or count of any split."""
        contents = {name: split.digest() for name, split in self.named().items()}
        return hashlib.sha256(repr(contents).encode()).hexdigest()

    def count_rows(self) -> list[dict]:
        """Rows of `group_counts.csv`."""
        return [
            {
                "split": name,
                "group": g,
                "y": self.cells[g][0],
                "a": self.cells[g][1],
                "name": self.group_names[g],
                "count": split.counts[g],
                "share": split.shares[g],
                "skipped": self.skipped.get(name, [0] * len(split.counts))[g],
            }
            for name, split in self.named().items()
            for g in range(len(split.counts))
        ]
