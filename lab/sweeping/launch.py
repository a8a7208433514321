"""Running the jobs of a sweep through submitit, on this machine or a SLURM cluster; their states.

Every attempt at a job is an `Attempt`: it starts `main.py` as a child, passes signals on to it, and
tells in the job's `job.json` what came of it. A job is done if, and only if, its run says so.
"""

import contextlib
import csv
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from lab.config import loading, schema, strict_yaml
from lab.runs import folders
from lab.sweeping import plan
from lab.system import cores, files, memory
from lab.system.command import tell, whole_step
from lab.system.errors import UserError, printable

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "main.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
JOB_MEMORY = 2 * 2**30  # bytes that a job on this machine is given room for
POLL = 0.25  # seconds between looks at the jobs on this machine; submitit submits 5 a second
REFRESH = 2.0  # seconds between two pictures of the live table
LOCK_WAIT = 5.0  # seconds; whoever only looks whether a job runs has its lock for far less
MANY_TIMEOUTS = 1000  # a job that goes on from its checkpoint may use up its time that often
ENDLESS = 60 * 24 * 365  # minutes; jobs on this machine have no limit
SLURM_MINUTES = 60  # of a job, where nothing is said
LARGEST_ARRAY = 1000  # jobs; SLURM's own default for the largest index is 1000
WIDTH = 80
STATES = ("waiting", "running", "done", "failed", "missing")


class Failed(Exception):
    """An attempt at a job did not bring it to its end."""


class Attempt:
    """What submitit runs for one job: one go of `main.py`, from the start or from a checkpoint.

    folder: the sweep's; environment: variables for the child, None = without it.
    """

    def __init__(self, folder: Path, job: dict, environment: dict[str, str | None] | None = None):
        self.folder, self.job = Path(folder).absolute(), job
        self.environment = environment or {}
        self.cwd, self.program = Path.cwd(), PROGRAM

    def __call__(self) -> None:
        """Runs the job; raises `Failed` unless it is done then. The exit code is in `job.json`."""
        if plan.is_done(self.folder, self.job):
            return
        place = self.folder / self.job["folder"]
        with _locked(place, LOCK_WAIT) as lock:
            before = read_attempt(place)
            self.attempt = before.get("attempt", 0) + 1
            self._tell("running")
            self.arrived, self.child = [], None
            usual = {signum: signal.signal(signum, self._pass_on) for signum in SIGNALS}
            try:
                with open(place / "output.log", "ab") as output:
                    start = output.tell()
                    self.child = self._start(output, lock)
                    for signum in self.arrived:  # before there was a child
                        self.child.send_signal(signum)
                    code = self.child.wait()
            finally:
                self.child = None
                for signum, handler in usual.items():
                    signal.signal(signum, handler)
            if code == 0:
                self._tell("finished", code)
                return
            error = last_error(place / "output.log", start, code)
            state = "cancelled" if any(code in (128 + s, -s) for s in SIGNALS) else "failed"
            if signal.SIGUSR2 in self.arrived:
                state, error = "submitted", "pre-empted, goes on from its checkpoint"
            self._tell(state, code, error)
            try:
                for signum in dict.fromkeys(self.arrived):
                    if callable(usual[signum]):  # submitit's for SIGUSR2: back in line, and exit
                        usual[signum](signum, None)
            except Exception as problem:
                self._tell("failed", code, f"not put back in line: {problem}")
                raise
        raise Failed(error)

    def checkpoint(self):
        """What submitit puts back in line: the same again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def command(self) -> list[str]:
        """The command line: resumes where an earlier attempt has left a run."""
        run = plan.run_folder(self.folder, self.job)
        if run:
            arguments = ["--resume", str(run)]
        else:
            manifest = plan.read_manifest(self.folder)
            arguments = plan.arguments(self.folder / plan.BASE, manifest, self.job, self.folder)
        return [sys.executable, str(self.program), *arguments]

    def _start(self, output, lock: int) -> subprocess.Popen:
        """The child has a process group of its own, and the job's lock as long as it lives."""
        environment = dict(os.environ)
        for name, value in self.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        return subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=self.cwd,
            env=environment,
            process_group=0,
            pass_fds=[lock],
        )

    def _pass_on(self, signum, frame) -> None:
        self.arrived.append(signal.Signals(signum))
        if self.child:
            self.child.send_signal(signum)

    def _tell(self, state: str, code: int | None = None, error: str | None = None) -> None:
        write_attempt(self.folder / self.job["folder"], state, self.attempt, code, error)


