"""The lock of a job or a sweep, which tells other processes that one works on it."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from lab.system.errors import UserError


@contextlib.contextmanager
def locked(folder: Path, wait: float = 0.0):
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
