"""From sources to group-structured splits: colouring, group counts, hold-outs.

`load(config)` is the one entry point. A new data set is one function that returns `Splits`, and
one line in `DATASETS`.
"""

import logging
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

import groups
from config import Config, derive_seed
from errors import DataError
from pictures import LUMA, Pictures, unreadable
from sources import mnist
from sources import waterbirds as waterbirds_source

log = logging.getLogger(f"spurious.{__name__}")

SAMPLES_PER_GROUP = 8
CHUNK = 4096


@dataclass
class Split:
    """Samples of one split, stored group by group (so that a group is a slice, not a copy).

    inputs: (N, ...) float32, indexable by slices and index tensors: a tensor, or `Pictures` that
    are decoded when indexed (use `metrics.batches` to have that done ahead); y, a: (N,) float32,
    -1 or +1; counts: samples per group, in the order of `groups.GROUPS`.
    """

    inputs: torch.Tensor | Pictures
    y: torch.Tensor
    a: torch.Tensor
    counts: list[int]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def group(self) -> torch.Tensor:
        """Group index of every sample, (N,) int64."""
        return groups.index(self.y, self.a)

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
        """E[Y], E[A] and Cov(Y, A)."""
        return groups.moments(self.counts)

    def to(self, device) -> "Split":
        return Split(self.inputs.to(device), self.y.to(device), self.a.to(device), self.counts)

    def subset(self, index: torch.Tensor, counts: list[int]) -> "Split":
        """The samples at these indices, which have these group counts; pictures stay undecoded."""
        lazy = isinstance(self.inputs, Pictures)
        inputs = self.inputs.subset(index) if lazy else self.inputs[index]
        return Split(inputs, self.y[index], self.a[index], counts)


@dataclass
class Splits:
    """All splits of an experiment. `val` and `dfr` (the data for retraining) may be missing.

    samples: arrays `pictures` (M, H, W, C) in [0, 1], `y`, `a`, `group`, for looking at.
    skipped: for some splits, the samples of each group that were left out as unreadable.
    """

    train: Split
    test: Split
    group_names: list[str]
    val: Split | None = None
    dfr: Split | None = None
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)

    def named(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: split for name, split in present.items() if isinstance(split, Split)}

    def evaluated(self) -> dict[str, Split]:
        """The splits on which the network is evaluated: all but DFR's."""
        return {name: split for name, split in self.named().items() if name != "dfr"}

    def to(self, device) -> "Splits":
        """The same splits with their tensors on `device`."""
        moved = {name: split.to(device) for name, split in self.named().items()}
        return replace(self, **moved)

    def count_rows(self) -> list[dict]:
        """Rows of `group_counts.csv`."""
        return [
            {
                "split": name,
                "group": g,
                "y": groups.GROUPS[g][0],
                "a": groups.GROUPS[g][1],
                "name": self.group_names[g],
                "count": split.counts[g],
                "share": split.shares[g],
                "skipped": self.skipped.get(name, [0] * len(split.counts))[g],
            }
            for name, split in self.named().items()
            for g in range(len(split.counts))
        ]


def load(config: Config) -> Splits:
    """The splits that the configuration asks for, on the CPU.

    Raises `DataError` when the data are missing, damaged, or too few.
    """
    return DATASETS[config.dataset_name](config)


def colored_mnist(config: Config) -> Splits:
    """Digits in colour: y = +1 for digits ≥ 5; a = +1 red, -1 green.

    The digit's own channel keeps its values, the others are scaled by 0.25. Group counts follow
    the configured moments exactly; no digit is in two splits.
    """
    train_digits, test_digits = mnist.load(config.mnist_source, config.data_dir)
    train_pool = _Pool(train_digits.labels, "training", config)
    test_pool = _Pool(test_digits.labels, "test", config)
    train = train_pool.draw("train", config.num_train_samples)
    val = train_pool.draw("val", config.num_val_samples)
    test = test_pool.draw("test", config.num_test_samples)

    train, held_out = _hold_out(train, config)

    samples = _colour(train_digits.images, [i[:SAMPLES_PER_GROUP] for i in train], config)
    splits = Splits(
        train=_prepared(_colour(train_digits.images, train, config), config),
        test=_prepared(_colour(test_digits.images, test, config), config),
        group_names=["digit < 5, green", "digit < 5, red", "digit ≥ 5, green", "digit ≥ 5, red"],
        samples=_shown(samples, samples.inputs),
    )
    if sum(map(len, val)):
        splits.val = _prepared(_colour(train_digits.images, val, config), config)
    if sum(map(len, held_out)):
        splits.dfr = _prepared(_colour(train_digits.images, held_out, config), config)
    return splits