def write_attempt(place: Path, state: str, attempt: int, code=None, error=None) -> None:
    """Write `job.json`: what is known of the last attempt.

    state: submitted, running, finished, failed or cancelled.
    """
    told = {"state": state, "returncode": code, "error": error, "attempt": attempt}
    files.write_text(place / "job.json", json.dumps(told, indent=1) + "\n")


def read_attempt(place: Path) -> dict:
    """What `job.json` says, {} before the first attempt."""
    try:
        return json.loads((place / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def last_error(log: Path, start: int, code: int) -> str:
    """The last line that tells why an attempt ended; its output begins at byte `start`."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    if "To resume:" in lines:  # advice, not a reason
        lines = lines[: lines.index("To resume:")]
    return printable(lines[-1]) if lines else f"exit code {code}"


@contextlib.contextmanager
def _locked(folder: Path, wait: float = 0.0):
    """The lock of a job or a sweep; yields its file descriptor, which a child may keep open.

    Raises `UserError` when another process has it.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + wait
        while not _take(handle):
            if time.monotonic() > end:
                raise UserError(f"{folder}: in use by another process; wait for it or stop it")
            time.sleep(0.05)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    """Takes a lock if nobody has it, or if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return True
        if not isinstance(error, BlockingIOError):
            raise
        return False
    return True


def in_use(folder: Path) -> bool:
    """Whether a process has the lock of this job or sweep."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _take(handle)
    finally:
        os.close(handle)


class State(NamedTuple):
    """How far a job is. state: one of `STATES`; error: the last one's, or why it is missing."""

    state: str
    epoch: int | None = None
    worst: float | None = None
    error: str | None = None


def states(folder: Path, manifest: dict) -> list[State]:
    """The state of every job, in the manifest's order. Raises `UserError`.

    Nothing is asked of SLURM's accounting, which need not be there: what `squeue` has is waiting or
    running, and of the rest the runs and `job.json` tell.
    """
    jobs = manifest["jobs"]
    done = [plan.is_done(folder, job) for job in jobs]
    ids = slurm_ids(folder)
    queue = squeue() if ids and not all(done) else {}
    served = in_use(folder)  # by a sweep.py on some machine that starts jobs
    return [
        _state(folder, job, over, queue.get(ids.get(str(job["job"]))), served)
        for job, over in zip(jobs, done)
    ]


def _state(folder: Path, job: dict, done: bool, queued: str | None, served: bool) -> State:
    place = folder / job["folder"]
    epoch, worst = progress(plan.run_folder(folder, job))
    if done:
        return State("done", epoch, worst)
    told = read_attempt(place)
    kind, error = told.get("state"), told.get("error")
    if in_use(place) or (queued == "RUNNING" and kind == "running"):
        return State("running", epoch, worst)
    if queued or (served and kind == "submitted"):
        return State("waiting", epoch, worst)
    if kind == "running":
        return State("failed", epoch, worst, "killed, it left no word")
    if kind in ("failed", "finished"):
        return State("failed", epoch, worst, error or "ended, but its run is not done")
    if kind == "cancelled":
        return State("missing", epoch, worst, error)
    return State("missing", epoch, worst, "not started" if epoch is None else "not gone on with")


def progress(run: Path | None) -> tuple[int | None, float | None]:
    """(last epoch, worst-group test accuracy then) in a run's tables, None before the first."""
    try:
        with open(run / "training_history.csv", "rb") as file:
            header = file.readline()
            start = file.tell()
            file.seek(max(start, file.seek(0, os.SEEK_END) - 8 * len(header)))
            lines = file.read().splitlines()
    except (TypeError, FileNotFoundError):
        return None, None
    if not lines:
        return None, None
    (row,) = csv.DictReader([header.decode(), lines[-1].decode()])
    return int(row["epoch"]), float(row["test_worst_acc"])


def run(folder: Path, cluster: str, options: dict) -> int:
    """Runs what is missing or failed in a sweep folder; returns the exit code.

    options: at_once (jobs at once on this machine, None = by cores and memory), slurm (parameters).
    """
    manifest = plan.read_manifest(folder)
    before = states(folder, manifest)
    todo = [job for job, state in zip(manifest["jobs"], before) if state.state in STATES[3:]]
    busy = sum(state.state in STATES[:2] for state in before)
    if busy:
        tell(f"{busy} job(s) are waiting or running already: left alone")
    if not todo:
        tell(f"{folder}: nothing to do", stream="stdout")
    elif cluster == "debug":
        for job in todo:
            tell(shlex.join(Attempt(folder, job).command()), stream="stdout")
        return 0
    else:
        {"local": run_local, "slurm": run_slurm}[cluster](folder, manifest, todo, options)
        if cluster == "slurm":
            tell(
                f"{len(todo)} job(s) submitted; python sweep.py --status {shlex.quote(str(folder))}"
            )
    after = states(folder, manifest)
    tell(counts(after), f"Results: {folder}", stream="stdout")
    return exit_code(after)


def exit_code(found: list[State]) -> int:
    """1 if a job has failed or is missing, else 0."""
    return int(any(state.state in STATES[3:] for state in found))


def counts(found: list[State]) -> str:
    """How many jobs are in which state, in one line."""
    numbers = Counter(state.state for state in found)
    shown = [f"{numbers[state]} {state}" for state in STATES if numbers[state]]
    return f"{len(found)} jobs: {', '.join(shown)}"


def run_local(folder: Path, manifest: dict, jobs: list[dict], options: dict) -> None:
    """Runs jobs on this machine, a fixed number at once, until all have ended.

    When stopped, it stops the jobs with their checkpoints. A job that fails never stops others.
    """
    import submitit

    gpus = visible_gpus()
    slots = options["at_once"] or at_once(len(gpus))
    threads = max(1, cores.available() // slots)
    variables = thread_variables(threads)
    names = {entry["setting"]: entry["name"] for entry in manifest["settings"]}
    free, running, waiting = deque(range(slots)), {}, deque(jobs)
    tell(f"{len(jobs)} job(s), {min(slots, len(jobs))} at once, each with {threads} thread(s)")
    with _locked(folder):
        executor = submitit.LocalExecutor(_logs(folder), max_num_timeout=MANY_TIMEOUTS)
        executor.update_parameters(timeout_min=ENDLESS)
        for job in jobs:
            place = folder / job["folder"]
            write_attempt(place, "submitted", read_attempt(place).get("attempt", 0))
        try:
            while waiting or running:
                if waiting and free:
                    slot, job = free.popleft(), waiting.popleft()
                    attempt = Attempt(folder, job, variables | gpu_variable(gpus, slot))
                    with whole_step(), _deaf(), _findable():
                        running[slot] = job, executor.submit(attempt)
                for slot, (job, submitted) in list(running.items()):
                    if submitted.done():
                        del running[slot]
                        free.append(slot)
                        _tell_end(folder, job, names)
                time.sleep(POLL)
        except BaseException as error:
            _stop([submitted for _, submitted in running.values()])
            _add_advice(error, folder)
            raise


def _logs(folder: Path) -> Path:
    """A new folder for submitit: it goes by process ids, and the old files may have the same."""
    return folders.new_folder(folder / "submitit")


def _add_advice(error: BaseException, folder: Path) -> None:
    error.add_note("To resume:")
    error.add_note(f"python sweep.py --resume {shlex.quote(str(folder))}")


def _tell_end(folder: Path, job: dict, names: dict) -> None:
    told = read_attempt(folder / job["folder"])
    _, worst = progress(plan.run_folder(folder, job))
    if plan.is_done(folder, job):
        shown = f"done, worst group {worst:.3f}" if worst is not None else "done"
    else:
        shown = f"{told.get('state', 'failed')}: {told.get('error')}"
    tell(f"{job['job']:04d} {names[job['setting']]}, seed {job['seed']}: {shown}")


def _stop(submitted: list) -> None:
    """Asks jobs on this machine to stop, and waits until they have.

    Told again and again: whoever is just starting does not listen yet.
    """
    running = [job for job in submitted if not job.done()]
    if running:
        tell(f"Stopping {len(running)} job(s), which write their checkpoints")
    while running:
        for job in running:
            os.kill(int(job.job_id), signal.SIGTERM)  # the local executor's ids are process ids
        time.sleep(1)
        running = [job for job in running if not job.done()]


@contextlib.contextmanager
def _deaf():
    """Processes started inside ignore Ctrl-C and the end of the terminal: the sweep stops them."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _findable():
    """Processes started inside find this package, wherever they are started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before


def thread_variables(threads: int) -> dict[str, str | None]:
    """Variables that give a job its share of the cores; what the user has set stays."""
    shared = {name: str(threads) for name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT")}
    return {name: value for name, value in shared.items() if name not in os.environ}


def gpu_variable(gpus: list[str], slot: int) -> dict[str, str | None]:
    """What CUDA shows a job; submitit's local executor by itself would hide all GPUs."""
    usual = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)] if gpus else usual}


def at_once(gpus: int) -> int:
    """Jobs at once on this machine: one a GPU, or else one a core with 2 GiB of memory for each."""
    usable = cores.available()
    free = memory.available() or JOB_MEMORY * usable
    return gpus or max(1, min(usable, int(free // JOB_MEMORY)))


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name of the GPUs that this process may use."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for name in told.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def run_slurm(folder: Path, manifest: dict, jobs: list[dict], options: dict) -> None:
    """Submits jobs as arrays, and returns. Raises `UserError` if SLURM takes them not."""
    import submitit

    given = options["slurm"]
    parameters = {plan.SLURM[name][2]: value for name, value in given.items()}
    cpus = given.get("cpus", 1)
    # Since SLURM 22.05 srun does not take this over from the batch job.
    parameters |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"], "cpus_per_task": cpus}
    parameters.setdefault("timeout_min", SLURM_MINUTES)
    with _locked(folder), _findable():
        executor = submitit.AutoExecutor(
            _logs(folder), cluster="slurm", slurm_max_num_timeout=MANY_TIMEOUTS
        )
        executor.update_parameters(name=manifest["name"], **parameters)
        for start in range(0, len(jobs), LARGEST_ARRAY):
            part = jobs[start : start + LARGEST_ARRAY]
            for job in part:
                place = folder / job["folder"]
                write_attempt(place, "submitted", read_attempt(place).get("attempt", 0))
            try:
                with whole_step(), executor.batch():
                    submitted = [
                        executor.submit(Attempt(folder, job, thread_variables(cpus)))
                        for job in part
                    ]
            except submitit.core.utils.FailedJobError as failure:
                error = UserError(*str(failure).splitlines())
                _add_advice(error, folder)
                raise error from None
            ids = slurm_ids(folder)
            ids |= {str(job["job"]): one.job_id for job, one in zip(part, submitted)}
            files.write_text(folder / "slurm.json", json.dumps(ids) + "\n")


def slurm_ids(folder: Path) -> dict[str, str]:
    """SLURM's name of the newest submission of each job, {} where there is none."""
    try:
        return json.loads((folder / "slurm.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def squeue() -> dict[str, str]:
    """{SLURM's name of a job: state} of the user's jobs that wait or run. Raises `UserError`."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue: cannot tell which jobs run, {error}") from None
    if done.returncode:
        raise UserError(f"squeue: cannot tell which jobs run, {done.stderr.strip()}")
    return dict(line.split() for line in done.stdout.splitlines())


def show_status(folder: Path) -> int:
    """Prints the table of the jobs, again and again on a terminal; returns the exit code."""
    live = sys.stdout.isatty()
    while True:
        manifest = plan.read_manifest(folder)
        found = states(folder, manifest)
        over = not any(state.state in STATES[:2] for state in found)
        rows = shutil.get_terminal_size().lines - 1 if live and not over else None
        lines = table(folder, manifest, found, rows)
        clear = "\x1b[H\x1b[2J" if live else ""
        tell(clear + "\n".join(lines), stream="stdout")
        if over or not live:
            return exit_code(found)
        time.sleep(REFRESH)


def table(folder: Path, manifest: dict, found: list[State], rows: int | None = None) -> list[str]:
    """Lines of the table, 80 columns wide; what failed or runs comes first if rows are few."""
    base = strict_yaml.read(folder / plan.BASE)
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
