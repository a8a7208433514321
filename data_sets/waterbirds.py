"""WaterBirds: birds in front of backgrounds, in the official splits."""

import logging

import numpy as np
import torch.nn.functional as F

import groups
from config import Config, derive_seed
from drawing import SAMPLES_PER_GROUP, hold_out, labels, shown
from errors import DataError
from pictures import Pictures, unreadable
from sources import waterbirds as source_of
from splits import Split, Splits

log = logging.getLogger(f"spurious.{__name__}")


def load(config: Config) -> Splits:
    """Birds in front of backgrounds: y = +1 for waterbirds, a = +1 for water behind them.

    The official splits, each capped by a random subset; training first without the groups y ≠ a
    if so configured. `dfr` is the whole official validation set, or set aside from training.
    Pictures are decoded when they are used, so an unreadable one raises `DataError` then; with
    on_bad_image: skip all that are needed are decoded here once, and unreadable ones left out.
    """
    source = source_of.load(config.data_dir)
    group = groups.index(2 * source.y - 1, 2 * source.place - 1)
    pool = {
        "train": np.flatnonzero(source.split == source_of.TRAIN),
        "val": np.flatnonzero(source.split == source_of.VAL),
        "test": np.flatnonzero(source.split == source_of.TEST),
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
