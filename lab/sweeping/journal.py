"""The trials of a search: the study in its journal, and the tables made from it."""

from pathlib import Path

import filelock
import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from lab.sweeping import grids
from lab.sweeping.space import Section
from lab.system import files
from lab.system.command import print_lines

JOURNAL = "optuna_journal.log"
STUDY = "sweep"
STATES = {
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def open_study(folder: Path, section: Section | None = None) -> optuna.Study:
    """The study of a sweep, created with the section's pruner where it does not exist yet."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with filelock.FileLock(folder / ".optuna.lock"):
        return optuna.create_study(
            storage=_storage(folder),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=section.pruner if section else None,
        )


def _storage(folder: Path) -> JournalStorage:
    path = str(folder / JOURNAL)
    lock = JournalFileSymlinkLock(path)
    backend = JournalFileBackend(path, lock_obj=lock)
    lock.acquire()
    try:
        files.cut_torn_line(path)  # of a machine that went down: no line could follow it
    finally:
        lock.release()
    return JournalStorage(backend)


def place(trial) -> str:
    """The folder of a trial, below the sweep's."""
    return trial.user_attrs.get("folder", f"jobs/{trial.number:04d}")


def replaced(trials) -> set[int]:
    """The numbers of abandoned trials, which others continue."""
    return {trial.user_attrs["continues"] for trial in trials if "continues" in trial.user_attrs}


def name(trial) -> str:
    """The values of a trial, with few enough digits for people."""
    short = {k: float(f"{v:.4g}") if type(v) is float else v for k, v in trial.params.items()}
    return grids.setting_name(short, list(short))


def seed_jobs(manifest: dict, trial) -> list[dict]:
    """The runs of a trial, one per seed, as a manifest has them."""
    seeds = manifest["seeds"]
    return [
        {
            "setting": trial.number,
            "seed": seed,
            "overrides": trial.params | {"seed": seed},
            "folder": place(trial) + f"/seed_{seed}" * (len(seeds) > 1),
        }
        for seed in seeds
    ]


def table(folder: Path, study: optuna.Study | None = None) -> pd.DataFrame:
    """The trials of a sweep: trial, state, value, epoch (the last reported), keys, folder, error.

    Of an abandoned trial and the one that continues it only the latter is listed.
    """
    study = study or open_study(folder)
    trials = study.get_trials(deepcopy=False)
    abandoned = replaced(trials)
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    rows = [
        {"trial": trial.number, "state": STATES[trial.state], "value": trial.value}
        | {"epoch": trial.last_step}
        | {key: trial.params.get(key) for key in keys}
        | {"folder": place(trial), "error": trial.user_attrs.get("error")}
        for trial in trials
        if trial.number not in abandoned
    ]
    return pd.DataFrame(
        rows, columns=["trial", "state", "value", "epoch", *keys, "folder", "error"]
    )


def show_status(folder: Path) -> int:
    """Prints a line per trial; returns the exit code, 1 if any has failed."""
    study = open_study(folder)
    names = {trial.number: name(trial) for trial in study.get_trials(deepcopy=False)}
    trials = table(folder, study)
    for trial in trials.itertuples():
        value = f"{trial.value:.3f}" if pd.notna(trial.value) else ""
        epoch = f"{trial.epoch:.0f}" if pd.notna(trial.epoch) else ""
        lines = [f"{trial.trial:04d} {trial.state:7} {epoch:>6} {value:>5}  {names[trial.trial]}"]
        lines += [f"     {trial.error}"] * (trial.state == "failed")
        print_lines(*lines, stream="stdout")
    return int("failed" in set(trials.state))


def with_trials(folder: Path, manifest: dict) -> tuple[dict, list[str]]:
    """(the manifest with the finished trials as settings and jobs, what became of all trials)."""
    study = open_study(folder)
    done = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    keys = list(dict.fromkeys(key for trial in done for key in trial.params))
    settings = [
        {"setting": trial.number, "name": name(trial), "overrides": trial.params} for trial in done
    ]
    jobs = [job for trial in done for job in seed_jobs(manifest, trial)]
    jobs = [{"job": number} | job for number, job in enumerate(jobs)]
    counts = table(folder, study).state.value_counts()
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    notes = [f"Trials: {shown}; the finished ones are in the table."]
    return manifest | {"keys": keys, "settings": settings, "jobs": jobs}, notes
