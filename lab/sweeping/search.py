"""Search of settings with optuna: workers on one or several machines pull trials from a journal.

The section `optuna` of a sweep file names the search space, the number of trials, sampler and
pruner. A trial runs `main.py` as a child; its value is the validation accuracy at the last epoch
(`worst_acc`; `minority_acc` of more than four groups), the mean over the sweep's seeds. The
accuracies of every epoch of the first seed are what the pruner sees: a trial that survives its
first seed runs the others.

The study lives in `optuna_journal.log` in the sweep folder. Who has locked `jobs/<trial>/.worker`
is at work on the trial. Such locks end with their process, so a running trial without one was
abandoned: it is told as failed, and another trial with its values goes on with its runs. (optuna's
own heartbeat does not exist for journals.) The file system has to have locks that all machines see.
"""

import csv
import difflib
import inspect
import io
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from lab.config import loading
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.config.strict_yaml import show
from lab.sweeping import launch, plan
from lab.system import cores, files
from lab.system.command import exit_code, tell
from lab.system.errors import ConfigError

JOURNAL = "optuna_journal.log"
STUDY = "sweep"
WORKER = [sys.executable, "-m", "lab.sweeping.search"]
POLL = 1.0  # seconds between looks at what a child has recorded
DEFAULTS = {"sampler": "TPESampler", "pruner": "MedianPruner"}
KEYS = ("trials", "search_space", "sampler", "sampler_options", "pruner", "pruner_options")
# They end a search by themselves, which optuna allows within its own loop only.
EXHAUSTIVE = ("GridSampler", "BruteForceSampler")
DISTRIBUTIONS = {
    "uniform": lambda low, high: FloatDistribution(low, high),
    "log_uniform": lambda low, high: FloatDistribution(low, high, log=True),
    "int_uniform": lambda low, high: IntDistribution(low, high),
    "choice": lambda *values: CategoricalDistribution(values),
}


@dataclass(frozen=True)
class Section:
    """A checked section `optuna`. sampler: makes the one for the trial with this number."""

    trials: int
    space: dict
    sampler: Callable[[int], BaseSampler]
    pruner: optuna.pruners.BasePruner


def check(section, base, overrides, seeds: list[int]) -> Section:
    """The section as it is used. Raises `ConfigError` with every problem, before anything starts.

    base, overrides: file and `key=value` of the base configuration. The ends and the choices of
    every key must be valid beside the first values of the others, and there must be a validation
    split.
    """
    if not isinstance(section, dict):
        raise ConfigError(f"optuna: given {show(section)}; allowed: {', '.join(KEYS)}")
    problems = [
        f"optuna.{key}: no such key; allowed: {', '.join(KEYS)}"
        for key in section
        if key not in KEYS
    ]
    trials = section.get("trials")
    if type(trials) is not int or not 1 <= trials <= plan.MOST_JOBS:
        allowed = f"a whole number from 1 to {plan.MOST_JOBS}"
        problems.append(f"optuna.trials: given {show(trials)}; allowed: {allowed}")
    space = _space(section.get("search_space"), problems)
    sampler = _named(optuna.samplers, "sampler", section, problems)
    pruner = _named(optuna.pruners, "pruner", section, problems)
    if not problems:
        problems += _problems_of_corners(section["search_space"], base, overrides, seeds)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return Section(trials, space, sampler, pruner(0))


def _space(given, problems: list[str]) -> dict:
    if not isinstance(given, dict) or not given:
        allowed = "a distribution for each key, such as learning_rate: {log_uniform: [1e-4, 1]}"
        problems.append(f"optuna.search_space: given {show(given)}; allowed: {allowed}")
        return {}
    space = {}
    for name, distribution in given.items():
        where = f"optuna.search_space.{name}"
        if name in plan.OWN:
            problems.append(f"{where}: the sweep sets it; allowed: {plan.OWN[name]}")
            continue
        checked = plan.distribution(where, distribution, problems)
        if checked is None:
            continue
        kind, values = checked
        plain = all(isinstance(value, (int, float, str, type(None))) for value in values)
        if not plain:
            problems.append(
                f"{where}.choice: given {show(values)}; allowed with optuna: numbers, texts, "
                "true, false, null"
            )
        else:
            space[name] = DISTRIBUTIONS[kind](*values)
    return space


