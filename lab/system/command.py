"""What the commands share: arguments, exit codes, signals, the log on the console.

Exit codes: 0 done; 2 something that the user can fix, one line per problem on standard error;
1 anything else (a traceback: a fault of ours); 128 + the signal's number if stopped by one (130
Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1 and 140 SIGUSR2, by which clusters announce
pre-emption).
"""

import argparse
import io
import logging
import signal
import sys
import threading
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from typing import NoReturn

from lab.system import files
from lab.system.errors import ConfigError, UserError

STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)
]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are reported like all errors of the user."""

    def error(self, message):
        raise ConfigError(f"command line: {message}; see {self.prog} --help")

    def add_config_arguments(self) -> None:
        """`--config FILE` (None if not given) and overrides `key=value`."""
        self.add_argument(
            "--config", metavar="FILE", help=f"settings (default: {DEFAULT_CONFIG_FILE})"
        )
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="settings that replace the file's",
        )


def folder_name(text: str) -> str:
    """The type of an argument that names a folder: not empty, as an unset shell variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("given an empty name; allowed: a folder")
    return text


DEFAULT_CONFIG_FILE = "config.yaml"


def exit_code(command) -> int:
    """The exit code of running a command; user errors and signals are printed as plain lines.

    Notes on an error (`add_note`) are the last lines: what to do next.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode gets escapes instead of a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with stop_signals():
        try:
            command()
        except UserError as error:
            print_lines(*error.problems, *_notes(error))
            return 2
        except Exception as error:
            if isinstance(error, OSError) and error.errno in files.REFUSALS and error.filename:
                # Permissions, a full or read-only disk: not a fault of the program.
                print_lines(f"{error.filename}: {error.strerror}", *_notes(error))
                return 2
            # A signal to the process group also ends worker processes, whose error comes first.
            if _signals.arrived is None:
                raise
            return _stopped(_signals.arrived, error)
        except (Stopped, KeyboardInterrupt) as error:
            return _stopped(getattr(error, "signum", signal.SIGINT), error)
    return 0


def _stopped(signum: int, error) -> int:
    print_lines(f"Stopped by {signal.Signals(signum).name}.", *_notes(error))
    return 128 + signum


def _notes(error) -> list[str]:
    return getattr(error, "__notes__", [])


def print_lines(*lines: str, stream: str = "stderr") -> None:
    """Print lines; once nobody reads them any more (`| head`), continue without printing."""
    try:
        for line in lines:
            print(line, file=getattr(sys, stream), flush=True)
    except OSError:
        # Otherwise Python would fail on the same lines when it exits.
        setattr(sys, stream, _Nobody())


class _Nobody(io.TextIOBase):
    """A stream without a reader."""

    def write(self, text: str) -> int:
        return len(text)


class Stopped(BaseException):
    """A signal asks the command to stop. torn: in the middle of a `whole_step`."""

    def __init__(self, signum: int, torn: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.torn = signum, torn


class _Signals:
    """Which signal arrived, and whether the running code may be interrupted."""

    def __init__(self):
        self.arrived: int | None = None
        self.raised = False
        self.depth = 0

    def handle(self, signum, frame) -> None:
        again = self.arrived is not None and signum == signal.SIGINT
        self.arrived = self.arrived or signum
        if self.raised:  # clusters repeat signals; the clean-up must not be interrupted
            return
        if self.depth == 0 or again:
            self.throw(torn=self.depth > 0)
        if signum == signal.SIGINT:
            print_lines(
                "Stopping after this step; Ctrl-C once more stops at once and loses the step."
            )

    def throw(self, torn: bool = False) -> NoReturn:
        assert self.arrived is not None
        self.raised = True
        raise Stopped(self.arrived, torn)


_signals = _Signals()


@contextmanager
def stop_signals():
    """Signals that ask for a stop raise `Stopped`, once: now or at the end of `whole_step`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.__init__()
    before = {}
    for signum in STOPPING:
        if signum != getattr(signal, "SIGHUP", None) or signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, _signals.handle)  # nohup stays nohup
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def whole_step():
    """The block is completed before a signal stops the command."""
    _signals.depth += 1
    try:
        yield
    finally:
        _signals.depth -= 1
    if _signals.arrived is not None and _signals.depth == 0 and not _signals.raised:
        _signals.throw()


class _Console(logging.Handler):
    """Standard error, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self._text(record), file=sys.stderr)
        except OSError:
            print_lines(self._text(record))  # replaces the stream

    def _text(self, record: logging.LogRecord) -> str:
        text = self.format(record)
        return f"Warning: {text}" if record.levelno >= logging.WARNING else text


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
