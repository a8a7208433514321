"""What training needs of the run that it belongs to.

`lab.runs` has the real one, which writes tables, and the silent one of the processes that do not
write; the tests have one that records.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Run(Protocol):
    """A results folder that training writes into.

    folder: where checkpoints and weights go; leads: whether this is the one process that writes.
    """

    folder: Path
    leads: bool

    def history(self, row: dict) -> None:
        """Append a row to `training_history.csv`; every row has the same columns."""

    def analysis(self, rows: list[dict]) -> None:
        """Append rows to `analysis.csv`."""

    def histograms(self, epoch: int, values: Mapping) -> None:
        """Show how the values of tensors, by name, are distributed; in the trackers only."""

    def timed(self, phase: str, epoch: int | str = "") -> AbstractContextManager[None]:
        """Time a block into `timings.csv`."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of the tables that training writes, for `holds` and `rewind`."""
        ...

    def sync(self) -> None:
        """Wait until the tables are on the disk, so that a checkpoint can rely on them."""

    def holds(self, sizes: dict[str, int]) -> bool:
        """Whether the tables are at least as long as when their `sizes` were taken."""
        ...

    def rewind(self, sizes: dict[str, int], epoch: int) -> None:
        """Remove the rows that training wrote after `sizes` were taken: it writes them again.

        epoch: the last one that was recorded by then, -1 for none.
        """

    def part(self, name: str) -> "Run":
        """The tables of another training that belongs to this run, in a folder of its own."""
        ...

    def close(self) -> None:
        """Close the files."""
