"""One run's results folder: its tables, its log, its state; starting and resuming it.

Every number is first written to a table in the folder; trackers show the same numbers under the
same names and can never stop a run. `status.json` says how far the run is:

- state: running, stopped (by a signal), failed, done. A run that was killed says running.
- phase: what is being done, one of `PHASES`; error: the last one's first line;
- id: of the run on wandb; summary: the final metrics so far.
"""

import csv
import importlib.metadata
import io
import json
import logging
import logging.handlers
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from lab.config import comparing, loading, plugins, strict_yaml
from lab.config.schema import Config
from lab.system import files
from lab.system.command import Stopped
from lab.system.errors import ConfigError, StorageError, UserError

log = logging.getLogger(f"spurious.{__name__}")

ANALYSIS_COLUMNS = ("epoch", "split", "analysis", "pair", "quantity", "value")
COUNT_COLUMNS = ("split", "group", "y", "a", "name", "count", "share", "skipped", "task")
TIMING_COLUMNS = ("phase", "epoch", "seconds")
PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pandas", "matplotlib",
    "scikit-learn", "wandb", "tensorboard",
)  # fmt: skip
PHASES = ("training", "DFR", "plots", "done")
CONFIG = "config_used.yaml"
REWOUND = ("training_history", "analysis")  # tables that a checkpoint says the length of


class Table:
    """A CSV file that grows row by row. Numbers are written so that they read back exactly."""

    def __init__(self, path, columns):
        self.columns = list(columns)
        self.file = files.Growing(path)
        if not self.file.size:
            self._write([self.columns])

    def add(self, rows) -> None:
        """Append rows (mappings with exactly the table's columns), all of them or none."""
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(f"columns {sorted(row)} do not fit {self.columns}")
        self._write([[row[column] for column in self.columns] for row in rows])

    def _write(self, lines) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        self.file.append(text.getvalue().encode())


