"""From sources to group-structured splits: `load(config)` is the one entry point.

A new data set is one function that returns `Splits`, and one line in `DATASETS`.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F

import dominoes
import groups
from config import Config, derive_seed
from drawing import SAMPLES_PER_GROUP, Pool, draw_to_moments, hold_out, labels, shown
from errors import DataError
from pictures import LUMA, Pictures, unreadable
from sources import mnist
from sources import waterbirds as waterbirds_source
from splits import Split, Splits

log = logging.getLogger(f"spurious.{__name__}")

CHUNK = 4096


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
    pools = {}
    for part, digits in (("training", train_digits), ("test", test_digits)):
        y = np.where(digits.labels >= 5, 1, -1)
        place = f"the {part} part of mnist_source {config.mnist_source}"
        seed = derive_seed(config.seed, "digits", part)
        pools[part] = Pool(y, {-1: "digits 0 to 4", +1: "digits 5 to 9"}, place, seed)
    train = draw_to_moments(pools["training"], "train", config)
    val = draw_to_moments(pools["training"], "val", config)
    test = draw_to_moments(pools["test"], "test", config)

    train, held_out = hold_out(train, config)

    samples = _colour(train_digits.images, [i[:SAMPLES_PER_GROUP] for i in train], config)
    splits = Splits(
        train=_prepared(_colour(train_digits.images, train, config), config),
        test=_prepared(_colour(test_digits.images, test, config), config),
        group_names=["digit < 5, green", "digit < 5, red", "digit ≥ 5, green", "digit ≥ 5, red"],
        samples=shown(samples, samples.inputs),
        facts={"mnist": config.mnist_source},
    )
    if sum(map(len, val)):
        splits.val = _prepared(_colour(train_digits.images, val, config), config)
    if sum(map(len, held_out)):
        splits.dfr = _prepared(_colour(train_digits.images, held_out, config), config)
    return splits


def _colour(images: np.ndarray, indices: list[np.ndarray], config: Config) -> Split:
    """Pictures (N, C, 28, 28) in [0, 1] of these digits, group by group, in their colours."""
    counts = [len(i) for i in indices]
    y, a = labels(counts)
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
    members["train"], held_out = hold_out(members["train"], config)
    members.setdefault("dfr", held_out)

    def split(rows, **options):
        # In the order of the files, which is how disks like to be read.
        order = np.concatenate([np.sort(r) for r in rows])
        counts = [len(r) for r in rows]
        inputs = Pictures(source, order, num_workers=config.num_workers, **options)
        return Split(inputs, *labels(counts), counts)

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
        samples=shown(samples, F.avg_pool2d(samples.inputs[:], 2)),
        skipped=skipped,
        facts={"waterbirds": str(source.storage.path)},
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


DATASETS = {"ColoredMNIST": colored_mnist, "WaterBirds": waterbirds, "Dominoes": dominoes.load}
