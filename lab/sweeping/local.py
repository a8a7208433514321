"""Running the jobs of a sweep on this machine."""

import contextlib
import os
import signal
import time
from collections import deque
from pathlib import Path

from lab.sweeping import attempts, locks, manifests, resources, states
from lab.system import cores
from lab.system.command import print_lines, whole_step

POLL = 0.25  # seconds between looks at the jobs on this machine; submitit submits 5 a second
ENDLESS = 60 * 24 * 365  # minutes; jobs on this machine have no limit


def run(folder: Path, manifest: dict, jobs: list[dict], options: dict) -> None:
    """Runs jobs on this machine, a fixed number at once, until all have ended.

    When stopped, it stops the jobs with their checkpoints. A job that fails never stops others.
    """
    import submitit

    gpus = resources.visible_gpus()
    slots = options["at_once"] or resources.at_once(len(gpus))
    threads = max(1, cores.available() // slots)
    variables = resources.thread_variables(threads)
    names = {entry["setting"]: entry["name"] for entry in manifest["settings"]}
    free, waiting = deque(range(slots)), deque(jobs)
    running: dict[int, tuple] = {}  # slot -> (job, what submitit knows of it)
    used = variables.get("OMP_NUM_THREADS") or os.environ["OMP_NUM_THREADS"]
    at_once = f"{min(slots, len(jobs))} at once, each with {used} thread(s)"
    print_lines(f"{len(jobs)} job(s), {at_once}")
    with locks.locked(folder):
        executor = submitit.LocalExecutor(
            manifests.submitit_folder(folder), max_num_timeout=attempts.MANY_TIMEOUTS
        )
        executor.update_parameters(timeout_min=ENDLESS)
        for job in jobs:
            attempts.mark_submitted(folder / job["folder"])
        try:
            while waiting or running:
                if waiting and free:
                    slot, job = free.popleft(), waiting.popleft()
                    attempt = attempts.Attempt(
                        folder, job, variables | resources.gpu_variable(gpus, slot)
                    )
                    with whole_step(), _ignoring_terminal(), attempts.findable():
                        running[slot] = job, executor.submit(attempt)
                for slot, (job, submitted) in list(running.items()):
                    if submitted.done():
                        del running[slot]
                        free.append(slot)
                        _report_end(folder, job, names)
                time.sleep(POLL)
        except BaseException as error:
            _stop([submitted for _, submitted in running.values()])
            manifests.add_advice(error, folder)
            raise


def _report_end(folder: Path, job: dict, names: dict) -> None:
    last = attempts.read_attempt(folder / job["folder"])
    _, worst = states.progress(manifests.run_folder(folder, job))
    if manifests.is_done(folder, job):
        shown = f"done, worst group {worst:.3f}" if worst is not None else "done"
    else:
        shown = f"{last.get('state', 'failed')}: {last.get('error')}"
    print_lines(f"{job['job']:04d} {names[job['setting']]}, seed {job['seed']}: {shown}")


def _stop(submitted: list) -> None:
    """Asks jobs on this machine to stop, and waits until they have.

    Asked again and again: a job that is just starting does not handle signals yet.
    """
    running = [job for job in submitted if not job.done()]
    if running:
        print_lines(f"Stopping {len(running)} job(s), which write their checkpoints")
    while running:
        for job in running:
            os.kill(int(job.job_id), signal.SIGTERM)  # the local executor's ids are process ids
        time.sleep(1)
        running = [job for job in running if not job.done()]


@contextlib.contextmanager
def _ignoring_terminal():
    """Processes started inside ignore Ctrl-C and the end of the terminal: the sweep stops them."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
