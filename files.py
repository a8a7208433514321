"""Whole files that are either complete or not there."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete(path):
    """Yields a temporary path beside `path`; on success it is flushed and renamed to `path`.

    Whatever happens, a reader sees the old file or the new one, never half of one. The temporary
    name starts with a dot and keeps the suffix, by which many writers choose the format.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Write a whole text file in UTF-8."""
    with complete(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
