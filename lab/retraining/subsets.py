"""Which samples of a split a last layer is fitted on, and which ones score it.

Rows are numbers of samples in the split, which stores its samples group by group; several draws
take lists with the rows of each group.
"""

import numpy as np

from lab.config.schema import Config
from lab.splits.splits import Split

HELD_OUT = 5  # every fifth sample decides when gradient descent stops


def members(split: Split) -> list[np.ndarray]:
    """The rows of each group."""
    return [np.arange(part.start, part.stop) for part in split.slices]


def balanced(groups: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random subset in which every non-empty group has as many rows as the smallest of them."""
    nonempty = [rows for rows in groups if len(rows)]
    smallest = min(map(len, nonempty))
    chosen = np.concatenate([rng.permutation(rows)[:smallest] for rows in nonempty])
    return np.sort(chosen)


def fitting_and_scoring(split: Split, rng: np.random.Generator, counts) -> tuple[list, list]:
    """Rows of each group for fitting, and for scoring; counts: how many of each are for scoring."""
    groups = [rng.permutation(rows) for rows in members(split)]
    ends = [len(rows) - count for rows, count in zip(groups, counts)]
    fitting = [rows[:end] for rows, end in zip(groups, ends)]
    return fitting, [rows[end:] for rows, end in zip(groups, ends)]


def fifths(counts: list[int]) -> list[int]:
    """How many samples of each group are every fifth of all, counted through the groups.

    So small groups contribute, too; of a group of one sample it can be all.
    """
    ends = np.cumsum(counts)
    return (ends // HELD_OUT - (ends - counts) // HELD_OUT).tolist()


def rows_to_fit(groups: list[np.ndarray], rng: np.random.Generator, config: Config) -> np.ndarray:
    """A balanced subset of these rows of each group, or all of them."""
    return balanced(groups, rng) if config.dfr_balance else np.sort(np.concatenate(groups))
