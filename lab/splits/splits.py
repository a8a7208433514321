"""Group-structured splits: what every data set is loaded to, and everything downstream takes."""

import hashlib
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from lab.splits import groups
from lab.splits.composites import Composites
from lab.splits.pictures import Pictures


@dataclass
class Task:
    """A question to the network: its groups, the cells (y, a), and their names.

    minority: which groups go against the shortcut; None: those whose attribute is not their label.
    """

    name: str
    cells: tuple[tuple[int, int], ...]
    group_names: list[str]
    minority: tuple[bool, ...] | None = None


@dataclass
class Split:
    """Samples of one split, stored group by group (so that a group is a slice, not a copy).

    inputs: (N, ...) float32, indexable by slices and index tensors: a tensor, or pictures that
    are made when indexed (`predictions.batches` does so ahead of use); y, a: (N,), -1 or +1 in
    float32, or class indices in int64; counts: samples per group, in the order of `Splits.cells`;
    minority: which groups go against the shortcut, None: those whose attribute is not their label.

    Of several tasks y and a are (N, tasks), task_groups (N, tasks) has the group of each, and the
    samples are stored group by group of the first.
    """

    inputs: torch.Tensor | Pictures | Composites
    y: torch.Tensor
    a: torch.Tensor
    counts: list[int]
    minority: tuple[bool, ...] | None = None
    task_groups: torch.Tensor | None = None

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
        return self._with(lambda part: part.to(device), self.inputs.to(device), self.counts)

    def _with(self, change, inputs, counts) -> "Split":
        """With other inputs and counts, and every tensor of labels changed."""
        return replace(
            self,
            inputs=inputs,
            y=change(self.y),
            a=change(self.a),
            counts=counts,
            task_groups=None if self.task_groups is None else change(self.task_groups),
        )

    def subset(self, index: torch.Tensor, counts: list[int]) -> "Split":
        """The samples at these indices, which have these group counts; pictures stay undecoded."""
        there = isinstance(self.inputs, torch.Tensor)
        inputs = self.inputs[index] if there else self.inputs.subset(index)
        return self._with(lambda part: part[index], inputs, counts)

    def of_task(self, t: int, task: Task) -> tuple[torch.Tensor, "Split"]:
        """(order, the labels of task t in this order, group by group), where there are several."""
        group = self.task_groups[:, t]
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=len(task.cells)).tolist()
        part = replace(
            self,
            y=self.y[order, t],
            a=self.a[order, t],
            counts=counts,
            minority=task.minority,
            task_groups=None,
        )
        return order, part

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
    evaluation_sets: further evaluation sets by name.
    cells: (y, a) of every group; num_classes: labels that there are.
    masks: (G, H, W) bool, for every group the pixels on which its shortcut is drawn, or None.
    samples: arrays `pictures` (M, H, W, C) in [0, 1], `y`, `a`, `group`, for looking at.
    skipped: for some splits, the samples of each group that were left out as unreadable.
    facts: where the data came from, as plain data. repeats: (N,) int64, how often a method takes
    each training sample in an epoch, if samples count differently. tasks: all of them, the first
    with these cells and group names; by default it is the only one.
    """

    train: Split
    test: Split
    group_names: list[str]
    val: Split | None = None
    target: Split | None = None
    dfr: Split | None = None
    cells: tuple[tuple[int, int], ...] = groups.GROUPS
    num_classes: int = 2
    evaluation_sets: dict[str, Split] = field(default_factory=dict)
    masks: torch.Tensor | None = None
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    repeats: torch.Tensor | None = None
    tasks: list[Task] = field(default_factory=list)

    def __post_init__(self):
        if not self.tasks:
            self.tasks = [Task("label", self.cells, self.group_names)]

    def named(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        present = {name: split for name, split in present.items() if isinstance(split, Split)}
        return present | self.evaluation_sets

    def evaluated(self) -> dict[str, Split]:
        """The splits on which the network is evaluated: all but DFR's."""
        return {name: split for name, split in self.named().items() if name != "dfr"}

    def changed(self, change) -> "Splits":
        """The same with `change(name, split)` in place of every split."""
        changed = {name: change(name, split) for name, split in self.named().items()}
        further = {name: changed.pop(name) for name in self.evaluation_sets}
        return replace(self, **changed, evaluation_sets=further)

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
        """Rows of `group_counts.csv`: the groups of every task in every split."""
        rows = []
        for name, split in self.named().items():
            for t, task in enumerate(self.tasks):
                part = split.of_task(t, task)[1] if len(self.tasks) > 1 else split
                skipped = self.skipped.get(name) if t == 0 else None
                rows += [
                    {
                        "split": name,
                        "group": g,
                        "y": task.cells[g][0],
                        "a": task.cells[g][1],
                        "name": task.group_names[g],
                        "count": part.counts[g],
                        "share": part.shares[g],
                        "skipped": skipped[g] if skipped else 0,
                        "task": task.name,
                    }
                    for g in range(len(part.counts))
                ]
        return rows
