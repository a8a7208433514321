"""What a run is asked for, done by nobody: the run of the processes that do not write."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Self

from lab.training import run as training


class Silent(training.Run):
    """Answers every call on a run and writes nothing.

    `lab.training.run.Run` says what the calls of training mean. A run that writes overrides them.
    """

    leads = False  # of several processes, whether this is the one that writes

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def history(self, row: dict) -> None:
        pass

    def analysis(self, rows: list[dict]) -> None:
        pass

    def histograms(self, epoch: int, values: Mapping) -> None:
        pass

    def time(self, phase: str, seconds: float, epoch: int | str = "") -> None:
        """Append a row to `timings.csv`."""

    @contextmanager
    def timed(self, phase: str, epoch: int | str = "") -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.time(phase, time.perf_counter() - start, epoch)

    def sizes(self) -> dict[str, int]:
        return {}

    def sync(self) -> None:
        pass

    def holds(self, sizes: dict[str, int]) -> bool:
        # All processes must decide for the same checkpoint, so this one reads, too.
        paths = {name: self.folder / f"{name}.csv" for name in sizes}
        return all(paths[n].exists() and paths[n].stat().st_size >= sizes[n] for n in sizes)

    def rewind(self, sizes: dict[str, int], epoch: int) -> None:
        pass

    def part(self, name: str) -> "Silent":
        return Silent(self.folder / name)

    def close(self) -> None:
        pass

    def keep_log(self, early: MemoryHandler) -> None:
        """Write the lines that were logged before there was a folder to `run.log`."""

    def save_data(self, count_rows: list[dict], samples: dict) -> None:
        """Write `group_counts.csv` and, if wanted, `samples.npz`."""

    def conclude(
        self, prefix: str, summaries: dict[str, dict[str, float]], epoch: int | None = None
    ) -> None:
        """Report final metrics by split: in the log, in `status.json`, as the trackers' summary.

        prefix: of their names: "" after training, "best_" of the best epoch, "dfr_" after DFR.
        """

    def images(self, paths: Iterable[Path]) -> None:
        """Show saved plots in the trackers."""

    def enter(self, phase: str) -> None:
        """From here on, a resumed run starts with this phase."""