def _named(module, kind: str, section: dict, problems: list[str]) -> Callable:
    """A function of the trial's number that makes the sampler or the pruner."""
    name = section.get(kind, DEFAULTS[kind])
    options = section.get(f"{kind}_options", {})
    known = [
        known
        for known in module.__all__
        if known.endswith(kind.capitalize())
        and not known.startswith("Base")
        and known not in EXHAUSTIVE
    ]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3) or known
        problems.append(f"optuna.{kind}: given {show(name)}; allowed: {', '.join(near)}")
        return lambda number: None
    if not isinstance(options, dict):
        problems.append(f"optuna.{kind}_options: given {show(options)}; allowed: a mapping")
        return lambda number: None

    def make(number: int):
        """Seeded by the number, so that workers draw different settings, and the same ones again
        when a study goes on; a quasi-random sequence is one sequence, with one seed."""
        cls = getattr(module, name)
        own = dict(options)
        if "seed" in inspect.signature(cls).parameters:
            seed = own.get("seed", 0)
            shared = name == "QMCSampler"
            own["seed"] = derive_seed(seed, "optuna", *[number] * (not shared)) % 2**32
        return cls(**own)

    try:
        make(0)
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        problems.append(f"optuna.{kind}_options: given {show(options)}; {name} says: {reason}")
    return make


def _problems_of_corners(space: dict, base, overrides, seeds) -> list[str]:
    """What is wrong with the configurations at the ends of the search space."""
    ends = {key: next(iter(distribution.values())) for key, distribution in space.items()}
    first = {key: values[0] for key, values in ends.items()} | {"seed": seeds[0]}
    corners = [first, *(first | {key: v} for key, values in ends.items() for v in values[1:])]
    problems = []
    for corner in corners:
        try:
            settings = [*overrides, *plan.override_texts(corner)]
            config = loading.load_config(base, settings, trust_plugins=True)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += _problems_of_validation(config)
    return problems


def _problems_of_validation(config: Config):
    size = config.data_set.validation_size
    if getattr(config, size) == 0:
        yield (
            f"{size}: given 0, but the search goes by validation accuracy, never by test; "
            "allowed with optuna: above 0"
        )


