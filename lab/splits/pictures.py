"""Pictures as inputs: decoded when they are asked for, in parallel, ahead of use.

A source of pictures is any object with `decode(i, rng=None)` → a new array (3, side, side) uint8,
which raises `BadPicture` for what it cannot read and can be used from several threads, with `side`,
with `identity()` → plain data that change with the pictures, and with `augments`, whether a
generator given to `decode` makes a random crop of the picture. Threads do as well as processes
here: PIL decodes and resizes without holding Python's lock, and nothing is sent around.
"""

import copy
import hashlib
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from lab.system.picture_files import BadPicture

# As PIL and torchvision convert to grey: ITU-R 601-2 luma.
LUMA = (0.299, 0.587, 0.114)
# Mean and standard deviation of the channels over ImageNet's pictures in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_BYTES = 2**27  # of a batch in evaluation and analyses; larger ones are slower, too
AHEAD = 64  # pictures decoded ahead of use where the batches are smaller than that
MAX_THREADS = 16  # unless more are asked for: beyond, threads wait for each other


def threads(num_workers: int | None) -> int:
    """Threads for decoding: as many as asked for; null = one a core that this process may use."""
    if num_workers is not None:
        return max(1, num_workers)
    usable = getattr(os, "sched_getaffinity", None)
    return min(MAX_THREADS, len(usable(0)) if usable else os.cpu_count() or 1)


class Pictures:
    """Stands where a tensor of inputs (N, C, H, H) stands, and decodes what is asked for.

    `pictures[index]` for a slice or an index tensor is a float32 tensor (B, C, H, H) on `device`,
    C = 1 (luminance) if `grayscale` else 3 (RGB), H the source's `side`. Holds file positions only,
    so it can be pickled.

    source: where the pictures come from; rows: (N,) which of the source's pictures these are;
    scaling: None, values in [0, 1], "norm", every picture scaled to unit L2 norm, or "channels",
    ImageNet's mean subtracted and divided by its deviation; num_workers: threads that decode,
    null = one a core.
    """

    def __init__(self, source, rows, *, grayscale=False, scaling=None, num_workers=None):
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)
        self.grayscale, self.scaling, self.num_workers = grayscale, scaling, num_workers
        self.seeds: np.ndarray | None = None  # (N, 2) of the random crops
        self.device = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(
            (len(self), 1 if self.grayscale else 3, self.source.side, self.source.side)
        )

    @property
    def max_batch(self) -> int:
        """How many pictures `BATCH_BYTES` hold as float32."""
        return BATCH_BYTES // (4 * self.shape[1:].numel())

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
        """The same, each cropped and mirrored at random as its source does it, if it does.

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
        """Picture i as a backbone takes it, (3, H, H) uint8; grey ones have equal channels."""
        pixels = self.source.decode(self.rows[i])
        if self.grayscale:
            pixels[:] = np.tensordot(LUMA, pixels, 1).round()
        return pixels

    @property
    def identity(self) -> str:
        """Changes with what `decode_uint8` gives: for the keys of caches."""
        facts = self.source.identity() | {
            "rows_sha256": hashlib.sha256(self.rows.tobytes()).hexdigest(),
            "grayscale": self.grayscale,
            "side": self.source.side,
        }
        if self.seeds is not None:
            facts["seeds_sha256"] = hashlib.sha256(self.seeds.tobytes()).hexdigest()
        return json.dumps(facts, sort_keys=True)

    def batches(self, indices):
        """Yields `self[index]` for every index, in order; the next is decoded meanwhile.

        Raises `BadPicture` for the first unreadable picture in this order. Memory, beside the
        batches that the caller holds: as bytes, two of them or about `AHEAD` pictures.
        """
        return map(self._floats, self._pixels(indices))

    def _pixels(self, indices):
        """The same batches as they are decoded: RGB, (B, 3, H, H) uint8, on the CPU."""
        everything, side = np.arange(len(self)), self.source.side
        coming = (everything[_positions(index)] for index in indices)
        pool, started = ThreadPoolExecutor(threads(self.num_workers)), deque()
        try:
            while True:
                # Before waiting for a batch, have the following one on its way.
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
        if self.grayscale:
            inputs = sum(w / 255 * pixels[:, c : c + 1] for c, w in enumerate(LUMA))
        else:
            inputs = pixels / 255
        return scale_(inputs, self.scaling, IMAGENET_MEAN, IMAGENET_STD)


def _positions(index):
    """An index into tensors as one into arrays."""
    return index.cpu().numpy() if isinstance(index, torch.Tensor) else index


def scale_(pictures: torch.Tensor, scaling: str | None, mean, std) -> torch.Tensor:
    """Pictures (B, C, H, W), C 3 or 1 (luminance), scaled in place.

    scaling: None; "norm", to unit L2 norm; "channels", by the mean and deviation of the three
    channels, of luminance by their means.
    """
    if scaling == "norm":
        return unit_norm_(pictures)
    if scaling == "channels":
        mean, std = pictures.new_tensor(mean), pictures.new_tensor(std)
        if pictures.shape[1] == 1:
            weights = pictures.new_tensor(LUMA)
            mean, std = (mean @ weights).view(1), (std @ weights).view(1)
        pictures.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    return pictures


def unit_norm_(pictures: torch.Tensor) -> torch.Tensor:
    """Scales every picture of (B, C, H, W) to unit L2 norm, in place."""
    # In two stages: one float32 sum over 150,528 squares is wrong in the fourth digit.
    norms = pictures.norm(dim=3).flatten(1).norm(dim=1)
    # An all-zero picture has no direction; it stays zero.
    pictures /= norms.clamp_min(torch.finfo(pictures.dtype).tiny).view(-1, 1, 1, 1)
    return pictures


def unreadable(source, rows, num_workers: int | None = None) -> dict[int, str]:
    """{row: why} for those of these pictures that cannot be decoded; decodes all of them."""

    def problem(i):
        try:
            source.decode(i)
        except BadPicture as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads(num_workers)) as pool:
        reasons = tqdm(
            pool.map(problem, rows),
            total=len(rows),
            desc="checking pictures",
            disable=not sys.stderr.isatty(),
        )
        return {int(i): reason for i, reason in zip(rows, reasons) if reason}
