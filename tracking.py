"""One run's results folder, its tables and its trackers.

Every number is first written to a table in the folder; trackers (wandb) show the same numbers
under the same names and can never stop a run.
"""

import csv
import importlib.metadata
import json
import logging
import logging.handlers
import math
import os
import platform
import subprocess
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import yaml

import files
from config import Config
from errors import UserError

log = logging.getLogger(f"spurious.{__name__}")

ANALYSIS_COLUMNS = ("epoch", "split", "analysis", "pair", "quantity", "value")
COUNT_COLUMNS = ("split", "group", "y", "a", "name", "count", "share", "skipped")
TIMING_COLUMNS = ("phase", "epoch", "seconds")
PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pandas", "matplotlib",
    "scikit-learn", "wandb",
)  # fmt: skip
WANDB_TIMEOUT = 5  # seconds; wandb's own without a network is over 90


class Table:
    """A CSV file that grows row by row. Numbers are written so that they read back exactly."""

    def __init__(self, path, columns):
        self.columns = list(columns)
        self.file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115, closed by the run
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(self.columns)
        self.file.flush()

    def add(self, rows) -> None:
        """Append rows (mappings with exactly the table's columns) and flush."""
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(f"columns {sorted(row)} do not fit {self.columns}")
            self.writer.writerow([row[column] for column in self.columns])
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Run:
    """An open results folder: tables, log file, trackers.

    Use as a context manager; leaving it closes everything.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config
        self.tables: dict[str, Table] = {}
        self.trackers: list = []
        self.summary: dict[str, float] = {}
        self.failed = True  # until the pipeline says otherwise
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler = handler
        logging.getLogger("spurious").addHandler(handler)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            self._log_end(kind, error, traceback)
        for table in self.tables.values():
            table.close()
        self._each_tracker("finish", self.summary, self.failed)
        logging.getLogger("spurious").removeHandler(self._handler)
        self._handler.close()

    def keep_log(self, early: logging.handlers.MemoryHandler) -> None:
        """Write the lines that were logged before there was a folder to `run.log`."""
        logging.getLogger("spurious").removeHandler(early)
        early.setTarget(self._handler)
        early.close()
        log.info("Folder: %s", self.folder)

    def save_data(self, count_rows: list[dict], samples: dict) -> None:
        """Write `group_counts.csv` and, if wanted, `samples.npz`."""
        self.table("group_counts", COUNT_COLUMNS).add(count_rows)
        for row in count_rows:
            log.info("%(split)-5s %(count)6d × %(name)s", row)
        if self.config.show_and_save_samples:
            with files.complete(self.folder / "samples.npz") as temporary:
                np.savez(temporary, **samples)

    def _log_end(self, kind, error, traceback) -> None:
        """Why the run ended, to `run.log` only: the console is told by the command."""
        reason = str(error) or kind.__name__
        whole = not isinstance(error, UserError) and isinstance(error, Exception)
        log.debug("Ended: %s", reason, exc_info=(kind, error, traceback) if whole else None)

    def table(self, name: str, columns) -> Table:
        """The open table `<name>.csv`, made with these columns on first use."""
        if name not in self.tables:
            self.tables[name] = Table(self.folder / f"{name}.csv", columns)
        return self.tables[name]

    def history(self, row: dict) -> None:
        """Append a row to `training_history.csv`; every row has the same columns."""
        self.table("training_history", row).add([row])
        self._each_tracker("log", row["epoch"], row)

    def analysis(self, rows: list[dict]) -> None:
        """Append rows to `analysis.csv`."""
        self.table("analysis", ANALYSIS_COLUMNS).add(rows)
        by_epoch: dict[int, dict] = {}
        for row in rows:
            parts = [row[c] for c in ("analysis", "split", "pair", "quantity") if row[c]]
            by_epoch.setdefault(row["epoch"], {})["/".join(parts)] = row["value"]
        for epoch, values in by_epoch.items():
            self._each_tracker("log", epoch, values)

    def time(self, phase: str, seconds: float, epoch: int | str = "") -> None:
        """Append a row to `timings.csv`."""
        row = {"phase": phase, "epoch": epoch, "seconds": round(seconds, 4)}
        self.table("timings", TIMING_COLUMNS).add([row])

    @contextmanager
    def timed(self, phase: str, epoch: int | str = ""):
        """Times a block into `timings.csv`."""
        start = time.perf_counter()
        yield
        self.time(phase, time.perf_counter() - start, epoch)

    def images(self, paths) -> None:
        """Show saved plots in the trackers."""
        self._each_tracker("images", list(paths))

    def conclude(self, prefix: str, summaries: dict[str, dict[str, float]]) -> None:
        """Tell the final metrics by split: in the log, and as the trackers' summary."""
        for split, summary in summaries.items():
            self.summary |= {f"{prefix}{split}_{name}": value for name, value in summary.items()}
        test = summaries["test"]
        log.info(
            "Test accuracy%s: worst group %.3f, average %.3f, adjusted %.3f",
            " after DFR" if prefix else "",
            test["worst_acc"],
            test["avg_acc"],
            test["adjusted_acc"],
        )

    def add_tracker(self, tracker) -> None:
        if tracker is not None:
            self.trackers.append(tracker)

    def _each_tracker(self, call: str, *arguments) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, call)(*arguments)
            except Exception as error:  # a tracker must never stop a run; the tables are the truth
                log.warning("%s stopped tracking: %s", type(tracker).__name__, error)
                self.trackers.remove(tracker)


