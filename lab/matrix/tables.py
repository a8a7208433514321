"""Accuracies of every group of every task with every attribute, and δ of every pair."""

import csv
import io
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from lab.evaluation import shortcuts
from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")

ACCURACIES = "group_accuracies.csv"
# A shortcut without exception: no sample measures δ, so that it is listed by this mark.
COPY = {1: "exact", -1: "inverted", 0: ""}


def write_accuracies(
    folder: Path, names: list[str], correct: np.ndarray, counts: np.ndarray
) -> None:
    """Write `group_accuracies.csv`: a row for each group of each task with each attribute.

    correct, counts: (K, K, 4) correct samples, and all: task × attribute × group.
    """
    accuracy = correct / np.where(counts > 0, counts, np.nan)
    shrunk = shortcuts.shrunk(correct, counts)
    rows = [
        [names[t], names[a], g, *(table[t, a, g].item() for table in (counts, correct))]
        + [table[t, a, g].item() for table in (accuracy, shrunk)]
        for t, a, g in np.ndindex(correct.shape)
    ]
    header = ["task", "attribute", "group", "count", "correct", "accuracy", "shrunk"]
    write_table(folder / ACCURACIES, header, rows)


def write_deltas(folder: Path, eps: float) -> tuple[list[str], np.ndarray]:
    """Write `spurious_matrix.csv` and `spurious_pairs.csv`, from `group_accuracies.csv`.

    Pairs whose attribute is a copy of the task come first. Returns the names of the attributes, and
    T (K, K): δ in percentage points, attribute × task.
    """
    table = pd.read_csv(folder / ACCURACIES)
    names = table["task"].drop_duplicates().tolist()
    shape = (len(names), len(names), 4)
    correct, counts = (table[column].to_numpy().reshape(shape) for column in ("correct", "count"))
    T = shortcuts.deltas(correct, counts).T
    copies = shortcuts.copies(counts)
    np.fill_diagonal(T, np.nan)
    np.fill_diagonal(copies, 0)
    write_square(folder / "spurious_matrix.csv", names, T)
    found = [(int(t), int(a)) for t, a in np.argwhere(copies)]
    found += [pair for pair in shortcuts.pairs(T, eps) if not copies[pair]]
    write_table(
        folder / "spurious_pairs.csv",
        ["task", "attribute", "delta", "copy"],
        [[names[t], names[a], T[a, t], COPY[copies[t, a]]] for t, a in found],
    )
    count = len(found) - np.count_nonzero(copies)
    log.info("%d of %d pairs have δ above %g", count, len(names) * (len(names) - 1), eps)
    for t, a in found[:10]:
        if copies[t, a]:
            log.warning("%s: %s is its %s copy", names[t], names[a], COPY[copies[t, a]])
        else:
            log.info("%6.1f  %s by %s", T[a, t], names[t], names[a])
    return names, T


def write_square(path: Path, names: list[str], values: np.ndarray) -> None:
    """Write a table (K, K) with the attributes' names on both sides."""
    rows = [[attribute, *row] for attribute, row in zip(names, values.tolist())]
    write_table(path, ["attribute", *names], rows)


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Write a whole table."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    files.write_text(path, text.getvalue())
