"""The state of every job of a sweep, and the table that shows it."""

import csv
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lab.config import loading, schema, strict_yaml
from lab.sweeping import attempts, locks, manifests, slurm
from lab.system.command import print_lines

REFRESH = 2.0  # seconds between two pictures of the live table
WIDTH = 80
STATES = ("waiting", "running", "done", "failed", "missing")


class State(NamedTuple):
    """How far a job is. state: one of `STATES`; error: the last one's, or why it is missing."""

    state: str
    epoch: int | None = None
    worst: float | None = None
    error: str | None = None


def states(folder: Path, manifest: dict) -> list[State]:
    """The state of every job, in the manifest's order. Raises `UserError`.

    SLURM's accounting is not used, since a cluster may have none: what `squeue` lists is waiting or
    running; the state of the others is in their runs and in `job.json`.
    """
    jobs = manifest["jobs"]
    done = [manifests.is_done(folder, job) for job in jobs]
    ids = slurm.submitted_ids(folder)
    queue = slurm.squeue() if ids and not all(done) else {}
    served = locks.in_use(folder)  # by a sweep.py on some machine that starts jobs
    return [
        _state(folder, job, over, queue.get(ids.get(str(job["job"]), "")), served)
        for job, over in zip(jobs, done)
    ]


def _state(folder: Path, job: dict, done: bool, queued: str | None, served: bool) -> State:
    place = folder / job["folder"]
    epoch, worst = progress(manifests.run_folder(folder, job))
    if done:
        return State("done", epoch, worst)
    last = attempts.read_attempt(place)
    kind, error = last.get("state"), last.get("error")
    if locks.in_use(place) or (queued == "RUNNING" and kind == "running"):
        return State("running", epoch, worst)
    if queued or (served and kind == "submitted"):
        return State("waiting", epoch, worst)
    if kind == "running":
        return State("failed", epoch, worst, "killed without a record of its end")
    if kind in ("failed", "finished"):
        return State("failed", epoch, worst, error or "ended, but its run is not done")
    if kind == "cancelled":
        return State("missing", epoch, worst, error)
    return State("missing", epoch, worst, "not started" if epoch is None else "not resumed")


def progress(run: Path | None) -> tuple[int | None, float | None]:
    """(last epoch, worst-group test accuracy then) in a run's tables, None before the first."""
    if run is None:
        return None, None
    try:
        with open(run / "training_history.csv", "rb") as file:
            header = file.readline()
            start = file.tell()
            file.seek(max(start, file.seek(0, os.SEEK_END) - 8 * len(header)))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None, None
    if not lines:
        return None, None
    (row,) = csv.DictReader([header.decode(), lines[-1].decode()])
    return int(row["epoch"]), float(row["test_worst_acc"])


def exit_code(found: list[State]) -> int:
    """1 if a job has failed or is missing, else 0."""
    return int(any(state.state in STATES[3:] for state in found))


def counts(found: list[State]) -> str:
    """How many jobs are in which state, in one line."""
    numbers = Counter(state.state for state in found)
    shown = [f"{numbers[state]} {state}" for state in STATES if numbers[state]]
    return f"{len(found)} jobs: {', '.join(shown)}"


def show_status(folder: Path) -> int:
    """Prints the table of the jobs, again and again on a terminal; returns the exit code."""
    live = sys.stdout.isatty()
    while True:
        manifest = manifests.read_manifest(folder)
        found = states(folder, manifest)
        over = not any(state.state in STATES[:2] for state in found)
        rows = shutil.get_terminal_size().lines - 1 if live and not over else None
        lines = table(folder, manifest, found, rows)
        clear = "\x1b[H\x1b[2J" if live else ""
        print_lines(clear + "\n".join(lines), stream="stdout")
        if over or not live:
            return exit_code(found)
        time.sleep(REFRESH)


def table(folder: Path, manifest: dict, found: list[State], rows: int | None = None) -> list[str]:
    """Lines of the table, 80 columns wide; what failed or runs comes first if rows are few."""
    base = strict_yaml.read(folder / manifests.BASE)
    loading.apply_overrides(base, manifest["base_overrides"])
    usual = base.get("epochs", schema.Config.model_fields["epochs"].default)
    names = {entry["setting"]: entry["name"] for entry in manifest["settings"]}
    entries = []
    for job, state in zip(manifest["jobs"], found):
        epochs = job["overrides"].get("epochs", usual)
        epoch = "" if state.epoch is None else f"{state.epoch}/{epochs}"
        worst = "" if state.worst is None else f"{state.worst:.3f}"
        what = f"{job['seed']:>5}  {names[job['setting']]}"
        lines = [f"{job['job']:04d} {state.state:7} {epoch:>11} {worst:>5} {what}"]
        if state.error:
            lines.append(f"     {state.error}")
        entries.append((state.state, lines))
    head = [folder.name, counts(found), "job  state         epoch worst  seed  setting"]
    lines = [line for _, lines in entries for line in lines]
    if rows is not None and len(head) + len(lines) > rows:
        order = ("failed", "running", "missing", "waiting", "done")
        entries.sort(key=lambda entry: order.index(entry[0]))
        lines = [line for _, lines in entries for line in lines][: rows - len(head) - 1]
        lines.append("…")
    return [strict_yaml.shorten(line, WIDTH) for line in head + lines]
