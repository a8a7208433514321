"""WaterBirds: birds in front of backgrounds, in the official splits."""

import numpy as np

from lab.config.schema import Config
from lab.data_sets import official
from lab.data_sets.sources import waterbirds as source_of
from lab.splits import groups
from lab.splits.splits import Splits, Task

NAMES = ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]


def load(config: Config) -> Splits:
    """Birds in front of backgrounds: y = +1 for waterbirds, a = +1 for water behind them.

    The official splits, each capped by a random subset; training first without the groups y ≠ a
    if so configured. `dfr` is the whole official validation set, or set aside from training.
    """
    source = source_of.load(config.data_dir)
    parts = (source_of.TRAIN, source_of.VAL, source_of.TEST)
    pool = {n: np.flatnonzero(source.split == part) for n, part in zip(official.SPLITS, parts)}
    if config.remove_minority_groups_train:
        pool["train"] = pool["train"][(source.y == source.place)[pool["train"]]]
    drawn = official.capped(pool, config)
    if config.dfr_val_split_strategy == "original":
        drawn["dfr"] = pool["val"]
    group = groups.index(2 * source.y - 1, 2 * source.place - 1)
    return official.splits(
        source, group, drawn, config,
        tasks=[Task("waterbird", groups.GROUPS, NAMES)],
        waterbirds=str(source.storage.path),
    )  # fmt: skip