def start(config: Config, device: str, command: list[str], features: dict | None = None) -> Run:
    """A new results folder `<experiment_name>_<time>`, never an existing one.

    It appears by a rename with `config_used.yaml` and `environment.json` inside. features: what
    the feature extractor tells of itself. Raises `UserError` when it cannot be made.
    """
    results = Path(config.results_dir)
    try:
        results.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=results))
        fresh.chmod(0o755)
        files.write_text(fresh / "config_used.yaml", config_yaml(config))
        facts = environment(config, device, command) | {"features": features}
        files.write_text(fresh / "environment.json", json.dumps(facts, indent=2) + "\n")
        folder = _rename_to_unique(fresh, results / f"{config.experiment_name}_{_now()}")
    except OSError as error:
        raise UserError(f"results_dir: {results} cannot be written, {error.strerror}") from None
    return Run(folder, config)


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _rename_to_unique(folder: Path, wanted: Path) -> Path:
    """Renames to `wanted`, or to `wanted_2`, …: whoever comes second gets the next name."""
    for attempt in range(1, 10_000):
        target = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}_{attempt}")
        try:
            os.rename(folder, target)  # fails on a folder with something in it
            return target
        except OSError:
            if not target.exists():
                raise
    raise UserError(f"results_dir: too many folders named {wanted}")


def config_yaml(config: Config) -> str:
    """Every key with its value; reads back as the same configuration."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)


def environment(config: Config, device: str, command: list[str]) -> dict:
    """Versions, commit, device, seed and command of a run."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "command": command,
    }


def _git(*arguments) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Wandb:
    """Shows a run on Weights & Biases, with the epoch as x-axis."""

    def __init__(self, run):
        self.run = run
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, values: dict) -> None:
        # NaN would end the axes of wandb's charts; the tables keep it.
        shown = {name: value for name, value in values.items() if _finite(value)}
        self.run.log(shown | {"epoch": epoch})

    def images(self, paths) -> None:
        import wandb

        if any(path.suffix != ".png" for path in paths):
            log.warning("wandb: shows no SVG; plot_format: png has the plots there, too")
        else:
            self.run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})

    def finish(self, summary: dict, failed: bool) -> None:
        self.run.summary.update({k: v for k, v in summary.items() if _finite(v)})
        self.run.finish(exit_code=int(failed))


def _finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def start_wandb(config: Config, folder: Path) -> Wandb | None:
    """A wandb run as the configuration asks for, or None with one warning.

    Never waits longer than a few seconds: without a key it goes offline at once, without a
    network after `WANDB_TIMEOUT`.
    """
    if not config.wandb.enable:
        return None
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE", "auto")
        mode = config.wandb.mode if config.wandb.mode != "auto" else mode
        if mode in ("auto", "online") and not _logged_in(wandb):
            if mode == "online":
                log.warning("wandb: not logged in (`wandb login`), so this run is kept offline")
            mode = "offline"
        mode = "online" if mode == "auto" else mode
        try:
            run = _init_wandb(wandb, config, folder, mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            log.warning("wandb: no connection, so this run is kept offline (%s)", error)
            mode, run = "offline", _init_wandb(wandb, config, folder, "offline")
        if mode == "offline":
            log.info("wandb: offline; to upload: wandb sync %s", Path(run.dir).parent)
        elif mode == "online":
            log.info("wandb: %s", run.url)
        return Wandb(run)
    except Exception as error:  # a tracker must never stop a run
        log.warning("wandb: not used, %s", error)
        return None


def _logged_in(wandb) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # a key that cannot be one
        log.warning("wandb: the key is not usable (%s)", error)
        return False


def _init_wandb(wandb, config: Config, folder: Path, mode: str):
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=folder.name,
        config=config.resolved(),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True, console="off"),
    )
