"""What data sets share: drawing samples by group, setting a part aside for DFR, labels, scaling.

A data set draws the samples of its splits from a `Pool` per part of its source (training, test),
without replacement, so that no sample is in two splits.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lab.config.schema import Config
from lab.splits import groups
from lab.splits.splits import Split
from lab.system.errors import DataError

SAMPLES_PER_GROUP = 8
CHUNK = 4096  # pictures at once


class Pool:
    """Samples of one part of a source, drawn by label without replacement in a seeded order.

    labels: (N,) of all its samples; names, place: what messages call the samples of each label,
    and the part; hint: what else a message advises.
    """

    def __init__(
        self, labels: np.ndarray, names: dict[int, str], place: str, seed: int, hint: str = ""
    ):
        self.names, self.place, self.hint = names, place, hint
        self.drawn: list[str] = []
        rng = np.random.default_rng(seed)
        self.left = {label: rng.permutation(np.flatnonzero(labels == label)) for label in names}

    def take(self, key: str, counts: dict[int, int]) -> dict[int, np.ndarray]:
        """Indices of `counts` samples of each label.

        key: of the configuration, which asks for them. Raises `DataError` that names it, and the
        keys of earlier draws, when too few samples are left.
        """
        self.drawn.append(key)
        problems = []
        for label, needed in counts.items():
            available = len(self.left[label])
            if needed > available:
                others = " or ".join(dict.fromkeys(reversed(self.drawn)))
                problems.append(
                    f"{key}: {sum(counts.values())} samples need {needed} {self.names[label]}, but "
                    f"{self.place} has {available} left; lower {others}{self.hint}"
                )
        if problems:
            raise DataError(*problems)
        taken = {label: self.left[label][:count] for label, count in counts.items()}
        for label, count in counts.items():
            self.left[label] = self.left[label][count:]
        return taken

    def take_groups(self, key: str, counts: list[int]) -> list[np.ndarray]:
        """Like `take`, of each of the four groups, whose labels are -1 and +1."""
        taken = self.take(key, _by_label(counts))
        members = []
        for (y, _), count in zip(groups.GROUPS, counts):
            members.append(taken[y][:count])
            taken[y] = taken[y][count:]
        return members

    def most(self, share: Sequence[float]) -> int:
        """The largest number of samples that can be drawn with these shares of the four groups."""
        n = sum(map(len, self.left.values()))
        while not all(
            needed <= len(self.left[y])
            for y, needed in _by_label(groups.split_counts(n, share)).items()
        ):
            n -= 1
        return n


def _by_label(counts: Sequence[int]) -> dict[int, int]:
    """Samples of each label -1 and +1, from those of the four groups."""
    return {y: sum(n for (gy, _), n in zip(groups.GROUPS, counts) if gy == y) for y in (-1, 1)}


def draw_to_moments(pool: Pool, split: str, config: Config) -> list[np.ndarray]:
    """Samples of each group for `num_<split>_samples` (null: as many as possible)."""
    prefix = "train" if split == "train" else "test"
    share = groups.probabilities(
        getattr(config, f"{prefix}_label_marginal"),
        getattr(config, f"{prefix}_attribute_marginal"),
        getattr(config, f"{prefix}_correlation"),
    )
    share = [max(p, 0.0) for p in share]  # rounding can leave -1e-17
    n = getattr(config, f"num_{split}_samples")
    counts = groups.split_counts(pool.most(share) if n is None else n, share)
    return pool.take_groups(f"num_{split}_samples", counts)


def hold_out(train: list[np.ndarray], config: Config) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(training samples, samples set aside for DFR), both by group.

    Only split_from_train sets samples aside: the last round(dfr_val_ratio · n_g) of each group.
    Raises `DataError` when none are left to train on.
    """
    held_out = [np.empty(0, dtype=int)] * len(train)
    if config.dfr_val_split_strategy == "split_from_train":
        sizes = [round(config.dfr_val_ratio * len(indices)) for indices in train]
        held_out = [indices[len(indices) - k :] for indices, k in zip(train, sizes)]
        train = [indices[: len(indices) - k] for indices, k in zip(train, sizes)]
    if not sum(map(len, train)):
        raise DataError("num_train_samples: too few, the hold-out for DFR leaves none to train on")
    return train, held_out


def labels(
    counts: Sequence[int], cells: tuple[tuple[int, int], ...] = groups.GROUPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and a (N,) of samples stored group by group, with these group counts."""
    y, a = torch.tensor(cells).T
    if min(label for label, _ in cells) < 0:  # -1 and +1, not class indices
        y = y.float()
        a = a.float() if cells == groups.GROUPS else a
    repeats = torch.tensor(counts)
    return y.repeat_interleave(repeats), a.repeat_interleave(repeats)


def scaling(config: Config) -> str | None:
    """How pictures that are made when they are indexed are scaled; not at all for an extractor."""
    if config.use_feature_extractor:
        return None
    if config.normalize_inputs:
        return "norm"
    return "channels" if config.channels_standardised else None


def prepared(split: Split, config: Config) -> Split:
    """The split with its tensor of inputs scaled to unit L2 norm, in place, if configured."""
    if config.normalize_inputs and not config.use_feature_extractor:
        for inputs in tensor_of(split).flatten(1).split(CHUNK):
            # An all-zero input has no direction; it stays zero.
            inputs /= inputs.norm(dim=1, keepdim=True).clamp_min(torch.finfo(inputs.dtype).tiny)
    return split


def tensor_of(split: Split) -> torch.Tensor:
    """The inputs of a split whose inputs are a tensor."""
    if not isinstance(split.inputs, torch.Tensor):
        raise TypeError(f"inputs are {type(split.inputs).__name__}, not a tensor")
    return split.inputs


def shown(split: Split, pictures: torch.Tensor) -> dict[str, np.ndarray]:
    """`Splits.samples` for pictures (M, C, H, W) of the samples of a small split."""
    return {
        "pictures": pictures.permute(0, 2, 3, 1).numpy(),
        "y": split.y.numpy().astype(int),
        "a": split.a.numpy().astype(int),
        "group": split.group.numpy(),
    }
