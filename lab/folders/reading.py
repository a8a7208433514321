"""The tables of a run's folder, read with distrust: the folder may come from somebody else.

A missing or empty file is no table; a damaged or hostile one is an `UnreadableRun` that names it.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lab.splits import groups
from lab.system.errors import UserError

TABLES = ("training_history.csv", "analysis.csv", "dfr_results.json", "samples.npz")
TEXTS = ("split", "name", "analysis", "pair", "quantity", "task")  # columns that hold no numbers


class UnreadableRun(UserError):
    """The run folder is missing, damaged or not one."""


@dataclass
class RunTables:
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
    """Turns what reading a damaged file raises into an `UnreadableRun` that names the file."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
        TypeError,
    ) as error:  # fmt: skip
        raise UnreadableRun(f"{path}: not readable: {type(error).__name__}: {error}") from error
    except (ValueError, yaml.YAMLError, zipfile.BadZipFile, zlib.error) as error:
        # YAML spreads its message over several lines.
        message = " ".join(str(error).split())
        raise UnreadableRun(f"{path}: not readable: {message}") from error


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
            raise UnreadableRun(f"{path}: no column {', '.join(missing)}")
        numbers = [name for name in table.columns if name not in TEXTS] if len(table) else []
        for name in numbers:
            if not pd.api.types.is_numeric_dtype(table[name]):
                raise UnreadableRun(f"{path}: the column {name} holds something other than numbers")
        return table


def read_config(path: Path) -> dict[str, Any]:
    """The run's configuration, {} if it was not saved."""
    if not present(path):
        return {}
    with readable(path):
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def read_run(folder: str | Path) -> RunTables:
    """Read the tables of a run folder. Raises `UnreadableRun`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UnreadableRun(f"{folder}: no such run folder")
    if not any((folder / table).is_file() for table in TABLES):
        raise UnreadableRun(f"{folder}: not a run folder: it has none of {', '.join(TABLES)}")
    history = read_table(folder / "training_history.csv", "epoch")
    counts = read_table(folder / "group_counts.csv", "split", "group", "y", "a", "name", "count")
    columns = ("epoch", "split", "analysis", "pair", "quantity", "value")
    analysis = read_table(folder / "analysis.csv", *columns)
    analysis["pair"] = analysis["pair"].astype(object).fillna("")
    config = read_config(folder / "config_used.yaml")
    return RunTables(folder, config, history, counts, analysis, *group_labels(counts))


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
