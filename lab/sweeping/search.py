"""Search of settings with optuna: workers on one or several machines pull trials from a journal.

The section `optuna` of a sweep file names the search space, the number of trials, sampler and
pruner. A trial runs `main.py` as a child; its value is the validation accuracy at the last epoch
(`worst_acc`; `minority_acc` of more than four groups), the mean over the sweep's seeds. The
accuracies of every epoch of the first seed are what the pruner sees: a trial that survives its
first seed runs the others.

The study lives in `optuna_journal.log` in the sweep folder. Who has locked `jobs/<trial>/.worker`
is at work on the trial. Such locks end with their process, so a running trial without one was
abandoned: it is reported to optuna as failed, and another trial with its values resumes its runs.
(optuna's own heartbeat does not exist for journals.) The file system has to have locks that all
machines see.
"""

import csv
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import filelock
import optuna
from optuna.trial import TrialState

from lab.evaluation import selection
from lab.sweeping import attempts, journal, manifests, resources
from lab.sweeping.space import Section, check_manifest
from lab.system import cores, files
from lab.system.command import exit_code, print_lines

WORKER = [sys.executable, "-m", "lab.sweeping.search"]
POLL = 1.0  # seconds between looks at what a child has recorded


def run(folder: Path, manifest: dict, at_once: int | None) -> int:
    """Search with workers on this machine until all trials are taken; returns the exit code.

    at_once: workers, None = by cores and memory. More of them may work on the same folder from
    other machines. Raises `ConfigError`, before anything starts.
    """
    section = check_manifest(folder, manifest)
    gpus = resources.visible_gpus()
    slots = min(at_once or resources.at_once(len(gpus)), section.trials)
    threads = resources.thread_variables(max(1, cores.available() // slots))
    command = [*WORKER, str(folder)]
    path = os.pathsep.join(filter(None, [str(attempts.ROOT), os.environ.get("PYTHONPATH")]))
    workers = []
    try:
        for slot in range(slots):
            own = threads | resources.gpu_variable(gpus, slot) | {"PYTHONPATH": path}
            environment = os.environ | {name: text for name, text in own.items() if text}
            workers.append(subprocess.Popen(command, env=environment))
        codes = [worker.wait() for worker in workers]
    except BaseException as error:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        manifests.add_advice(error, folder)
        raise
    trials = journal.table(folder)
    counts = trials.state.value_counts()
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_lines(f"{len(trials)} trials: {shown}", f"Results: {folder}", stream="stdout")
    return int(any(codes) or "failed" in counts)


def work(folder: Path, poll: float = POLL) -> None:
    """Take trials of a sweep's study, one after the other, until all are taken.

    Any number of workers may do so at once, on any machine that has the folder. A failed trial
    counts and does not stop the search. Each worker, at its end, writes `trials.csv` and reports
    the best trial.
    """
    folder = Path(folder)
    manifest = manifests.read_manifest(folder)
    section = check_manifest(folder, manifest)
    study = journal.open_study(folder, section)
    try:
        while claimed := _claim(folder, study, section):
            trial, lock = claimed
            try:
                _work(folder, manifest, study, trial, poll)
            finally:
                lock.release()
    finally:
        text = journal.table(folder, study).to_csv(index=False, na_rep="nan", lineterminator="\n")
        files.write_text(folder / "trials.csv", text)
    _report_best(study)


def _claim(folder: Path, study: optuna.Study, section: Section):
    """(the next trial, the held lock that says who works on it), None when all are taken."""
    with filelock.FileLock(folder / ".optuna.lock"):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state is TrialState.RUNNING and _abandoned(folder, study, trial):
                if trial.number not in journal.replaced(trials):
                    attributes = {"continues": trial.number, "folder": journal.place(trial)}
                    study.enqueue_trial(trial.params, user_attrs=attributes)
                study.tell(trial.number, state=TrialState.FAIL)
                print_lines(f"Trial {trial.number}: abandoned, another one continues it")
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state is TrialState.WAITING for trial in trials)
        if not waiting and len(trials) - len(journal.replaced(trials)) >= section.trials:
            return None
        study.sampler = section.sampler(len(trials))
        claimed = study.ask(section.space)
        claimed.set_user_attr("folder", journal.place(claimed))
        lock = _worker_lock(folder, claimed)
        lock.acquire(timeout=0)
        return claimed, lock


def _worker_lock(folder: Path, trial) -> filelock.FileLock:
    place = folder / journal.place(trial)
    place.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(place / ".worker")


def _abandoned(folder: Path, study: optuna.Study, trial) -> bool:
    """Whether a trial is recorded as running, but no process works on it."""
    lock = _worker_lock(folder, trial)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    try:  # its end may have been recorded after its state was read and before its lock was free
        now = study.get_trials(deepcopy=False)[trial.number]
        return now.state is TrialState.RUNNING
    finally:
        lock.release()


def _work(folder: Path, manifest: dict, study, trial, poll: float) -> None:
    """Run a trial and report its result to the study."""
    print_lines(f"Trial {trial.number}: {journal.name(trial)}")
    values = []
    try:
        for number, job in enumerate(journal.seed_jobs(manifest, trial)):
            judge = trial if number == 0 else None
            values.append(_run_job(folder, job, judge, poll))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        print_lines(f"Trial {trial.number}: pruned")
    except attempts.Failed as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        print_lines(f"Trial {trial.number}: failed, {error}")
    else:
        value = math.fsum(values) / len(values)
        study.tell(trial, value)
        print_lines(f"Trial {trial.number}: validation accuracy {value:.4f}")


def _run_job(folder: Path, job: dict, judge, poll: float) -> float:
    """Run one seed of a trial, or resume it; returns its value.

    judge: the trial, if the pruner is to judge it. Raises `attempts.Failed`, or `TrialPruned` with
    the child stopped.
    """
    place = folder / job["folder"]
    place.mkdir(exist_ok=True)
    started = manifests.run_folder(folder, job)
    if started:
        with filelock.FileLock(started / ".lock"):  # a child can outlive its worker
            pass
    reported: set[int] = set()
    with open(place / "output.log", "ab") as output:
        start = output.tell()
        command = attempts.Attempt(folder, job).command()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        over = False
        while not over:
            over = _ended(child, poll)
            run = manifests.run_folder(folder, job)
            history = _validation(run) if run else {}
            if judge:
                for epoch in sorted(set(history) - reported):
                    judge.report(history[epoch], epoch)
                reported |= set(history)
                if not over and judge.should_prune():
                    raise optuna.TrialPruned
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        raise attempts.Failed(attempts.last_error(place / "output.log", start, child.returncode))
    if not history or not math.isfinite(history[max(history)]):
        raise attempts.Failed("no validation accuracy at the last epoch")
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
    column = f"val_{selection.metric_between_runs(names)}"
    return {int(row["epoch"]): float(row[column]) for row in rows if column in row}


def _report_best(study: optuna.Study) -> None:
    done = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if done:
        best = study.best_trial
        print_lines(
            f"Best trial: {best.number}, validation accuracy {best.value:.4f}: {journal.name(best)}"
        )
    else:
        print_lines("Best trial: none, as none was finished")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: work(Path(sys.argv[1]))))
