"""Pictures as inputs: decoded when they are used, in parallel, ahead of use.

Threads do as well as processes here: PIL decodes and resizes without holding Python's lock, and
nothing is sent between processes.
"""

import copy
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD, LUMA, luminance, max_batch, scale_
from lab.system import cores
from lab.system.picture_files import BadPicture
from lab.system.progress import Progress

log = logging.getLogger(f"spurious.{__name__}")

AHEAD = 64  # pictures decoded ahead of use where the batches are smaller than that
MAX_THREADS = 16  # unless more are asked for: beyond, threads wait for each other
LINES_EVERY = 30  # seconds between progress lines without a terminal


class Source(Protocol):
    """Where pictures come from; used from several threads at once."""

    side: int  # of the decoded pictures
    augments: bool  # whether a generator given to `decode` makes a random crop

    def decode(self, i: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Picture i as a new array (3, side, side) uint8. Raises `BadPicture` if unreadable."""

    def identity(self) -> dict[str, Any]:
        """Plain data that change with the pictures."""


def threads(num_workers: int | None) -> int:
    """Threads for decoding: as many as asked for; None: one per available core."""
    if num_workers is not None:
        return max(1, num_workers)
    return min(MAX_THREADS, cores.available())


class Pictures:
    """Takes the place of a tensor of inputs (N, C, H, H): decodes the pictures that are indexed.

    `pictures[index]` for a slice or an index tensor is a float32 tensor (B, C, H, H) on `device`,
    C = 1 (luminance) if `grayscale` else 3 (RGB), H the source's `side`. Holds file positions only,
    so it can be pickled.

    source: where the pictures come from; rows: (N,) which of the source's pictures these are;
    scaling: None, values in [0, 1], "norm", every picture scaled to unit L2 norm, or "channels",
    ImageNet's mean subtracted and divided by its deviation; num_workers: threads that decode,
    None: one per available core.
    """

    def __init__(
        self, source: Source, rows, *, grayscale: bool = False, scaling: str | None = None,
        num_workers: int | None = None,
    ):  # fmt: skip
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)
        self.grayscale, self.scaling, self.num_workers = grayscale, scaling, num_workers
        self.seeds: np.ndarray | None = None  # (N, 2) of the random crops
        self.device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(
            (len(self), 1 if self.grayscale else 3, self.source.side, self.source.side)
        )

    @property
    def max_batch(self) -> int:
        """The largest batch for evaluation and analyses."""
        return max_batch(self.shape)

    def to(self, device) -> "Pictures":
        """The same pictures, with batches that land on `device`."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def subset(self, index) -> "Pictures":
        """The pictures at these indices; nothing is decoded."""
        chosen = copy.copy(self)
        index = _positions(index)
        chosen.rows = self.rows[index]
        chosen.seeds = None if self.seeds is None else self.seeds[index]
        return chosen

    def augmented(self, seed: int) -> "Pictures":
        """The same, each cropped and mirrored at random, if the source `augments`.

        What happens to picture i depends on (seed, i) only, not on batches or their order.
        """
        if not self.source.augments:
            return self
        changed = copy.copy(self)
        changed.seeds = np.stack([np.full(len(self), seed), np.arange(len(self))], axis=1)
        return changed

    def __getitem__(self, index) -> torch.Tensor:
        (batch,) = self.batches([index])
        return batch

    def decode_uint8(self, i: int) -> np.ndarray:
        """Picture i as a backbone takes it, (3, H, H) uint8; grey pictures: equal channels."""
        pixels = self.source.decode(self.rows[i])
        if self.grayscale:
            pixels[:] = np.tensordot(LUMA, pixels, 1).round()
        return pixels

    @property
    def identity(self) -> str:
        """A text that changes with what `decode_uint8` returns, for the keys of caches."""
        facts = self.source.identity() | {
            "rows_sha256": hashlib.sha256(self.rows.tobytes()).hexdigest(),
            "grayscale": self.grayscale,
            "side": self.source.side,
        }
        if self.seeds is not None:
            facts["seeds_sha256"] = hashlib.sha256(self.seeds.tobytes()).hexdigest()
        return json.dumps(facts, sort_keys=True)

    def batches(self, indices: Iterable) -> Iterator[torch.Tensor]:
        """Yields `self[index]` for every index, in order; the next one is decoded meanwhile.

        Raises `BadPicture` for the first unreadable picture in this order. Memory, beside the
        batches that the caller holds: as bytes, two of them or about `AHEAD` pictures.
        """
        return map(self._floats, self._pixels(indices))

    def _pixels(self, indices: Iterable) -> Iterator[torch.Tensor]:
        """The same batches as they are decoded: RGB, (B, 3, H, H) uint8, on the CPU."""
        everything, side = np.arange(len(self)), self.source.side
        coming = (everything[_positions(index)] for index in indices)
        pool = ThreadPoolExecutor(threads(self.num_workers))
        started: deque = deque()  # (pixels, tasks that fill them) of each batch
        try:
            while True:
                # Before waiting for a batch, start the following one.
                while len(started) < 2 or sum(len(tasks) for _, tasks in started) < AHEAD:
                    places = next(coming, None)
                    if places is None:
                        break
                    pixels = np.empty((len(places), 3, side, side), dtype=np.uint8)
                    tasks = [pool.submit(self._decode_into, *pair) for pair in zip(pixels, places)]
                    started.append((pixels, tasks))
                    del pixels, tasks
                if not started:
                    return
                for task in started[0][1]:
                    task.result()
                yield torch.from_numpy(started.popleft()[0])
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode_into(self, pixels: np.ndarray, i: int) -> None:
        crops = () if self.seeds is None else (np.random.default_rng(self.seeds[i]),)
        pixels[:] = self.source.decode(self.rows[i], *crops)

    def _floats(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.device)
        inputs = luminance(pixels) if self.grayscale else pixels / 255
        return scale_(inputs, self.scaling, IMAGENET_MEAN, IMAGENET_STD)


def _positions(index):
    """An index into tensors as one into arrays."""
    return index.cpu().numpy() if isinstance(index, torch.Tensor) else index


def unreadable(source: Source, rows, num_workers: int | None = None) -> dict[int, str]:
    """{row: reason} of those of these pictures that cannot be decoded; decodes all of them."""

    def problem(i):
        try:
            source.decode(i)
        except BadPicture as error:
            return str(error)
        return None

    line = "{text}: {done} of {total} pictures, {left:.0f} s left"
    found = {}
    with (
        ThreadPoolExecutor(threads(num_workers)) as pool,
        Progress(log, line, len(rows), unit=" pictures", every_seconds=LINES_EVERY) as progress,
    ):
        for done, (i, reason) in enumerate(zip(rows, pool.map(problem, rows)), 1):
            if reason:
                found[int(i)] = reason
            progress.show(done, "Checking pictures")
    return found
