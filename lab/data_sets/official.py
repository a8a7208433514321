"""What data sets of pictures with official splits share: caps, unreadable pictures, lazy splits."""

import logging

import numpy as np
import torch.nn.functional as F

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.data_sets.drawing import SAMPLES_PER_GROUP, hold_out, labels, scaling, shown
from lab.splits.pictures import Pictures, unreadable
from lab.splits.splits import Split, Splits
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

SPLITS = ("train", "val", "test")


def capped(pool: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """A random subset of `num_<split>_samples` (null: all) of the rows of each official split."""
    drawn = {}
    for name, rows in pool.items():
        rng = np.random.default_rng(derive_seed(config.seed, "pictures", name))
        drawn[name] = rng.permutation(rows)[: getattr(config, f"num_{name}_samples")]
    return drawn


def splits(source, group: np.ndarray, drawn: dict, config: Config, *, tasks, **facts) -> Splits:
    """Splits of these pictures, group by group, with a part of training set aside for DFR.

    source: a `pictures.Source` with `metadata`, the path of its table for messages; group: (N,) of
    every picture; drawn: rows of each split, in random order; tasks: the `splits.Task`s, of which
    the first has these groups. Pictures are decoded when they are used, so an unreadable one raises
    `DataError` then; with on_bad_image: skip, all pictures of the splits are decoded here once,
    and unreadable ones left out.
    """
    cells = tasks[0].cells
    bad = _unreadable(source, np.unique(np.concatenate([*drawn.values()])), config)
    skipped = {
        name: np.bincount(group[rows[np.isin(rows, bad)]], minlength=len(cells)).tolist()
        for name, rows in drawn.items()
    }
    # Rows of each split, group by group.
    members = {
        name: [rows[(group[rows] == g) & ~np.isin(rows, bad)] for g in range(len(cells))]
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
        y, a = labels(counts, cells)
        return Split(inputs, y, a, counts, minority=tasks[0].minority)

    samples = split(
        [rows[:SAMPLES_PER_GROUP] for rows in members["train"]], grayscale=config.use_grayscale
    )
    options = {"grayscale": config.use_grayscale, "scaling": scaling(config)}
    nonempty = {name: rows for name, rows in members.items() if sum(map(len, rows))}
    pixels = samples.inputs[:]
    return Splits.from_named(
        {name: split(rows, **options) for name, rows in nonempty.items()},
        group_names=tasks[0].group_names,
        cells=cells,
        tasks=tasks,
        samples=shown(samples, F.avg_pool2d(pixels, 2) if source.side > 128 else pixels),
        skipped=skipped,
        facts=facts,
    )


def _unreadable(source, rows: np.ndarray, config: Config) -> np.ndarray:
    """Which of these pictures to leave out as unreadable: none with on_bad_image: error."""
    if config.on_bad_image == "error":
        source.check_missing()
        return np.empty(0, dtype=int)
    bad = unreadable(source, rows, config.num_workers)
    for reason in bad.values():
        log.debug("skipped: %s", reason)
    if bad:
        log.warning("%d unreadable pictures skipped, the first: %s", len(bad), min(bad.items())[1])
    return np.array(list(bad), dtype=int)
