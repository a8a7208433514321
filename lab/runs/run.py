"""One run's results folder while it is open: tables, log file, status, trackers.

Every number is first written to a table in the folder; trackers show the same numbers under the
same names and can never stop a run.
"""

import logging
import shlex
import sys
from collections.abc import Iterable
from logging.handlers import MemoryHandler
from pathlib import Path

import filelock
import numpy as np

from lab.config.schema import Config
from lab.folders.status import read_status, write_status
from lab.runs.tables import COUNT_COLUMNS, Tables
from lab.system import files
from lab.system.command import Stopped
from lab.system.errors import StorageError, UserError

log = logging.getLogger(f"spurious.{__name__}")

MANY_GROUPS = 40  # rows of counts; more would fill pages of the log


class Run(Tables):
    """An open results folder: tables, log file, trackers.

    Use as a context manager; leaving it closes everything and records in `status.json` how it
    ended. Raises `UserError` when another process has it open.
    """

    def __init__(self, folder: Path, config: Config):
        super().__init__(folder)
        self.config = config
        self._lock = _lock(folder)
        status = read_status(folder)
        self.id, self.phase, self.summary = status["id"], status["phase"], status["summary"]
        self.state = "running"
        self._handler = _LogFile(folder / "run.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("spurious").addHandler(self._handler)

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            self._log_end(kind, error, traceback)
            self._record_end(error)
        self.each_tracker("finish", self.summary, self.state != "done")
        self.close()

    def close(self) -> None:
        """Close the files and release the run for other processes."""
        super().close()
        logging.getLogger("spurious").removeHandler(self._handler)
        self._handler.close()
        if self._lock:
            self._lock.release()

    def enter(self, phase: str) -> None:
        self.sync()
        self.phase = phase
        self.state = "done" if phase == "done" else "running"
        write_status(self.folder, self.state, phase, self.id, self.summary)

    def _record_end(self, error: BaseException) -> None:
        """How the run ended, in `status.json` and as advice on the error."""
        self.state = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        try:
            write_status(self.folder, self.state, self.phase, self.id, self.summary, reason)
        except StorageError as second:
            log.warning("%s", second)
        add_advice(error, self.folder)

    def _log_end(self, kind, error: BaseException, traceback) -> None:
        """Why the run ended, to `run.log` only: the command itself reports it on the console."""
        reason = str(error) or kind.__name__
        fault = isinstance(error, Exception) and not isinstance(error, UserError)
        log.debug("Ended: %s", reason, exc_info=(kind, error, traceback) if fault else None)

    def keep_log(self, early: MemoryHandler) -> None:
        logging.getLogger("spurious").removeHandler(early)
        early.setTarget(self._handler)
        early.close()
        log.info("Folder: %s", self.folder)

    def save_data(self, count_rows: list[dict], samples: dict) -> None:
        files.write_csv(self.folder / "group_counts.csv", count_rows, COUNT_COLUMNS)
        width = max(len(row["split"]) for row in count_rows)
        level = logging.INFO if len(count_rows) <= MANY_GROUPS else logging.DEBUG
        for row in count_rows:
            log.log(level, "%-*s %6d × %s", width, row["split"], row["count"], row["name"])
        if len(count_rows) > MANY_GROUPS:
            for split in dict.fromkeys(row["split"] for row in count_rows):
                counts = [row["count"] for row in count_rows if row["split"] == split]
                nonempty = sum(count > 0 for count in counts)
                log.info(
                    "%-*s %6d in %d of %d groups", width, split, sum(counts), nonempty, len(counts)
                )
        if self.config.show_and_save_samples and samples:  # vectors cannot be looked at
            files.save(self.folder / "samples.npz", lambda file: np.savez(file, **samples))
            names = {row["group"]: row["name"] for row in count_rows}
            pictures, members = samples["pictures"], samples["group"]
            by_group = {names[g]: pictures[members == g] for g in np.unique(members)}
            self.each_tracker("samples", by_group)

    def images(self, paths: Iterable[Path]) -> None:
        self.each_tracker("images", list(paths))

    def conclude(
        self, prefix: str, summaries: dict[str, dict[str, float]], epoch: int | None = None
    ) -> None:
        if epoch is not None:
            self.summary[f"{prefix}epoch"] = epoch
        for split, summary in summaries.items():
            self.summary |= {f"{prefix}{split}_{name}": value for name, value in summary.items()}
        test = summaries["test"]
        when = {"": "", "dfr_": " after DFR", "best_": f" at the best val epoch, {epoch}"}[prefix]
        log.info(
            "Test accuracy%s: worst group %.3f, minority %.3f, average %.3f, adjusted %.3f",
            when,
            test["worst_acc"],
            test["minority_acc"],
            test["avg_acc"],
            test["adjusted_acc"],
        )
        for name in test:
            if name.endswith("_worst_acc"):  # of one of several tasks
                task = name.removesuffix("_worst_acc")
                accuracies = (test[name], test[f"{task}_avg_acc"])
                log.info("  of %s%s: worst group %.3f, average %.3f", task, when, *accuracies)
        for name, summary in summaries.items():
            if name not in ("train", "val", "target", "test"):
                accuracies = (summary["worst_acc"], summary["avg_acc"])
                log.info("  on %s%s: worst group %.3f, average %.3f", name, when, *accuracies)

    def add_tracker(self, tracker) -> None:
        """Show the run in a `trackers.Tracker` as well, if it is not None."""
        if tracker is not None:
            self.trackers.append(tracker)


def add_advice(error: BaseException, folder: Path) -> None:
    """Note on an error that ends a run how to resume it, unless that makes no sense."""
    if not getattr(error, "final", False) and not getattr(error, "__notes__", None):
        error.add_note("To resume:")
        error.add_note(f"python main.py --resume {shlex.quote(str(folder))}")


class _LogFile(logging.FileHandler):
    """`run.log`; when it cannot be written, that is reported once, and the tables decide."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        if not self.reported:
            self.reported = True
            print(f"{self.baseFilename}: cannot be written, {error.strerror}", file=sys.stderr)


def _lock(folder: Path) -> filelock.BaseFileLock | None:
    """The run's lock, which ends with the process. Raises `UserError` when another has it."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: in use by another process; wait for it or stop it") from None
    except NotImplementedError:  # some network file systems
        log.warning("%s: no file locks here, so take care not to resume a running run", folder)
        return None
    return lock
