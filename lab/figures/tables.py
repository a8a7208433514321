"""The tables of a run's folder, read with distrust: the folder may come from somebody else.

A missing or empty file is no table; a damaged or hostile one is a `PlotError` that names it.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lab.figures.style import SPLIT_TITLES, finite
from lab.splits import groups
from lab.system import zip_files
from lab.system.errors import UserError

TABLES = ("training_history.csv", "analysis.csv", "dfr_results.json", "samples.npz")
TEXTS = ("split", "name", "analysis", "pair", "quantity", "task")  # columns that hold no numbers
MAX_SAMPLES = 2**26  # bytes; 32 pictures of 112 × 112 are 2**22


class PlotError(UserError):
    """The run folder is missing, damaged or not one."""


@dataclass
class Run:
    """The tables of one run folder; `labels` and `codes` map a group index to its names."""

    folder: Path
    config: dict[str, Any]
    history: pd.DataFrame
    counts: pd.DataFrame
    analysis: pd.DataFrame
    labels: dict[int, str]
    codes: dict[int, str]
    task: str = ""  # whose tables these are, where the network has several

    @property
    def many(self) -> bool:
        """Whether there are more groups than curves that can be distinguished."""
        return len(self.labels) > len(groups.GROUPS)

    @property
    def method(self) -> str:
        """Name of the training method; no debiasing is ERM."""
        method = self.config.get("debias_method") or "None"
        return "ERM" if method == "None" else str(method)

    def label(self, code: str) -> str:
        """Readable name of a group given as in the tables, such as `G(-1,+1)`."""
        return {self.codes[g]: self.labels[g] for g in self.codes}.get(code, code)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file raises into a `PlotError` that names the file."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
        TypeError,
    ) as error:  # fmt: skip
        raise PlotError(f"{path}: not readable: {type(error).__name__}: {error}") from error
    except (ValueError, yaml.YAMLError, zipfile.BadZipFile, zlib.error) as error:
        # YAML spreads its message over several lines.
        message = " ".join(str(error).split())
        raise PlotError(f"{path}: not readable: {message}") from error


def present(path: Path) -> bool:
    """Whether a file exists and is not empty."""
    return path.is_file() and path.stat().st_size > 0


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV table that must have these columns; without rows if the file is missing or empty.

    Columns other than those of `TEXTS` must hold numbers.
    """
    if not present(path):
        return pd.DataFrame(columns=list(columns))
    with readable(path):
        table = pd.read_csv(path)
        missing = [name for name in columns if name not in table]
        if missing:
            raise PlotError(f"{path}: no column {', '.join(missing)}")
        numbers = [name for name in table.columns if name not in TEXTS] if len(table) else []
        for name in numbers:
            if not pd.api.types.is_numeric_dtype(table[name]):
                raise PlotError(f"{path}: the column {name} holds something other than numbers")
        return table


def read_config(path: Path) -> dict[str, Any]:
    """The run's configuration, {} if it was not saved."""
    if not present(path):
        return {}
    with readable(path):
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def read_run(folder: str | Path) -> Run:
    """Read the tables of a run folder. Raises `PlotError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PlotError(f"{folder}: no such run folder")
    if not any((folder / table).is_file() for table in TABLES):
        raise PlotError(f"{folder}: not a run folder: it has none of {', '.join(TABLES)}")
    history = read_table(folder / "training_history.csv", "epoch")
    counts = read_table(folder / "group_counts.csv", "split", "group", "y", "a", "name", "count")
    columns = ("epoch", "split", "analysis", "pair", "quantity", "value")
    analysis = read_table(folder / "analysis.csv", *columns)
    analysis["pair"] = analysis["pair"].astype(object).fillna("")
    config = read_config(folder / "config_used.yaml")
    return Run(folder, config, history, counts, analysis, *group_labels(counts))


def group_labels(counts: pd.DataFrame) -> tuple[dict[int, str], dict[int, str]]:
    """Names and codes of the groups, from the table of their counts."""
    labels = codes = {g: groups.name(g) for g in range(len(groups.GROUPS))}
    if not counts.empty:
        cells = counts.drop_duplicates("group").set_index("group").sort_index()
        labels = cells["name"].astype(str).to_dict()
        signed = "+" if cells[["y", "a"]].isin([-1, 1]).all(axis=None) else ""
        codes = {
            g: f"G({y:{signed}.0f},{a:{signed}.0f})" for g, y, a in cells[["y", "a"]].itertuples()
        }
    return labels, codes


def task_names(run: Run) -> list[str]:
    """The tasks of the run's network, if there are several."""
    names = run.counts["task"].astype(str).unique() if "task" in run.counts else []
    return list(names) if len(names) > 1 else []


def of_task(run: Run, task: str) -> Run:
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


def history_splits(run: Run) -> list[str]:
    """The splits of the training history, without the further evaluation sets."""
    splits = ("train", "val", "target", "test")
    return [split for split in splits if f"{split}_avg_loss" in run.history]


def analysis_values(run: Run, analysis: str, split: str, pair: str = "") -> pd.DataFrame:
    """Values of an analysis: one row an epoch (the index), one column a quantity."""
    rows = run.analysis
    rows = rows[(rows.analysis == analysis) & (rows.split == split) & (rows.pair == pair)]
    rows = rows.drop_duplicates(["epoch", "quantity"], keep="last")
    return rows.pivot(index="epoch", columns="quantity", values="value").sort_index()


def analysis_splits(run: Run, analysis: str) -> list[str]:
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

    Raises `PlotError` for other shapes and for values that are not numbers.
    """
    with readable(path):
        unpacked = sum(member.file_size for member in zip_files.members(path))
        if unpacked > MAX_SAMPLES:
            raise PlotError(f"{path}: {unpacked} bytes unpacked; allowed: up to {MAX_SAMPLES}")
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
