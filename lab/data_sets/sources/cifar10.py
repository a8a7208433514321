"""CIFAR-10, 32×32 pictures of ten classes: the original by torchvision, or a folder of pictures.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import logging
import socket
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from joblib import Parallel, delayed

from lab.system import cores
from lab.system.errors import DataError
from lab.system.picture_files import Damaged, Folder, decode, raise_problems

log = logging.getLogger(f"spurious.{__name__}")

SIDE = 32
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PER_CLASS = {"train": 5000, "test": 1000}
BATCHES, ARCHIVE, FOLDER = "cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10"
PAGE = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SUFFIXES = (".jpg", ".jpeg", ".png")
CHUNK = 1000  # pictures that a process decodes at a time
TIMEOUT = 10  # seconds without an answer, after which the network counts as missing


class Images(NamedTuple):
    """Pictures (N, 3, 32, 32) uint8 and labels (N,) uint8 of a part of CIFAR-10."""

    images: np.ndarray
    labels: np.ndarray


def load(data_dir, classes=CLASSES, workers: int | None = None) -> tuple[Images, Images, str]:
    """The training and the test part, only these classes, and where they came from.

    Takes the original if its batches or its archive are in `data_dir`, else the folder
    `cifar10/{train,test}/<class>/` of pictures if it exists, else downloads the original.
    workers: processes that decode pictures; None: one per available core. Raises `DataError` when
    the data are missing and cannot be fetched, or are damaged.
    """
    data_dir = Path(data_dir)
    original = any((data_dir / name).exists() for name in (BATCHES, ARCHIVE))
    if not original and (data_dir / FOLDER).is_dir():
        return _from_folder(data_dir / FOLDER, classes, workers)
    return _original(data_dir, classes)


def _original(data_dir: Path, classes) -> tuple[Images, Images, str]:
    """The original, through torchvision.

    The batches are pickles, which can run programs. torchvision compares the MD5 sum of every batch
    with its own list before it unpickles any, whether it has just fetched them or not.
    """
    from torchvision.datasets import CIFAR10  # heavy, and needed for this source only

    try:
        with _no_long_waits():
            parts = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        raise _unavailable(data_dir, CIFAR10, error) from None
    wanted = [CLASSES.index(name) for name in classes]
    found = []
    for part in parts:
        labels = np.array(part.targets, dtype=np.uint8)
        rows = np.flatnonzero(np.isin(labels, wanted))
        found.append(Images(part.data.transpose(0, 3, 1, 2)[rows], labels[rows]))
    train, test = found
    return train, test, f"the original, {data_dir / BATCHES}"


@contextmanager
def _no_long_waits():
    """Downloads time out inside: torchvision sets no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unavailable(data_dir: Path, original, error: Exception) -> DataError:
    """What is wrong with the original in `data_dir`, and what to do."""
    from torchvision.datasets.utils import check_integrity

    reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
    files = {f"{BATCHES}/{name}": md5 for name, md5 in original.train_list + original.test_list}
    files[f"{BATCHES}/{original.meta['filename']}"] = original.meta["md5"]
    files[ARCHIVE] = original.tgz_md5
    damaged = [
        name
        for name, md5 in files.items()
        if (data_dir / name).is_file() and not check_integrity(data_dir / name, md5)
    ]
    state, first = f"is not in {data_dir}", ""
    if damaged:
        state = f"is damaged in {data_dir} (wrong checksum: {', '.join(damaged)})"
    elif any((data_dir / name).exists() for name in files):
        state = f"is incomplete in {data_dir}"
    if (data_dir / BATCHES).exists():
        first = f"delete {data_dir / BATCHES}, and "  # torchvision does not always replace it
    return DataError(
        f"dataset_name: CIFAR-10 {state} and cannot be downloaded ({reason}); {first}put {PAGE} "
        f"there, as {data_dir / ARCHIVE}, it need not be unpacked; or, without {BATCHES} and "
        f"{ARCHIVE}, JPEG or PNG pictures of {SIDE}×{SIDE} pixels as "
        f"{data_dir / FOLDER}/train/<class>/* and {data_dir / FOLDER}/test/<class>/*"
    )


def _from_folder(folder: Path, classes, workers: int | None) -> tuple[Images, Images, str]:
    """Pictures of each class in the order of their names."""
    names: dict[str, list[str]] = {}
    labels: dict[str, list[int]] = {}
    missing, other = [], []
    for part, expected in PER_CLASS.items():
        names[part], labels[part] = [], []
        for name in classes:
            inside = folder / part / name
            found = sorted(_pictures(inside))
            if not found:
                missing.append(f"{inside}: no pictures ({', '.join(SUFFIXES)}) of CIFAR-10")
            elif len(found) != expected:
                other.append(f"{inside} has {len(found)} pictures instead of {expected}")
            names[part] += [f"{part}/{name}/{file}" for file in found]
            labels[part] += [CLASSES.index(name)] * len(found)
    raise_problems(missing)
    if other:
        more = f" (and {len(other) - 1} more folders)" if len(other) > 1 else ""
        log.warning("%s%s", other[0], more)
    together = [*names["train"], *names["test"]]
    log.info("Decoding %d pictures in %s", len(together), folder)
    images = _decoded(folder, together, workers)
    middle = len(names["train"])
    train = Images(images[:middle], np.array(labels["train"], dtype=np.uint8))
    test = Images(images[middle:], np.array(labels["test"], dtype=np.uint8))
    return train, test, f"pictures in {folder}, {len(together)} of them"


def _pictures(folder: Path) -> list[str]:
    """Names of the picture files in a folder; none of a missing one."""
    return [
        file.name
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]


def _decoded(folder: Path, names: list[str], workers: int | None) -> np.ndarray:
    """The pictures (N, 3, 32, 32) uint8 with these names.

    In processes: decoding such small pictures takes mostly Python's lock, so threads do not help.
    """
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    workers = min(cores.available() if workers is None else max(1, workers), len(chunks))
    images, problems = np.empty((len(names), 3, SIDE, SIDE), dtype=np.uint8), []
    results = Parallel(n_jobs=workers, return_as="generator")(
        delayed(_decode_chunk)(folder, chunk) for chunk in chunks
    )
    for number, (pixels, reasons) in enumerate(results):
        images[number * CHUNK :][: len(pixels)] = pixels
        problems += reasons
    raise_problems(problems)
    return images


def _decode_chunk(folder: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The pictures, and a line for each that is not readable."""
    storage, problems = Folder(folder), []
    pixels = np.zeros((len(names), 3, SIDE, SIDE), dtype=np.uint8)
    for i, name in enumerate(names):
        try:
            pixels[i] = decode(storage.read(name), side=None, exact=(SIDE, SIDE))
        except Damaged as error:
            problems.append(f"{folder / name}: {error}")
        except DataError as error:
            problems += error.problems
    return pixels, problems
