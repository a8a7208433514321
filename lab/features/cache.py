"""Files of features: written whole, checked when read, locked while made, listed, removed.

A file is `<data set>_<split>_<model>_<layer>_<hash>.safetensors` with one tensor `features`, its
SHA-256, and the key of which the name has the hash. While it is made, `<hash>.lock` and
`<same name>.parts/` with its finished shards exist beside it.
"""

import datetime
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import filelock
import safetensors
import torch

from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")

HASH_LENGTH = 16
WEIGHT_HASHES = "weights.json"
_HASH = rf"([0-9a-f]{{{HASH_LENGTH}}})"
FEATURES = re.compile(rf"[^.].*_{_HASH}\.safetensors")
# Shards, a file that was being written, and the lock itself.
LEFTOVERS = [
    re.compile(rf"[^.].*_{_HASH}\.parts"),
    re.compile(rf"\..*_{_HASH}-[^.]*\.safetensors"),
    re.compile(rf"{_HASH}\.lock"),
]


class Damaged(Exception):
    """A file of features is not what it should be."""


def write(path: Path, chunks, metadata: dict[str, str]) -> None:
    """Write tensors (n, d) float32 as the rows of one tensor in a safetensors file.

    chunks: a list, or a function that gives an iterator and is called twice: features larger than
    the memory are never held at once. The checksum is that of the tensor's bytes.
    """
    chunks = chunks if callable(chunks) else functools.partial(iter, chunks)
    digest, rows, width = hashlib.sha256(), 0, 0
    for chunk in chunks():
        digest.update(_bytes(chunk))
        rows, width = rows + len(chunk), chunk.shape[1]
    shape = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}
    header = {"__metadata__": metadata | {"sha256": digest.hexdigest()}, "features": shape}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with files.complete(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks():
            file.write(_bytes(chunk))


def _bytes(features: torch.Tensor) -> memoryview:
    return features.numpy().data.cast("B")


def read(
    path: Path, key: str | None = None, rows: int | None = None, verify: bool = True
) -> torch.Tensor:
    """Features (N, d) mapped from a cache file. Raises `Damaged`, `FileNotFoundError`.

    key: what the file must have been made from; rows: N; verify: compare the checksum.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
    except (safetensors.SafetensorError, RuntimeError, MemoryError) as error:  # for want of memory
        raise Damaged(str(error)) from None
    if key is not None and metadata.get("key") != key:
        raise Damaged("made from something else")
    wanted = features.dim() == 2 and features.numel() and rows in (None, len(features))
    if features.dtype != torch.float32 or not wanted:
        raise Damaged(f"{features.dtype} of shape {tuple(features.shape)}")
    if verify and hashlib.sha256(_bytes(features)).hexdigest() != metadata.get("sha256"):
        raise Damaged("the checksum differs")
    return features


@contextmanager
def locked(path: Path):
    """One process at a time; whoever waits says so. Needless where nobody can write."""
    if not os.access(path.parent, os.W_OK):
        yield
        return
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("Another run is making the same features; waiting for it (%s)", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def listing(folder: Path) -> list[str]:
    """Lines of the table of the files, oldest first, at most 80 characters wide."""
    row = "{:>8} {:10} {:12} {:6} {:17} {:22}"
    lines = [row.format("size", "date", "data set", "split", "model", "layer").rstrip()]
    total = 0
    kept = [path for path in folder.glob("*.safetensors") if FEATURES.fullmatch(path.name)]
    for path in sorted(kept, key=lambda path: (path.stat().st_mtime, path.name)):
        stat = path.stat()
        total += stat.st_size
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            shown = [metadata.get(name, "?") for name in ("dataset", "split", "model", "layer")]
        except safetensors.SafetensorError:
            shown = ["damaged", "", "", ""]
        shown = [
            text if len(text) <= width else text[: width - 1] + "…"
            for text, width in zip(shown, (12, 6, 17, 22))
        ]
        date = datetime.date.fromtimestamp(stat.st_mtime).isoformat()
        lines.append(row.format(_size(stat.st_size), date, *shown).rstrip())
    return [*lines, f"{_size(total):>8} in all, {len(kept)} files in {folder}"]


def prune(folder: Path, everything: bool = False) -> list[str]:
    """Remove damaged files and what interrupted runs left, or all that is the cache's.

    Returns a line for each thing removed, or left because a run is using it. Other files stay.
    """
    doomed = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        for pattern in LEFTOVERS:
            if found := pattern.fullmatch(path.name):
                doomed[found[1]].append((path, "left by a run"))
        if found := FEATURES.fullmatch(path.name):
            reason = "features" if everything else _damage(path)
            if reason:
                doomed[found[1]].append((path, reason))
    lines = []
    for digest, paths in doomed.items():
        lock = filelock.FileLock(folder / f"{digest}.lock")
        try:
            with lock.acquire(timeout=0):
                lines += [_remove(path, reason) for path, reason in paths]
                Path(lock.lock_file).unlink(missing_ok=True)
        except filelock.Timeout:
            lines += [f"in use, left: {path}" for path, _ in paths]
    hashes = folder / WEIGHT_HASHES
    if everything and hashes.exists():
        lines.append(_remove(hashes, "hashes of weights"))
    return lines


def _damage(path: Path) -> str | None:
    try:
        read(path)
    except Damaged as error:
        return f"damaged: {error}"
    return None


def _remove(path: Path, reason: str) -> str:
    """Removes a file or a folder of shards; returns what to say about it."""
    if path.is_dir():
        size = sum(inner.stat().st_size for inner in path.rglob("*"))
        shutil.rmtree(path)
    else:
        size = path.stat().st_size
        path.unlink()
    return f"removed ({reason}, {_size(size)}): {path}"


def _size(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"
