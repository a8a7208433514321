"""Finished runs of single tasks: finding them, and what their networks predict."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lab.config import comparing, loading, messages
from lab.config.schema import Config, layout
from lab.config.strict_yaml import show
from lab.evaluation import metrics, predictions, shortcuts
from lab.folders import status as run_status
from lab.folders.creating import CONFIG
from lab.matrix.settings import OWN
from lab.runs import opening
from lab.system.errors import ConfigError, UserError

log = logging.getLogger(f"spurious.{__name__}")

# Where things are and how fast they go: what may differ when networks are collected.
PLACE = ("data_dir", "device", "num_workers", "eval_batch_size", "features_cache_dir")
MAY_DIFFER = (*comparing.FREE_TO_CHANGE, *PLACE, "groupings", "experiment_name", "use_dfr")


def find_runs(folders: Iterable[str | Path]) -> dict[str, tuple[Path, Config]]:
    """{label: (folder, configuration)} of the finished runs of CelebA with one task in folders.

    Raises `UserError` for two runs of the same label.
    """
    found: dict[str, tuple[Path, Config]] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--collect: given {folder}; allowed: folders with runs")
        for path in sorted(Path(folder).rglob("status.json")):
            run = path.parent
            hidden = any(part.startswith(".") for part in run.relative_to(folder).parts)
            if hidden or not (run / "model.pt").is_file():
                continue
            if run_status.read_status(run)["phase"] != "done":
                log.warning("%s: not finished, left out", run)
                continue
            config = loading.load_config(run / CONFIG)
            if not config.data_set.any_task or len(config.groupings) != 1:
                continue
            label = config.groupings[0].partition(":")[0]
            if label in found:
                raise UserError(f"two finished runs of {label}: {found[label][0]} and {run}")
            found[label] = run, config
    return found


def predict(
    runs: dict[str, tuple[Path, Config]], names: list[str], base: Config
) -> tuple[np.ndarray, np.ndarray]:
    """(correct samples, samples), each (K, K, 4), of the runs' networks: task × attribute × group.

    One pass of each network over the validation faces serves all attributes. Raises `UserError`
    for a missing run, or one with other settings than base except for `MAY_DIFFER`.
    """
    base = loading.validate(base.resolved() | OWN)
    problems = [f"no finished run of {name}" for name in names if name not in runs]
    for run, config in runs.values():
        problems += [
            f"{run}: {name} is {show(getattr(config, name))}, elsewhere {show(getattr(base, name))}"
            for name in layout(base.catalogue)
            if name not in MAY_DIFFER and getattr(config, name) != getattr(base, name)
        ]
    if problems:
        raise UserError(*problems[: messages.PROBLEMS])
    tallies = []
    for name in names:
        folder, config = runs[name]
        place = {key: getattr(base, key) for key in PLACE}
        opened = opening.OpenedRun(folder, loading.validate(config.resolved() | place))
        attributes = attributes_of(opened.data.val.inputs)
        val = opened.splits.val
        f = predictions.outputs(opened.network("last"), val, base.eval_batch_size)
        right = metrics.correct(f, val.y).cpu().numpy()
        tallies.append(shortcuts.tallies(right, val.y.cpu().numpy(), attributes))
        log.info("%s: %.3f of %d right", name, right.mean(), len(right))
    return stacked(tallies)


def attributes_of(pictures) -> np.ndarray:
    """All attributes (N, K) int8 of CelebA's pictures."""
    return pictures.source.attributes[pictures.rows]


def stacked(
    tallies: Iterable[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """The tallies of every task as two arrays (K, K, 4)."""
    correct, counts = zip(*tallies)
    return np.stack(correct), np.stack(counts)