def _hold_out(train: list[np.ndarray], config: Config):
    """(what is trained on, what is set aside for DFR), both per group, from the training samples.

    Only split_from_train sets samples aside: the last round(dfr_val_ratio · n_g) of each group.
    """
    held_out = [np.empty(0, dtype=int)] * len(train)
    if config.dfr_val_split_strategy == "split_from_train":
        sizes = [round(config.dfr_val_ratio * len(indices)) for indices in train]
        held_out = [indices[len(indices) - k :] for indices, k in zip(train, sizes)]
        train = [indices[: len(indices) - k] for indices, k in zip(train, sizes)]
    if not sum(map(len, train)):
        raise DataError("num_train_samples: too few, the hold-out for DFR leaves none to train on")
    return train, held_out


def _labels(counts) -> tuple[torch.Tensor, torch.Tensor]:
    """y and a of samples stored group by group, with these group counts."""
    y, a = torch.tensor(groups.GROUPS, dtype=torch.float32).T
    repeats = torch.tensor(counts)
    return y.repeat_interleave(repeats), a.repeat_interleave(repeats)


def _shown(split: Split, pictures: torch.Tensor) -> dict[str, np.ndarray]:
    """`Splits.samples` for pictures (M, C, H, W) of the samples of a small split."""
    return {
        "pictures": pictures.permute(0, 2, 3, 1).numpy(),
        "y": split.y.numpy().astype(int),
        "a": split.a.numpy().astype(int),
        "group": split.group.numpy(),
    }


class _Pool:
    """Digits of one part of the source, drawn without replacement in a seeded order."""

    def __init__(self, labels: np.ndarray, part: str, config: Config):
        self.part, self.config = part, config
        self.drawn: list[str] = []
        rng = np.random.default_rng(derive_seed(config.seed, "digits", part))
        self.left = {
            -1: rng.permutation(np.flatnonzero(labels < 5)),
            +1: rng.permutation(np.flatnonzero(labels >= 5)),
        }

    def draw(self, split: str, n: int | None) -> list[np.ndarray]:
        """Indices of the digits of each group for `n` samples (null: as many as possible)."""
        prefix = "train" if split == "train" else "test"
        share = groups.probabilities(
            getattr(self.config, f"{prefix}_label_marginal"),
            getattr(self.config, f"{prefix}_attribute_marginal"),
            getattr(self.config, f"{prefix}_correlation"),
        )
        share = [max(p, 0.0) for p in share]  # rounding can leave -1e-17
        if n is None:
            n = self._most(share)
        counts = groups.split_counts(n, share)
        self.drawn.append(f"num_{split}_samples")
        self._check(n, counts)
        drawn = []
        for (y, _), count in zip(groups.GROUPS, counts):
            drawn.append(self.left[y][:count])
            self.left[y] = self.left[y][count:]
        return drawn

    def _fits(self, counts) -> bool:
        return all(self._needed(counts, y) <= len(self.left[y]) for y in (-1, 1))

    @staticmethod
    def _needed(counts, y) -> int:
        return sum(count for (gy, _), count in zip(groups.GROUPS, counts) if gy == y)

    def _most(self, share) -> int:
        n = sum(len(left) for left in self.left.values())
        while not self._fits(groups.split_counts(n, share)):
            n -= 1
        return n

    def _check(self, n, counts) -> None:
        problems = []
        for y, digits in ((-1, "0 to 4"), (+1, "5 to 9")):
            needed, there = self._needed(counts, y), len(self.left[y])
            if needed > there:
                others = " or ".join(reversed(self.drawn))
                problems.append(
                    f"{self.drawn[-1]}: {n} samples need {needed} digits {digits}, but the "
                    f"{self.part} part of mnist_source {self.config.mnist_source} has {there} "
                    f"left; lower {others}"
                )
        if problems:
            raise DataError(*problems)


def _colour(images: np.ndarray, indices: list[np.ndarray], config: Config) -> Split:
    """Pictures (N, C, 28, 28) in [0, 1] of these digits, group by group, in their colours."""
    counts = [len(i) for i in indices]
    y, a = _labels(counts)
    order = np.concatenate(indices)
    channels = torch.full((len(order), 3), 0.25)
    channels[:, 0][a > 0] = 1.0
    channels[:, 1][a < 0] = 1.0
    if config.use_grayscale:
        channels = (channels * torch.tensor(LUMA)).sum(1, keepdim=True)
    pictures = torch.empty(len(order), channels.shape[1], mnist.SIDE, mnist.SIDE)
    # In chunks: the whole data set never exists as a second copy.
    for start in range(0, len(order), CHUNK):
        part = slice(start, start + CHUNK)
        gray = torch.from_numpy(images[order[part]]).float().div_(255)
        torch.mul(gray[:, None], channels[part, :, None, None], out=pictures[part])
    return Split(pictures, y, a, counts)


