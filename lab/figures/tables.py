"""What figures take from the tables of a run: tasks, columns, analyses, pictures."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lab.figures.style import SPLIT_TITLES, finite
from lab.folders.reading import RunTables, UnreadableRun, group_labels, present, readable
from lab.system import zip_files

MAX_SAMPLES = 2**26  # bytes; 32 pictures of 112 × 112 are 2**22


def task_names(run: RunTables) -> list[str]:
    """The tasks of the run's network, if there are several."""
    names = run.counts["task"].astype(str).unique() if "task" in run.counts else []
    return list(names) if len(names) > 1 else []


def of_task(run: RunTables, task: str) -> RunTables:
    """The run as if this were the network's only task."""
    prefix = re.compile(rf"^([a-z_]+?)_{re.escape(task)}_")
    own = [name for name in run.history if prefix.match(name)]
    history = run.history[["epoch", *own]].rename(columns=lambda name: prefix.sub(r"\1_", name))
    counts = run.counts[run.counts["task"].astype(str) == task]
    labels, codes = group_labels(counts)
    return replace(run, history=history, counts=counts, labels=labels, codes=codes, task=task)


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """Finite values of a column, all NaN if the table lacks it."""
    return finite(table[name]) if name in table else np.full(len(table), np.nan)


def history_splits(run: RunTables) -> list[str]:
    """The splits of the training history, without the further evaluation sets."""
    splits = ("train", "val", "target", "test")
    return [split for split in splits if f"{split}_avg_loss" in run.history]


def analysis_values(run: RunTables, analysis: str, split: str, pair: str = "") -> pd.DataFrame:
    """Values of an analysis: one row an epoch (the index), one column a quantity."""
    rows = run.analysis
    rows = rows[(rows.analysis == analysis) & (rows.split == split) & (rows.pair == pair)]
    rows = rows.drop_duplicates(["epoch", "quantity"], keep="last")
    return rows.pivot(index="epoch", columns="quantity", values="value").sort_index()


def analysis_splits(run: RunTables, analysis: str) -> list[str]:
    """The splits on which an analysis was made, in the order of the panels."""
    found = set(run.analysis.split[run.analysis.analysis == analysis])
    return [split for split in SPLIT_TITLES if split in found]


def read_dfr(path: Path) -> dict[str, Any]:
    """The results of retraining, accuracies as floats; {} if the file is missing or empty."""
    if not present(path):
        return {}
    with readable(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        for time in ("before", "after"):
            rows = result[time].items()
            result[time] = {split: pd.Series(row, dtype=float) for split, row in rows}
        score = result.get("tuned_for") or "worst_acc"
        # JSON has null for NaN.
        points = [(p["c"], p[score]) for p in result.get("tuning") or []]
        tuning = [(float(c), math.nan if value is None else float(value)) for c, value in points]
        return result | {"tuning": sorted(tuning)}


def read_pictures(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file: `pictures` (M, H, W, 1 or 3), `group`, `y`, `a` (M,), others (M, H, W).

    Raises `UnreadableRun` for other shapes and for values that are not numbers.
    """
    with readable(path):
        unpacked = sum(member.file_size for member in zip_files.members(path))
        if unpacked > MAX_SAMPLES:
            raise UnreadableRun(f"{path}: {unpacked} bytes unpacked; allowed: up to {MAX_SAMPLES}")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        pictures, _ = arrays["pictures"], arrays["group"]
        if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
            raise ValueError(f"pictures of shape {pictures.shape}")
        for name, values in arrays.items():
            expected = pictures.shape[: {"pictures": 4, "group": 1, "y": 1, "a": 1}.get(name, 3)]
            if values.shape != expected or values.dtype.kind not in "fiu":
                raise ValueError(
                    f"{len(pictures)} pictures, {name} of shape {values.shape}, {values.dtype}"
                )
    return arrays