class Tables:
    """Tables that grow in a folder while a network is trained, and trackers that show them."""

    leads = True  # of several processes, the one that writes

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config
        self.tables: dict[str, Table] = {}
        self.trackers: list = []

    def close(self) -> None:
        """Close the tables."""
        for table in self.tables.values():
            table.file.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of the tables that training writes, for `rewind`."""
        return {name: self.tables[name].file.size for name in REWOUND if name in self.tables}

    def sync(self) -> None:
        """Wait until the tables are on the disk, so that a checkpoint can rely on them."""
        for table in self.tables.values():
            table.file.sync()

    def holds(self, sizes: dict[str, int]) -> bool:
        """Whether the tables are at least as long as when their `sizes` were taken."""
        paths = {name: self.folder / f"{name}.csv" for name in sizes}
        return all(paths[n].exists() and paths[n].stat().st_size >= sizes[n] for n in sizes)

    def rewind(self, sizes: dict[str, int], epoch: int) -> None:
        """Remove the rows that training wrote after `sizes` were taken: it writes them again.

        epoch: the last one that is recorded then, -1 for none.
        """
        for name in REWOUND:
            path = self.folder / f"{name}.csv"
            if name in sizes:
                os.truncate(path, sizes[name])
            else:
                path.unlink(missing_ok=True)
        self._each_tracker("rewind", epoch)

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
        for epoch, values in tagged(rows).items():
            self._each_tracker("log", epoch, values)

    def histograms(self, epoch: int, values: dict) -> None:
        """Show how the values of tensors are distributed, in the trackers only."""
        self._each_tracker("histograms", epoch, values)

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

    def _each_tracker(self, call: str, *arguments) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, call)(*arguments)
            except Exception as error:  # a tracker must never stop a run; the tables are the truth
                log.warning("%s stopped tracking: %s", type(tracker).__name__, error)
                self.trackers.remove(tracker)


class Run(Tables):
    """An open results folder: tables, log file, trackers.

    Use as a context manager; leaving it closes everything and says in `status.json` how it ended.
    Raises `UserError` when another process has it open.
    """

    def __init__(self, folder: Path, config: Config):
        super().__init__(folder, config)
        self._lock = _lock(folder)
        status = read_status(folder)
        self.id, self.phase, self.summary = status["id"], status["phase"], status["summary"]
        self.state = "running"
        self._handler = _LogFile(folder / "run.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("spurious").addHandler(self._handler)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            self._log_end(kind, error, traceback)
            self._say_how_it_ended(error)
        self._each_tracker("finish", self.summary, self.state != "done")
        self.close()

    def close(self) -> None:
        """Close the files and give the run back to other processes."""
        super().close()
        logging.getLogger("spurious").removeHandler(self._handler)
        self._handler.close()
        if self._lock:
            self._lock.release()

    def enter(self, phase: str) -> None:
        """From here on, a resumed run starts with this phase."""
        self.sync()
        self.phase = phase
        self.state = "done" if phase == "done" else "running"
        write_status(self.folder, self.state, phase, self.id, self.summary)

    def _say_how_it_ended(self, error) -> None:
        self.state = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        try:
            write_status(self.folder, self.state, self.phase, self.id, self.summary, reason)
        except StorageError as second:
            log.warning("%s", second)
        add_advice(error, self.folder)

    def part(self, name: str) -> Tables:
        """Tables of another training that belongs to this run, in a folder of its own."""
        (self.folder / name).mkdir(exist_ok=True)
        return Tables(self.folder / name, self.config)

    def forget_results(self) -> None:
        """Remove what follows from the trained network, which is going to be another."""
        for pattern in ("model.pt", "dfr_*", "gradcam.*", "plots/dfr.*", "plots/gradcam*"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def keep_log(self, early: logging.handlers.MemoryHandler) -> None:
        """Write the lines that were logged before there was a folder to `run.log`."""
        logging.getLogger("spurious").removeHandler(early)
        early.setTarget(self._handler)
        early.close()
        log.info("Folder: %s", self.folder)

    def save_data(self, count_rows: list[dict], samples: dict) -> None:
        """Write `group_counts.csv` and, if wanted, `samples.npz`."""
        files.write_csv(self.folder / "group_counts.csv", count_rows, COUNT_COLUMNS)
        width = max(len(row["split"]) for row in count_rows)
        for row in count_rows:
            # A hundred groups would fill pages; their table has them all.
            level = logging.INFO if len(count_rows) <= 40 else logging.DEBUG
            log.log(level, "%-*s %6d × %s", width, row["split"], row["count"], row["name"])
        if len(count_rows) > 40:
            for split in dict.fromkeys(row["split"] for row in count_rows):
                counts = [row["count"] for row in count_rows if row["split"] == split]
                there = (sum(count > 0 for count in counts), len(counts))
                log.info("%-*s %6d in %d of %d groups", width, split, sum(counts), *there)
        if self.config.show_and_save_samples and samples:  # vectors cannot be looked at
            files.save(self.folder / "samples.npz", lambda file: np.savez(file, **samples))
            names = {row["group"]: row["name"] for row in count_rows}
            pictures, members = samples["pictures"], samples["group"]
            by_group = {names[g]: pictures[members == g] for g in np.unique(members)}
            self._each_tracker("samples", by_group)

    def _log_end(self, kind, error, traceback) -> None:
        """Why the run ended, to `run.log` only: the console is told by the command."""
        reason = str(error) or kind.__name__
        whole = not isinstance(error, UserError) and isinstance(error, Exception)
        log.debug("Ended: %s", reason, exc_info=(kind, error, traceback) if whole else None)

    def images(self, paths) -> None:
        """Show saved plots in the trackers."""
        self._each_tracker("images", list(paths))

    def conclude(self, prefix: str, summaries: dict[str, dict[str, float]], epoch=None) -> None:
        """Tell final metrics by split: in the log, in `status.json`, as the trackers' summary.

        prefix: of their names: "" after training, "best_" of the best epoch, "dfr_" after DFR.
        """
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
        if tracker is not None:
            self.trackers.append(tracker)


def tagged(rows) -> dict[int, dict]:
    """{epoch: {name: value}} of rows of `analysis.csv`, with the names that trackers show."""
    by_epoch: dict[int, dict] = {}
    for row in rows:
        parts = [row[c] for c in ("analysis", "split", "pair", "quantity") if row[c]]
        by_epoch.setdefault(row["epoch"], {})["/".join(parts)] = row["value"]
    return by_epoch


def add_advice(error, folder: Path) -> None:
    """Note on an error that ends a run how to resume it, unless that makes no sense."""
    if not getattr(error, "final", False) and not getattr(error, "__notes__", None):
        error.add_note("To resume:")
        error.add_note(f"python main.py --resume {shlex.quote(str(folder))}")


class Silent:
    """Stands for the run in the processes that do not write."""

    leads = False

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def _nothing(self, *arguments) -> None:
        pass

    history = analysis = time = images = conclude = enter = sync = rewind = _nothing
    histograms = keep_log = save_data = close = _nothing

    def part(self, name: str) -> "Silent":
        return Silent(self.folder / name, self.config)

    def sizes(self) -> dict[str, int]:
        return {}

    def holds(self, sizes: dict[str, int]) -> bool:
        return Tables.holds(self, sizes)

    @contextmanager
    def timed(self, *arguments):
        yield


class _LogFile(logging.FileHandler):
    """`run.log`; when it cannot be written, that is told once, and the tables decide."""

    told = False

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        if not self.told:
            self.told = True
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


def write_status(folder, state, phase, run_id, summary, error: str | None = None) -> None:
    """Write `status.json`."""
    shown = {name: value if math.isfinite(value) else None for name, value in summary.items()}
    status = {"state": state, "phase": phase, "error": error, "id": run_id, "summary": shown}
    files.write_text(folder / "status.json", json.dumps(status, indent=2, allow_nan=False) + "\n")


def read_status(folder) -> dict:
    """What `status.json` says. Raises `UserError` if it is not there or not readable."""
    path = Path(folder) / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        summary = {k: math.nan if v is None else float(v) for k, v in status["summary"].items()}
        known = status["phase"] in PHASES and isinstance(status["id"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not readable, so this is no run to resume ({error})") from None
    if not known:
        raise UserError(f"{path}: the phase is none of {', '.join(PHASES)}")
    return status | {"summary": summary}


def start(config: Config, device: str, command: list[str], facts: dict) -> Run:
    """A new results folder `<experiment_name>_<time>`, never an existing one.

    It appears by a rename with `config_used.yaml`, `environment.json` and `status.json` inside.
    facts: what else to tell of in `environment.json`. Raises `UserError` when it cannot be made.
    """
    results = Path(config.results_dir)
    fresh = None
    try:
        results.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=results))
        fresh.chmod(0o755)
        files.write_text(fresh / CONFIG, config_yaml(config))
        _write_environment(fresh, environment(config, device, command) | facts)
        write_status(fresh, "running", PHASES[0], secrets.token_hex(4), {})
        folder = rename_to_unique(fresh, results / f"{config.experiment_name}_{now()}")
    except OSError as error:
        raise UserError(f"results_dir: {results} cannot be written, {error.strerror}") from None
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)
    return Run(folder, config)


def _write_environment(folder: Path, facts: dict) -> None:
    files.write_text(folder / "environment.json", json.dumps(facts, indent=2) + "\n")


class Resumption(NamedTuple):
    """A run that is to go on: with which configuration, and with which phase to start.

    seen: the bytes of the files that this follows from, before the run is locked.
    """

    folder: Path
    config: Config
    phase: str
    seen: list[bytes]


def load_to_resume(folder: Path, config_file: str | None, overrides) -> Resumption:
    """What it takes to resume a run; its phase is "done" if there is nothing left to do.

    config_file: None = the run's own `config_used.yaml`. Raises `ConfigError` for every key with a
    change that would change the results.
    """
    used = folder / CONFIG
    if not used.is_file():
        raise ConfigError(f"--resume: given {folder}, but there is no {used}")
    seen = _state(folder)
    # Whoever resumes a run runs its plugins again.
    old = loading.load_config(used, trust_plugins=True)
    new = loading.load_config(config_file or used, overrides, trust_plugins=True)
    problems = comparing.changes_results(old, new)
    if problems:
        raise ConfigError(*problems)
    phase = read_status(folder)["phase"]
    if new.epochs > old.epochs:
        phase = PHASES[0]
    elif phase == "done" and new.plot_format != old.plot_format:
        phase = "plots"
    return Resumption(folder, new, phase, seen)


def _state(folder: Path) -> list[bytes]:
    """What says how far a run is; missing files are empty."""
    paths = [folder / CONFIG, folder / "status.json"]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def resume(resumption: Resumption, device: str, command: list[str]) -> Run:
    """The run, open to go on. Raises `UserError` if another process has it or has changed it."""
    folder, config, phase, seen = resumption
    run = Run(folder, config)
    try:
        if _state(folder) != seen:
            raise UserError(f"{folder}: another process has just gone on with this run")
        first = folder / "identification"  # of JTT
        places = (folder, folder / "plots", folder / "checkpoints", first, first / "checkpoints")
        for place in places:
            files.remove_temporaries(place)
        for timings in (folder / "timings.csv", first / "timings.csv"):
            if timings.exists():
                files.cut_torn_line(timings)
        # Before anything changes: from here on the run is not done, whatever happens.
        run.summary = {} if phase == PHASES[0] else run.summary
        run.enter(phase)
        if phase == PHASES[0]:
            run.forget_results()
        files.write_text(folder / CONFIG, config_yaml(config))
        _tell_environment(folder, environment(config, device, command))
    except BaseException:
        run.close()
        raise
    return run


def _tell_environment(folder: Path, now: dict) -> None:
    """Adds what a run goes on with to `environment.json`; warns of what has changed."""
    path = folder / "environment.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        changes = list(_differences(facts.get("resumed", [facts])[-1], now))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: not readable (%s), so it cannot tell what has changed", path, error)
        facts, changes = {}, []
    for change in changes:
        log.warning("%s: was %s, is %s; the results may differ in the last digits", *change)
    facts.setdefault("resumed", []).append(now)
    _write_environment(folder, facts)


def _differences(before: dict, now: dict):
    """What of the environment decides about the last digits and has changed."""
    for name in ("git_commit", "device", "device_name", "threads"):
        if before[name] != now[name]:
            yield name, before[name], now[name]
    hashes = {plugin["file"]: plugin["sha256"] for plugin in before.get("plugins", [])}
    for plugin in now.get("plugins", []):
        if (was := hashes.get(plugin["file"])) != plugin["sha256"]:
            yield f"plugin {plugin['file']}", was and was[:12], plugin["sha256"][:12]
    for package in ("torch", "numpy", "scikit-learn"):
        if before["versions"][package] != now["versions"][package]:
            yield package, before["versions"][package], now["versions"][package]


def now() -> str:
    """The time in the names of folders."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def rename_to_unique(folder: Path, wanted: Path) -> Path:
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


def new_folder(parent: Path) -> Path:
    """A new folder in `parent` with the time as its name, never an existing one."""
    parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    fresh.chmod(0o755)
    return rename_to_unique(fresh, parent / now())


def config_yaml(config: Config) -> str:
    """Every key with its value; reads back as the same configuration."""
    return strict_yaml.dump(config.resolved())


def environment(config: Config, device: str, command: list[str]) -> dict:
    """Versions, commit, device, seed and command of a run."""
    import torch

    cuda = device.startswith("cuda")
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
        "device_name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "plugins": plugins.facts(config.plugins, config.catalogue.records),
        "command": command,
    }


def _git(*arguments) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent.parent.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
