"""Dominoes: a digit above a CIFAR-10 picture. The picture is the label, the digit the shortcut.

binary: y = +1 truck, -1 automobile; a = +1 one, -1 zero; group counts follow the configured
moments. ten: y is the picture's class, a the digit; in training every class has its own digit,
except that a share 1 - spurious_strength of the pictures shuffles theirs; in the other splits
digits are paired at random.

Validation and target set are taken out of the training part first, and are without shortcut: binary
ones have four equal groups. No picture and no digit is in two splits (`dfr` can be the target set).
"""

import logging
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.data_sets.drawing import (
    SAMPLES_PER_GROUP,
    Pool,
    draw_to_moments,
    hold_out,
    labels,
    scaling,
    shown,
)
from lab.data_sets.sources import cifar10, mnist
from lab.splits import groups
from lab.splits.composites import CIFAR10_STD, PUBLISHED_STD, Composites
from lab.splits.splits import Split, Splits
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

DEVIATIONS = {"exact": CIFAR10_STD, "published": PUBLISHED_STD}  # by dominoes_normalization
BINARY = ("automobile", "truck")
PARTS = ("training", "test")
HALVES = ("val", "target")  # of val_target_size


def load(config: Config) -> Splits:
    """Dominoes as configured; the pictures stay bytes until they are used.

    Raises `DataError` when the data are missing, damaged, or too few.
    """
    ten = config.dominoes_classes == "ten"
    classes = cifar10.CLASSES if ten else BINARY
    cells = groups.class_cells(10, 10) if ten else groups.GROUPS
    digits = mnist.load(config.mnist_source, config.data_dir)
    *pictures, origin = cifar10.load(config.data_dir, classes, config.num_workers)

    pool, test_pool = (
        _pool(part, found.labels, classes, config) for part, found in zip(PARTS, pictures)
    )
    if ten:
        members = _paired_by_class(pool, test_pool, digits[1].labels, config)
    else:
        members = _paired_by_moments(pool, test_pool, config)
    if not sum(map(len, members["train"])):
        raise DataError(
            f"val_target_size: given {config.val_target_size}, which leaves no picture to train "
            "on; lower it"
        )
    members["train"], held_out = hold_out(members["train"], config)
    if sum(map(len, held_out)):
        members["dfr"] = held_out

    made: dict[str, Split] = {}
    for part, found, drawings in zip(PARTS, pictures, digits):
        rows = {name: m for name, m in members.items() if (name == "test") == (part == "test")}
        counts = {name: [len(group) for group in m] for name, m in rows.items()}
        dealt = _deal_digits(drawings.labels, counts, cells, part, config)
        for name, m in rows.items():
            inputs = Composites(
                drawings.images[dealt[name]],
                found.images[np.concatenate(m)],
                image_size=config.image_size,
                grayscale=config.use_grayscale,
                scaling=scaling(config),
                deviation=DEVIATIONS[config.dominoes_normalization],
            )
            made[name] = Split(inputs, *labels(counts[name], cells), counts[name])
    if config.dfr_val_split_strategy == "target" and "target" in made:
        made["dfr"] = made["target"]
    return Splits.from_named(
        made,
        group_names=[f"{name}, {digit}" for name in classes for digit in range(len(classes))],
        cells=cells,
        num_classes=len(classes),
        samples=_samples(made["train"], cells),
        facts={"cifar10": origin, "mnist": config.mnist_source},
    )


def _pool(part: str, found: np.ndarray, classes, config: Config) -> Pool:
    """The pictures of one part, by y."""
    values = range(len(classes)) if len(classes) > 2 else (-1, 1)
    y = np.zeros(len(found), dtype=int)
    for value, name in zip(values, classes):
        y[found == cifar10.CLASSES.index(name)] = value
    names = {value: f"pictures of class {name}" for value, name in zip(values, classes)}
    seed = derive_seed(config.seed, "pictures", part)
    return Pool(y, names, f"CIFAR-10's {part} part", seed)