def run(folder: Path, manifest: dict, at_once: int | None) -> int:
    """Search with workers on this machine until all trials are taken; returns the exit code.

    at_once: workers, None = by cores and memory. More of them may work on the same folder from
    other machines. Raises `ConfigError`, before anything starts.
    """
    section = check_manifest(folder, manifest)
    gpus = launch.visible_gpus()
    slots = min(at_once or launch.at_once(len(gpus)), section.trials)
    threads = launch.thread_variables(max(1, cores.available() // slots))
    command = [*WORKER, str(folder)]
    path = os.pathsep.join(filter(None, [str(launch.ROOT), os.environ.get("PYTHONPATH")]))
    workers = []
    try:
        for slot in range(slots):
            own = threads | launch.gpu_variable(gpus, slot) | {"PYTHONPATH": path}
            environment = os.environ | {name: text for name, text in own.items() if text}
            workers.append(subprocess.Popen(command, env=environment))
        codes = [worker.wait() for worker in workers]
    except BaseException as error:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        error.add_note("To resume:")
        error.add_note(f"python sweep.py --resume {shlex.quote(str(folder))}")
        raise
    trials = table(folder)
    counts = trials.state.value_counts()
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    tell(f"{len(trials)} trials: {told}", f"Results: {folder}", stream="stdout")
    return int(any(codes) or "failed" in counts)


def check_manifest(folder: Path, manifest: dict) -> Section:
    """See `check`."""
    base, overrides = Path(folder) / plan.BASE, manifest["base_overrides"]
    return check(manifest["optuna"], base, overrides, manifest["seeds"])


def work(folder: Path, poll: float = POLL) -> None:
    """Take trials of a sweep's study, one after the other, until all are taken.

    Any number of workers may do so at once, on any machine that has the folder. A failed trial
    counts and does not stop the search. Whoever ends writes `trials.csv` and tells the best trial.
    """
    folder = Path(folder)
    manifest = plan.read_manifest(folder)
    section = check_manifest(folder, manifest)
    study = _open(folder, section)
    try:
        while claimed := _claim(folder, study, section):
            trial, lock = claimed
            try:
                _work(folder, manifest, study, trial, poll)
            finally:
                lock.release()
    finally:
        text = table(folder, study).to_csv(index=False, na_rep="nan", lineterminator="\n")
        files.write_text(folder / "trials.csv", text)
    _tell_best(study)


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


def _open(folder: Path, section: Section | None = None) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with filelock.FileLock(folder / ".optuna.lock"):
        return optuna.create_study(
            storage=_storage(folder),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=section and section.pruner,
        )


def _place(trial) -> str:
    """The folder of a trial, below the sweep's."""
    return trial.user_attrs.get("folder", f"jobs/{trial.number:04d}")


def _replaced(trials) -> set[int]:
    """The numbers of abandoned trials, with which others go on."""
    return {trial.user_attrs["continues"] for trial in trials if "continues" in trial.user_attrs}


def _claim(folder: Path, study: optuna.Study, section: Section):
    """(the next trial, the held lock that says who works on it), None when all are taken."""
    with filelock.FileLock(folder / ".optuna.lock"):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state is TrialState.RUNNING and _abandoned(folder, study, trial):
                if trial.number not in _replaced(trials):
                    attributes = {"continues": trial.number, "folder": _place(trial)}
                    study.enqueue_trial(trial.params, user_attrs=attributes)
                study.tell(trial.number, state=TrialState.FAIL)
                tell(f"Trial {trial.number}: abandoned, another one goes on with it")
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state is TrialState.WAITING for trial in trials)
        if not waiting and len(trials) - len(_replaced(trials)) >= section.trials:
            return None
        study.sampler = section.sampler(len(trials))
        trial = study.ask(section.space)
        trial.set_user_attr("folder", _place(trial))
        lock = _worker_lock(folder, trial)
        lock.acquire(timeout=0)
        return trial, lock


def _worker_lock(folder: Path, trial) -> filelock.FileLock:
    place = folder / _place(trial)
    place.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(place / ".worker")


def _abandoned(folder: Path, study: optuna.Study, trial) -> bool:
    """Whether a trial is told of as running, but nobody works on it."""
    lock = _worker_lock(folder, trial)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    try:  # it may have been told of between the look at its state and the one at its lock
        now = study.get_trials(deepcopy=False)[trial.number]
        return now.state is TrialState.RUNNING
    finally:
        lock.release()


def _name(trial) -> str:
    """The values of a trial, with few enough digits for people."""
    short = {k: float(f"{v:.4g}") if type(v) is float else v for k, v in trial.params.items()}
    return plan.setting_name(short, list(short))


def _jobs(manifest: dict, trial) -> list[dict]:
    """The runs of a trial, one a seed, as a manifest has them."""
    seeds = manifest["seeds"]
    return [
        {
            "setting": trial.number,
            "seed": seed,
            "overrides": trial.params | {"seed": seed},
            "folder": _place(trial) + f"/seed_{seed}" * (len(seeds) > 1),
        }
        for seed in seeds
    ]


def _work(folder: Path, manifest: dict, study, trial, poll: float) -> None:
    """Run a trial and tell the study how it went."""
    tell(f"Trial {trial.number}: {_name(trial)}")
    values = []
    try:
        for number, job in enumerate(_jobs(manifest, trial)):
            judge = trial if number == 0 else None
            values.append(_run_job(folder, job, judge, poll))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        tell(f"Trial {trial.number}: pruned")
    except launch.Failed as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        tell(f"Trial {trial.number}: failed, {error}")
    else:
        value = math.fsum(values) / len(values)
        study.tell(trial, value)
        tell(f"Trial {trial.number}: validation accuracy {value:.4f}")


def _run_job(folder: Path, job: dict, judge, poll: float) -> float:
    """Run one seed of a trial, or go on with it; returns its value.

    judge: the trial, if the pruner is to judge it. Raises `launch.Failed`, or `TrialPruned` with
    the child stopped.
    """
    place = folder / job["folder"]
    place.mkdir(exist_ok=True)
    started = plan.run_folder(folder, job)
    if started:
        with filelock.FileLock(started / ".lock"):  # a child can outlive the worker it was of
            pass
    told: set[int] = set()
    with open(place / "output.log", "ab") as output:
        start = output.tell()
        command = launch.Attempt(folder, job).command()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        over = False
        while not over:
            over = _ended(child, poll)
            run = plan.run_folder(folder, job)
            history = _validation(run) if run else {}
            if judge:
                for epoch in sorted(set(history) - told):
                    judge.report(history[epoch], epoch)
                told |= set(history)
                if not over and judge.should_prune():
                    raise optuna.TrialPruned
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        raise launch.Failed(launch.last_error(place / "output.log", start, child.returncode))
    if not history or not math.isfinite(history[max(history)]):
        raise launch.Failed("no validation accuracy at the last epoch")
    return history[max(history)]


def _ended(child: subprocess.Popen, seconds: float) -> bool:
    """Whether the child ends within this time."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _validation(run: Path) -> dict[int, float]:
    """Validation accuracy by epoch, as far as a run has recorded it."""
    path = run / "training_history.csv"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    names = list(rows[0]) if rows else []
    column = f"val_{plan.selection_metric(names)}"
    return {int(row["epoch"]): float(row[column]) for row in rows if column in row}


STATES = {
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def table(folder: Path, study: optuna.Study | None = None) -> pd.DataFrame:
    """The trials of a sweep: trial, state, value, epoch (the last one told), keys, folder, error.

    Of an abandoned trial and the one that goes on with it only the latter is there.
    """
    study = study or _open(folder)
    trials = study.get_trials(deepcopy=False)
    abandoned = _replaced(trials)
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    rows = [
        {"trial": trial.number, "state": STATES[trial.state], "value": trial.value}
        | {"epoch": trial.last_step}
        | {key: trial.params.get(key) for key in keys}
        | {"folder": _place(trial), "error": trial.user_attrs.get("error")}
        for trial in trials
        if trial.number not in abandoned
    ]
    return pd.DataFrame(
        rows, columns=["trial", "state", "value", "epoch", *keys, "folder", "error"]
    )


def show_status(folder: Path) -> int:
    """Prints a line a trial; returns the exit code, 1 if any has failed."""
    study = _open(folder)
    names = {trial.number: _name(trial) for trial in study.get_trials(deepcopy=False)}
    trials = table(folder, study)
    for trial in trials.itertuples():
        value = f"{trial.value:.3f}" if pd.notna(trial.value) else ""
        epoch = f"{trial.epoch:.0f}" if pd.notna(trial.epoch) else ""
        lines = [f"{trial.trial:04d} {trial.state:7} {epoch:>6} {value:>5}  {names[trial.trial]}"]
        lines += [f"     {trial.error}"] * (trial.state == "failed")
        tell(*lines, stream="stdout")
    return int("failed" in set(trials.state))


def _tell_best(study: optuna.Study) -> None:
    done = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if done:
        best = study.best_trial
        tell(f"Best trial: {best.number}, validation accuracy {best.value:.4f}: {_name(best)}")
    else:
        tell("Best trial: none, as none was finished")


def with_trials(folder: Path, manifest: dict) -> tuple[dict, list[str]]:
    """(the manifest with the finished trials as settings and jobs, what became of all trials)."""
    study = _open(folder)
    done = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    keys = list(dict.fromkeys(key for trial in done for key in trial.params))
    settings = [
        {"setting": trial.number, "name": _name(trial), "overrides": trial.params} for trial in done
    ]
    jobs = [job for trial in done for job in _jobs(manifest, trial)]
    jobs = [{"job": number} | job for number, job in enumerate(jobs)]
    counts = table(folder, study).state.value_counts()
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    notes = [f"Trials: {told}; the finished ones are in the table."]
    return manifest | {"keys": keys, "settings": settings, "jobs": jobs}, notes


if __name__ == "__main__":
    sys.exit(exit_code(lambda: work(Path(sys.argv[1]))))
