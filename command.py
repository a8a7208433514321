"""What the commands share: arguments, exit codes, signals, the log on the console.

Exit codes: 0 done; 2 what the user can fix, one line a problem on standard error; 1 anything else
(a traceback: a fault of ours); 130 or 143 interrupted.
"""

import argparse
import logging
import signal
import sys
import threading
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from errors import ConfigError, UserError


class Parser(argparse.ArgumentParser):
    """Errors of the command line are errors of the user, told like all others."""

    def error(self, message):
        raise ConfigError(f"command line: {message}; see {self.prog} --help")

    def add_config_arguments(self) -> None:
        """`--config FILE` and overrides `key=value`."""
        self.add_argument(
            "--config",
            default="config.yaml",
            metavar="FILE",
            help="settings (default: config.yaml)",
        )
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="settings that replace the file's",
        )


def exit_code(command) -> int:
    """Runs a command; what the user can fix and interruptions become lines and exit codes."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode gets escapes instead of a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Terminated:
        print("Terminated.", file=sys.stderr)
        return 143
    return 0


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def termination_as_exception():
    """SIGTERM unwinds like Ctrl-C, so that tables and trackers are closed."""

    def terminate(signum, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Console(logging.Handler):
    """Standard error; above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def console_log():
    """Log lines on standard error; yields a handler that keeps the lines for `run.log`."""
    root = logging.getLogger("spurious")
    console, memory = _Console(), MemoryHandler(10_000, logging.CRITICAL + 1)
    console.setLevel(logging.INFO)
    root.setLevel(logging.DEBUG)
    root.propagate = False
    root.addHandler(console)
    root.addHandler(memory)
    try:
        yield memory
    finally:
        root.removeHandler(console)
        root.removeHandler(memory)
