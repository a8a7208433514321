"""The tables of a run: every number is first written there; trackers show the same numbers."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lab.runs.silent import Silent
from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")

ANALYSIS_COLUMNS = ("epoch", "split", "analysis", "pair", "quantity", "value")
COUNT_COLUMNS = ("split", "group", "y", "a", "name", "count", "share", "skipped", "task")
TIMING_COLUMNS = ("phase", "epoch", "seconds")
REWOUND = ("training_history", "analysis")  # tables whose length a checkpoint records


class Table:
    """A CSV file that grows row by row. Numbers are written so that they read back exactly."""

    def __init__(self, path: Path, columns: Iterable[str]):
        self.columns = list(columns)
        self.file = files.Growing(path)
        if not self.file.size:
            self._write([self.columns])

    def add(self, rows: list[dict]) -> None:
        """Append rows (mappings with exactly the table's columns), all of them or none."""
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(f"columns {sorted(row)} do not fit {self.columns}")
        self._write([[row[column] for column in self.columns] for row in rows])

    def _write(self, lines: list[list]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        self.file.append(text.getvalue().encode())


class Tables(Silent):
    """Tables that grow in a folder while a network is trained, and trackers that show them."""

    leads = True

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.tables: dict[str, Table] = {}
        self.trackers: list = []

    def close(self) -> None:
        for table in self.tables.values():
            table.file.close()

    def sizes(self) -> dict[str, int]:
        return {name: self.tables[name].file.size for name in REWOUND if name in self.tables}

    def sync(self) -> None:
        for table in self.tables.values():
            table.file.sync()

    def rewind(self, sizes: dict[str, int], epoch: int) -> None:
        for name in REWOUND:
            path = self.folder / f"{name}.csv"
            if name in sizes:
                os.truncate(path, sizes[name])
            else:
                path.unlink(missing_ok=True)
        self.each_tracker("rewind", epoch)

    def table(self, name: str, columns: Iterable[str]) -> Table:
        """The open table `<name>.csv`, made with these columns on first use."""
        if name not in self.tables:
            self.tables[name] = Table(self.folder / f"{name}.csv", columns)
        return self.tables[name]

    def history(self, row: dict) -> None:
        self.table("training_history", row).add([row])
        self.each_tracker("log", row["epoch"], row)

    def analysis(self, rows: list[dict]) -> None:
        self.table("analysis", ANALYSIS_COLUMNS).add(rows)
        for epoch, values in tagged(rows).items():
            self.each_tracker("log", epoch, values)

    def histograms(self, epoch: int, values: Mapping) -> None:
        self.each_tracker("histograms", epoch, values)

    def time(self, phase: str, seconds: float, epoch: int | str = "") -> None:
        row = {"phase": phase, "epoch": epoch, "seconds": round(seconds, 4)}
        self.table("timings", TIMING_COLUMNS).add([row])

    def part(self, name: str) -> "Tables":
        (self.folder / name).mkdir(exist_ok=True)
        return Tables(self.folder / name)

    def each_tracker(self, call: str, *arguments) -> None:
        """Call a method of every tracker; one that fails is left out from then on."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, call)(*arguments)
            except Exception as error:  # a tracker must never stop a run; the tables are the truth
                log.warning("%s stopped tracking: %s", type(tracker).__name__, error)
                self.trackers.remove(tracker)


def tagged(rows: list[dict]) -> dict[int, dict]:
    """{epoch: {name: value}} of rows of `analysis.csv`, with the names that trackers show."""
    by_epoch: dict[int, dict] = {}
    for row in rows:
        parts = [row[c] for c in ("analysis", "split", "pair", "quantity") if row[c]]
        by_epoch.setdefault(row["epoch"], {})["/".join(parts)] = row["value"]
    return by_epoch