def _paired_by_moments(pool: Pool, test_pool: Pool, config: Config) -> dict[str, list]:
    """Pictures of each of the four groups of binary Dominoes, by split."""
    members, size = {}, config.val_target_size
    if size:
        members = {n: pool.take_groups("val_target_size", [size // 8] * 4) for n in HALVES}
    members["train"] = draw_to_moments(pool, "train", config)
    members["test"] = draw_to_moments(test_pool, "test", config)
    return members


def _paired_by_class(pool: Pool, test_pool: Pool, test_digits, config: Config) -> dict[str, list]:
    """Pictures of each of the hundred groups of Dominoes with ten classes, by split."""

    def generator(split):
        return np.random.default_rng(derive_seed(config.seed, "pairing", split))

    drawn = {}  # split -> pictures, y, a
    for name in HALVES if config.val_target_size else ():
        rows, y = _of_each_class(pool, "val_target_size", config.val_target_size // 2)
        drawn[name] = rows, y, generator(name).permutation(y)

    rows, y = _of_each_class(pool, "num_train_samples", config.num_train_samples)
    rng, a = generator("train"), y.copy()
    loose = rng.permutation(len(y))[: round((1 - config.spurious_strength) * len(y))]
    a[loose] = y[rng.permutation(loose)]
    drawn["train"] = rows, y, a

    rows, y = _of_each_class(test_pool, "num_test_samples", config.num_test_samples)
    # Every digit of the test part once, and again only where they are too few.
    order = generator("test").permutation(len(test_digits))
    drawn["test"] = rows, y, test_digits[np.resize(order, len(y))].astype(int)
    return {n: [rows[10 * y + a == g] for g in range(100)] for n, (rows, y, a) in drawn.items()}


def _of_each_class(pool: Pool, key: str, n: int | None) -> tuple[np.ndarray, np.ndarray]:
    """n pictures, equally many of each class, and their classes; None: as many as possible."""
    n = 10 * min(map(len, pool.left.values())) if n is None else n
    counts = groups.split_counts(n, [1 / 10] * 10)
    taken = pool.take(key, dict(enumerate(counts)))
    return np.concatenate(list(taken.values())), np.repeat(np.arange(10), counts)


def _deal_digits(found, counts: dict[str, list[int]], cells, part: str, config: Config) -> dict:
    """Digits for splits with these group counts: {split: rows (N,), group by group}.

    found: the digits' labels. Each digit is dealt once; if they are too few, every split gets its
    share of them and uses them repeatedly.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "digits", part))
    dealt = {name: [np.empty(0, dtype=int)] * len(cells) for name in counts}
    times = dict.fromkeys(counts, 1)
    for a in sorted({a for _, a in cells}):
        digit = max(a, 0)  # a = -1 is the zero
        stack = rng.permutation(np.flatnonzero(found == digit))
        having = [g for g, cell in enumerate(cells) if cell[1] == a]
        needed = [sum(n[g] for g in having) for n in counts.values()]
        shares = _shares(len(stack), needed)
        if shares is None:
            raise DataError(
                f"mnist_source: {config.mnist_source} has {len(stack)} digits {digit} in its "
                f"{part} part, which is less than one for every split"
            )
        for name, need, share in zip(counts, needed, shares):
            given, stack = stack[:share], stack[share:]
            if need:
                times[name] = max(times[name], -(-need // share))
                ends = np.cumsum([counts[name][g] for g in having])
                for g, rows in zip(having, np.split(np.resize(given, need), ends[:-1])):
                    dealt[name][g] = rows
    for name, most in times.items():
        if most > 1:
            text = "%s: mnist_source %s has too few digits, so they are used up to %d times each"
            log.info(text, name, config.mnist_source, most)
    return {name: np.concatenate(rows) for name, rows in dealt.items()}


def _shares(available: int, needed: list[int]) -> list[int] | None:
    """What each gets: as much as it needs, else in proportion but at least one; None: too few."""
    if sum(needed) <= available:
        return needed
    least = [min(need, 1) for need in needed]
    if sum(least) > available:
        return None
    rest = groups.split_counts(available - sum(least), groups.shares(needed))
    return [one + more for one, more in zip(least, rest)]


def _samples(split: Split, cells) -> dict[str, np.ndarray]:
    """Pictures to look at: of each group; of ten classes half with their own digit."""
    limits, left = [], dict.fromkeys([y for y, _ in cells], SAMPLES_PER_GROUP // 2)
    for count, (y, a) in zip(split.counts, cells):
        if len(cells) == 4:
            limits.append(min(count, SAMPLES_PER_GROUP))
        elif y == a:
            limits.append(min(count, SAMPLES_PER_GROUP // 2))
        else:
            limits.append(min(count, 1, left[y]))
            left[y] -= limits[-1]
    index = [torch.arange(s.start, s.start + n) for s, n in zip(split.slices, limits)]
    few = split.subset(torch.cat(index), limits)
    inputs = cast(Composites, few.inputs)  # a copy, made by `subset`
    inputs.scaling = None
    pictures = inputs[:]
    return shown(few, F.avg_pool2d(pictures, 2) if pictures.shape[-1] == 224 else pictures)
