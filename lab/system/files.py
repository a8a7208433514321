"""Files that survive: they are written completely or not at all, or grow by complete records.

An error of the disk (full, read-only, no permission) becomes a `StorageError` that names the path
and the bytes needed; the previous file stays as it was.
"""

import csv
import errno
import io
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.system.errors import StorageError

# Errors of the disk, not of the program: everything else is a fault of ours, with a traceback.
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
}  # fmt: skip


@contextmanager
def complete(path, size: int | None = None):
    """Yields a temporary path beside `path`; on success it is flushed and renamed to `path`.

    A reader sees the old file or the new one, never a part of one. The temporary name starts with a
    dot and keeps the suffix, by which many writers choose the format. size: in bytes, if known.
    Raises `StorageError`.
    """
    path = Path(path)
    with _refusals(path, size):
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        try:
            yield Path(name)
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
            _sync_folder(path.parent)
        finally:
            Path(name).unlink(missing_ok=True)


def write(path, data: bytes) -> None:
    """Write a whole file. Raises `StorageError`."""
    with complete(path, len(data)) as temporary:
        file = os.open(temporary, os.O_WRONLY)
        try:
            _write_all(file, data)
        finally:
            os.close(file)


def write_text(path, text: str) -> None:
    """Write a whole text file in UTF-8."""
    write(path, text.encode())


def write_csv(path, rows: list[dict], columns=None) -> None:
    """Write a whole table: mappings with the same keys, which are its columns."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns or rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def save(path, writer) -> None:
    """Write the whole file that `writer(file)` writes into an open file, such as `torch.save`.

    The content is assembled in memory, so that a full disk raises our error, not the writer's.
    """
    buffer = io.BytesIO()
    writer(buffer)
    write(path, buffer.getvalue())


class Growing:
    """A file that grows by complete records: a record is appended completely or not at all."""

    def __init__(self, path):
        self.path = Path(path)
        with _refusals(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.size = os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Append a record, visible to readers at once. Raises `StorageError`."""
        try:
            with _refusals(self.path, len(data)):
                _write_all(self._file, data)
        except BaseException:  # an interruption must not leave half a record either
            os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)

    def sync(self) -> None:
        """Wait until everything is written to the disk."""
        with _refusals(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def remove_temporaries(folder) -> None:
    """Remove temporary files of `complete` that a killed process left in this folder."""
    for path in Path(folder).glob(".*-*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def cut_torn_line(path) -> None:
    """Remove what follows the last line break of a text file."""
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


@contextmanager
def _refusals(path, needed: int | None = None):
    """Errors of the disk inside become a `StorageError` about this path."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        room = f", {needed:,} bytes needed" if needed is not None else ""
        with suppress(OSError):
            room += f", {shutil.disk_usage(Path(path).parent).free:,} bytes free on the disk"
        raise StorageError(f"{path}: cannot be written, {error.strerror}{room}") from error


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder) -> None:
    """Make a rename survive a power failure, on systems where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
