"""Training a network for every task: on features all at once, on pictures one after the other."""

import hashlib
import logging
from collections.abc import Callable
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lab import data_sets
from lab.config.schema import Config
from lab.evaluation import shortcuts
from lab.matrix import heads
from lab.matrix.collecting import attributes_of, stacked
from lab.matrix.settings import grouping, task_config
from lab.runs import resuming
from lab.splits import groups

log = logging.getLogger(f"spurious.{__name__}")


def train_runs(
    config: Config, names: list[str], folder: Path, overrides: list[str], run: Callable
) -> None:
    """Run or resume what is not done yet of the runs in `<folder>/runs/<task>`.

    overrides: of the command line, for resumed runs; run: the pipeline of one run, as in main.py.
    """
    for number, name in enumerate(names, 1):
        place = folder / "runs" / name
        before = [path.parent for path in place.glob("[!.]*/status.json")]
        resume = None
        if before:
            resume = resuming.load_to_resume(before[0], None, overrides)
            if resume.phase == "done":
                continue
            own = resume.config
        else:
            own = task_config(config, grouping(names, name), results_dir=str(place))
        log.info("Network %d of %d: %s", number, len(names), name)
        run(own, ["main.py"], MemoryHandler(0), resume)


def train_heads(
    config: Config, names: list[str], device: str, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Train all networks at once on features, or continue from `heads.pt` in the folder.

    Returns (correct samples, samples), each (K, K, 4): task × attribute × group of validation.
    """
    from lab.features import extraction  # with torchvision or timm, slow to import

    own = task_config(config, grouping(names, names[0]))
    extractor = extraction.Extractor(own, device)
    splits = data_sets.load(own)
    pictures = {name: splits.named()[name].inputs for name in ("train", "val")}
    splits = extractor.extract(splits)
    attributes = {name: attributes_of(inputs) for name, inputs in pictures.items()}
    labels = {n: torch.from_numpy(values).float().to(device) for n, values in attributes.items()}
    data = hashlib.sha256(splits.fingerprint().encode())
    for values in attributes.values():
        data.update(np.ascontiguousarray(values).data)

    def features(name: str) -> torch.Tensor:
        return cast(torch.Tensor, splits.named()[name].inputs).to(device)

    blocks = heads.train(
        features("train"),
        labels["train"],
        torch.from_numpy(storage_orders(pictures["train"].rows, attributes["train"])),
        config,
        folder,
        data.hexdigest(),
        names,
    )
    correct = heads.correct(blocks, features("val"), labels["val"], config.eval_batch_size)
    right = correct.cpu().numpy()
    return stacked(
        shortcuts.tallies(right[:, t], attributes["val"][:, t], attributes["val"])
        for t in range(len(names))
    )


def storage_orders(rows: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Where the samples of a split are that each task's own run would store, in its order (K, N).

    rows: (N,) of the samples in the source; attributes: (N, K). A run stores them group by group,
    of its label and the next attribute, and in the order of the source within each.
    """
    following = np.roll(attributes, -1, axis=1)
    return np.stack(
        [np.lexsort((rows, groups.index(y, a))) for y, a in zip(attributes.T, following.T)]
    )
