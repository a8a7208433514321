"""Group-structured splits: what every data set is loaded to, and everything downstream takes."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

from lab.splits import groups


class LazyInputs(Protocol):
    """Inputs (N, ...) that are made when they are indexed, such as `Pictures` and `Composites`."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def max_batch(self) -> int:
        """The largest batch for evaluation and analyses."""

    @property
    def identity(self) -> str:
        """A text that changes with the inputs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index) -> torch.Tensor:
        """The inputs at a slice or an index tensor, float32."""

    def batches(self, indices: Iterable) -> Iterator[torch.Tensor]:
        """Yields `self[index]` for every index, in order, prepared ahead of use."""

    def to(self, device) -> "LazyInputs":
        """The same, made on `device`."""

    def subset(self, index) -> "LazyInputs":
        """The inputs at these indices, still to be made."""

    def augmented(self, seed: int) -> "LazyInputs":
        """The same, randomly changed for training; what happens to input i depends on (seed, i)."""


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

    inputs: (N, ...) float32, indexable by slices and index tensors: a tensor of pictures or of
    vectors (N, d), or inputs that are made when indexed (`predictions.batches` does so ahead of
    use); y, a: (N,), -1 or +1 in float32, or class indices in int64; counts: samples per group, in
    the order of `Splits.cells`; minority: which groups go against the shortcut, None: those whose
    attribute is not their label.

    With several tasks y and a are (N, tasks), task_groups (N, tasks) has the group of each, and the
    samples are stored group by group of the first.
    """

    inputs: torch.Tensor | LazyInputs
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
        """The range of each group's samples."""
        ends = np.cumsum(self.counts).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts)]

    @property
    def shares(self) -> list[float]:
        """Share π_g of every group."""
        return groups.shares(self.counts)

    @property
    def moments(self) -> groups.Moments:
        """E[Y], E[A] and Cov(Y, A), of four groups only."""
        return groups.moments(self.counts)

    def to(self, device) -> "Split":
        """The same split with its tensors, and the inputs that it makes, on `device`."""
        return self._with(lambda part: part.to(device), self.inputs.to(device), self.counts)

    def _with(self, change: Callable, inputs, counts: list[int]) -> "Split":
        """The split with other inputs and counts, and `change` applied to each tensor of labels."""
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
        inputs = self.inputs
        chosen = inputs[index] if isinstance(inputs, torch.Tensor) else inputs.subset(index)
        return self._with(lambda part: part[index], chosen, counts)

    def of_task(self, t: int, task: Task) -> tuple[torch.Tensor, "Split"]:
        """(order, the split in this order with the labels of task t, group by group of this task).

        For several tasks only.
        """
        if self.task_groups is None:
            raise ValueError("the split has one task")
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
        """The split with randomly changed inputs for training; tensors stay as they are.

        What happens to a sample depends on the seed and on its position in the split only.
        """
        if isinstance(self.inputs, torch.Tensor):
            return self
        return replace(self, inputs=self.inputs.augmented(seed))

    def digest(self) -> str:
        """SHA-256 of the inputs' content, the labels, the attributes and the group counts."""
        found = hashlib.sha256(repr(self.counts).encode())
        for values in (self.y, self.a, self.inputs):
            if isinstance(values, torch.Tensor):
                found.update(f"{values.dtype} {tuple(values.shape)}".encode())
                found.update(values.cpu().flatten().numpy().data)
            else:
                found.update(values.identity.encode())
        return found.hexdigest()


@dataclass
class Splits:
    """All splits of an experiment. All but `train` and `test` may be missing.

    - target: a small unbiased set for methods that train on it; dfr: the data for retraining;
      evaluation_sets: further sets for evaluation, by name;
    - cells: (y, a) of every group; num_classes: number of labels;
    - masks: (G, H, W) bool, the pixels on which the shortcut of every group is drawn, or None;
    - samples: arrays `pictures` (M, H, W, C) in [0, 1], `y`, `a`, `group`, for looking at; empty
      for inputs that are not pictures, and then nothing is saved or drawn;
    - skipped: for some splits, how many samples of each group were left out as unreadable;
    - facts: where the data came from, as plain data;
    - repeats: (N,) int64, how often a method takes each training sample in an epoch, where this
      differs;
    - tasks: all of them, the first with these cells and group names; by default it is the only one.
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

    @classmethod
    def from_named(cls, splits: dict[str, Split], **facts: Any) -> "Splits":
        """Splits by name: train, test and where present val, target and dfr; all others are
        `evaluation_sets`. facts: the other fields.
        """
        own = {f.name for f in fields(cls)}
        known: dict[str, Any] = {name: split for name, split in splits.items() if name in own}
        further = {name: split for name, split in splits.items() if name not in own}
        return cls(**known, evaluation_sets=further, **facts)

    def named(self) -> dict[str, Split]:
        """The splits that are present, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        present = {name: split for name, split in present.items() if isinstance(split, Split)}
        return present | self.evaluation_sets

    def evaluated(self) -> dict[str, Split]:
        """The splits on which the network is evaluated: all but DFR's."""
        return {name: split for name, split in self.named().items() if name != "dfr"}

    def changed(self, change: Callable[[str, Split], Split]) -> "Splits":
        """The same with `change(name, split)` in place of every split."""
        changed: dict[str, Any] = {
            name: change(name, split) for name, split in self.named().items()
        }
        further = {name: changed.pop(name) for name in self.evaluation_sets}
        return replace(self, evaluation_sets=further, **changed)

    def to(self, device) -> "Splits":
        """The same splits with their tensors on `device`."""
        moved = self.changed(lambda _, split: split.to(device))
        moved.masks = None if self.masks is None else self.masks.to(device)
        return moved

    def fingerprint(self) -> str:
        """SHA-256 over the samples, labels, attributes and counts of all splits."""
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