def _prepared(split: Split, config: Config) -> Split:
    """The split with inputs scaled to unit L2 norm, in place, unless switched off."""
    if config.normalize_inputs and not config.use_feature_extractor:
        for inputs in split.inputs.flatten(1).split(CHUNK):
            # An all-zero picture has no direction; it stays zero.
            inputs /= inputs.norm(dim=1, keepdim=True).clamp_min(torch.finfo(inputs.dtype).tiny)
    return split


def waterbirds(config: Config) -> Splits:
    """Birds in front of backgrounds: y = +1 for waterbirds, a = +1 for water behind them.

    The official splits, each capped by a random subset; training first without the groups y ≠ a
    if so configured. `dfr` is the whole official validation set, or set aside from training.
    Pictures are decoded when they are used, so an unreadable one raises `DataError` then; with
    on_bad_image: skip all that are needed are decoded here once, and unreadable ones left out.
    """
    source = waterbirds_source.load(config.data_dir)
    group = groups.index(2 * source.y - 1, 2 * source.place - 1)
    pool = {
        "train": np.flatnonzero(source.split == waterbirds_source.TRAIN),
        "val": np.flatnonzero(source.split == waterbirds_source.VAL),
        "test": np.flatnonzero(source.split == waterbirds_source.TEST),
    }
    if config.remove_minority_groups_train:
        pool["train"] = pool["train"][(source.y == source.place)[pool["train"]]]
    drawn = {}
    for name, rows in pool.items():
        rng = np.random.default_rng(derive_seed(config.seed, "pictures", name))
        drawn[name] = rng.permutation(rows)[: getattr(config, f"num_{name}_samples")]
    if config.dfr_val_split_strategy == "original":
        drawn["dfr"] = pool["val"]
    bad = _unreadable(source, np.unique(np.concatenate([*drawn.values()])), config)
    skipped = {
        name: np.bincount(group[rows[np.isin(rows, bad)]], minlength=4).tolist()
        for name, rows in drawn.items()
    }
    # Rows of each split, group by group.
    members = {
        name: [rows[(group[rows] == g) & ~np.isin(rows, bad)] for g in range(4)]
        for name, rows in drawn.items()
    }
    needed = {"train": "to train on", "test": "to test on"}
    if config.use_dfr and config.dfr_val_split_strategy == "original":
        needed["dfr"] = "for DFR"
    for name, use in needed.items():
        if not sum(map(len, members[name])):
            raise DataError(
                f"{source.metadata}: no readable picture {use} is left with these settings"
            )
    members["train"], held_out = _hold_out(members["train"], config)
    members.setdefault("dfr", held_out)

    def split(rows, **options):
        # In the order of the files, which is how disks like to be read.
        order = np.concatenate([np.sort(r) for r in rows])
        counts = [len(r) for r in rows]
        inputs = Pictures(source, order, num_workers=config.num_workers, **options)
        return Split(inputs, *_labels(counts), counts)

    options = {
        "grayscale": config.use_grayscale,
        "normalize": config.normalize_inputs and not config.use_feature_extractor,
    }
    samples = split(
        [rows[:SAMPLES_PER_GROUP] for rows in members["train"]], grayscale=config.use_grayscale
    )
    there = {name: split(rows, **options) for name, rows in members.items() if sum(map(len, rows))}
    return Splits(
        **there,
        group_names=["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"],
        samples=_shown(samples, F.avg_pool2d(samples.inputs[:], 2)),
        skipped=skipped,
    )


def _unreadable(source, rows: np.ndarray, config: Config) -> np.ndarray:
    """Those of these pictures of a source to be left out: with on_bad_image: error none."""
    if config.on_bad_image == "error":
        source.check_missing()
        return np.empty(0, dtype=int)
    bad = unreadable(source, rows, config.num_workers)
    for reason in bad.values():
        log.debug("skipped: %s", reason)
    if bad:
        log.warning("%d unreadable pictures skipped, the first: %s", len(bad), min(bad.items())[1])
    return np.array(list(bad), dtype=int)


DATASETS = {"ColoredMNIST": colored_mnist, "WaterBirds": waterbirds}
