"""Small splits, a run without a folder, and limits for hostile input."""

import dataclasses
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from lab.runs.silent import Silent
from lab.splits.splits import Split, Splits


@contextmanager
def limited(seconds=2, memory=500 * 2**20):
    """Fails what takes more processor time, or more bytes in addition to the present ones."""

    def too_slow(*_):
        raise AssertionError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (allowed, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)


def make_split(counts, shape=(7,), dtype=torch.float64, seed=0):
    """A split of random inputs with these group counts, stored group by group."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), v, dtype=dtype) for n, v in zip(counts, (-1, -1, 1, 1))])
    a = torch.cat([torch.full((n,), v, dtype=dtype) for n, v in zip(counts, (-1, 1, -1, 1))])
    inputs = torch.randn(sum(counts), *shape, generator=generator, dtype=dtype)
    # Something to learn from both: a group mean in the first two coordinates.
    flat = inputs.flatten(1)
    flat[:, 0] += 0.5 * y
    flat[:, 1] += a
    return Split(inputs / flat.norm(dim=1).view(-1, *[1] * len(shape)), y, a, list(counts))


def make_splits(train=(12, 5, 4, 9), test=(6, 5, 7, 3), **options):
    """Random training and test splits."""
    names = ["y < 0, a < 0", "y < 0, a > 0", "y > 0, a < 0", "y > 0, a > 0"]
    options.setdefault("seed", 0)
    seed = options.pop("seed")
    return Splits(
        train=make_split(train, seed=2 * seed, **options),
        test=make_split(test, seed=2 * seed + 1, **options),
        group_names=names,
    )


def many_groups(counts, num_attributes, seed=0):
    """A split with class indices as labels and attributes, group by group."""
    cells = torch.tensor([divmod(g, num_attributes) for g in range(len(counts))])
    y, a = cells.repeat_interleave(torch.tensor(counts), 0).T
    inputs = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    return Split(inputs, y.contiguous(), a.contiguous(), list(counts))


class FakeRun(Silent):
    """Records what a run would write."""

    leads = True

    def __init__(self, folder):
        super().__init__(folder)
        self.rows, self.analyses = [], []

    def history(self, row):
        self.rows.append(row)

    def analysis(self, rows):
        self.analyses += rows

    def holds(self, sizes):
        return True

    def values(self, analysis, quantity, split):
        """{(epoch, pair): value} of one quantity."""
        wanted = {"analysis": analysis, "quantity": quantity, "split": split}
        return {
            (row["epoch"], row["pair"]): row["value"]
            for row in self.analyses
            if all(row[k] == v for k, v in wanted.items())
        }


def in_float64(splits):
    """The same splits with float64 tensors."""

    def convert(split):
        if split is None:
            return None
        return Split(split.inputs.double(), split.y.double(), split.a.double(), split.counts)

    return dataclasses.replace(
        splits, **{name: convert(split) for name, split in splits.named().items()}
    )
