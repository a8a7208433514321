"""An attempt at a job: it starts `main.py` as a child, passes signals on to it, and records in the
job's `job.json` how it ended. A job is done if, and only if, its run says so.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from lab.sweeping import locks, manifests
from lab.system import files
from lab.system.errors import printable

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "main.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
MANY_TIMEOUTS = 1000  # a job that resumes from its checkpoint may use up its time that often
LOCK_WAIT = 5.0  # seconds; whoever only looks whether a job runs has its lock for far less


class Failed(Exception):
    """An attempt at a job did not bring it to its end."""


class Attempt:
    """What submitit runs for one job: one call of `main.py`, from the start or from a checkpoint.

    folder: the sweep's; environment: variables for the child, None = without it.
    """

    def __init__(self, folder: Path, job: dict, environment: dict[str, str | None] | None = None):
        self.folder, self.job = Path(folder).absolute(), job
        self.environment = environment or {}
        self.cwd, self.program = Path.cwd(), PROGRAM

    def __call__(self) -> None:
        """Runs the job; raises `Failed` unless it is done then. The exit code is in `job.json`."""
        if manifests.is_done(self.folder, self.job):
            return
        place = self.folder / self.job["folder"]
        with locks.locked(place, LOCK_WAIT) as lock:
            before = read_attempt(place)
            self.attempt = before.get("attempt", 0) + 1
            self._record("running")
            # Not in __init__: a requeued attempt is a copy of this object.
            self.arrived: list[signal.Signals] = []
            self.child: subprocess.Popen | None = None
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
                self._record("finished", code)
                return
            error = last_error(place / "output.log", start, code)
            state = "cancelled" if any(code in (128 + s, -s) for s in SIGNALS) else "failed"
            if signal.SIGUSR2 in self.arrived:
                state, error = "submitted", "pre-empted, resumes from its checkpoint"
            self._record(state, code, error)
            try:
                for signum in dict.fromkeys(self.arrived):
                    usually = usual[signum]
                    if callable(usually):  # submitit's for SIGUSR2: requeue, and exit
                        usually(signum, None)
            except Exception as problem:
                self._record("failed", code, f"not requeued: {problem}")
                raise
        raise Failed(error)

    def checkpoint(self):
        """What submitit requeues: the same again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def command(self) -> list[str]:
        """The command line: resumes where an earlier attempt has left a run."""
        run = manifests.run_folder(self.folder, self.job)
        if run:
            arguments = ["--resume", str(run)]
        else:
            manifest = manifests.read_manifest(self.folder)
            arguments = manifests.arguments(
                self.folder / manifests.BASE, manifest, self.job, self.folder
            )
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

    def _record(self, state: str, code: int | None = None, error: str | None = None) -> None:
        write_attempt(self.folder / self.job["folder"], state, self.attempt, code, error)


def write_attempt(place: Path, state: str, attempt: int, code=None, error=None) -> None:
    """Write `job.json`: what is known of the last attempt.

    state: submitted, running, finished, failed or cancelled.
    """
    record = {"state": state, "returncode": code, "error": error, "attempt": attempt}
    files.write_text(place / "job.json", json.dumps(record, indent=1) + "\n")


def mark_submitted(place: Path) -> None:
    """Write in `job.json` that the job waits for its next attempt."""
    write_attempt(place, "submitted", read_attempt(place).get("attempt", 0))


def read_attempt(place: Path) -> dict:
    """What `job.json` says, {} before the first attempt."""
    try:
        return json.loads((place / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def last_error(log: Path, start: int, code: int) -> str:
    """Why an attempt ended: the last line of its output, which begins at byte `start`."""
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
def findable():
    """Processes started inside find this package, wherever they are started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before
