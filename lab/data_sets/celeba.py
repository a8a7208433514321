"""CelebA: faces, with one of their attributes as the label and others as the suspected shortcut.

`groupings` names the tasks: the label's attribute, and the shortcut's. Groups of a task are its
label times all combinations of its shortcut's attributes.

official: the three official splits. drawn: the set-up in which SCALE was published; a training set
of chosen `spurious_strength`, a small target set and test data without the correlation.
"""

import logging
from typing import cast

import numpy as np
import torch

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.data_sets import official
from lab.data_sets.sources import celeba as source_of
from lab.splits import groups
from lab.splits.pictures import Pictures
from lab.splits.splits import Split, Splits, Task
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")


def load(config: Config) -> Splits:
    """CelebA as configured; faces are decoded when they are used.

    y = +1 for faces with the task's attribute; with one shortcut attribute a = +1 for faces with
    it, with several a is the index of their combination (the first attribute counts most). The
    groups that are rarer in the official training split than if label and shortcut were independent
    are the minority. Raises `DataError` when the data are missing, damaged, or too few.
    """
    source = source_of.load(config.data_dir, config.target_resolution)
    parts = (source_of.TRAIN, source_of.VAL, source_of.TEST)
    pool = {n: np.flatnonzero(source.partition == p) for n, p in zip(official.SPLITS, parts)}
    drawn_anew = config.celeba_splits == "drawn"
    found = [_task(source, text, pool["train"], drawn_anew) for text in config.groupings]
    tasks, by_task = zip(*found)
    group = by_task[0]
    if drawn_anew:
        drawn = _drawn(group, pool, tasks[0].group_names, config)
    else:
        if config.remove_minority_groups_train:
            minority = np.flatnonzero(tasks[0].minority)
            pool["train"] = pool["train"][~np.isin(group[pool["train"]], minority)]
        drawn = official.capped(pool, config)
    if config.dfr_val_split_strategy == "original":
        drawn["dfr"] = pool["val"]
    splits = official.splits(
        source, group, drawn, config, tasks=list(tasks), celeba=str(source.storage.path)
    )
    if config.dfr_val_split_strategy == "target" and splits.target is not None:
        splits.dfr = splits.target
    if len(tasks) > 1:
        for split in splits.named().values():
            _label_all(split, tasks, by_task)
    return splits


def _task(source, text: str, train: np.ndarray, orient: bool) -> tuple[Task, np.ndarray]:
    """The task of a grouping `label:shortcut,…`, and the group (N,) of every face.

    orient: swap the values of the single shortcut where it correlates negatively with the label;
    the minority is y ≠ a then, even if the two are independent.
    """
    label, _, rest = text.partition(":")
    shortcuts = rest.split(",")
    y = source.attribute(label)
    bits = np.stack([source.attribute(name) > 0 for name in shortcuts])
    names = [[f"not {name}", name] for name in shortcuts]
    if orient:
        covariance = np.cov(y[train], bits[0, train])[0, 1]
        if covariance < 0:
            bits, names = ~bits, [names[0][::-1]]
    k = len(shortcuts)
    a = (bits * 2 ** np.arange(k)[::-1, None]).sum(0)
    group = np.where(y > 0, 2**k, 0) + a
    combined: list[list[str]] = [[]]
    for pair in names:
        combined = [[*before, name] for before in combined for name in pair]
    group_names = [
        ", ".join([side, *combination])
        for side in (f"not {label}", label)
        for combination in combined
    ]
    cells = groups.GROUPS if k == 1 else groups.signed_cells(2**k)
    counts = np.bincount(group[train], minlength=len(cells)).tolist()
    minority = None if orient else groups.under_represented(counts, 2)
    return Task(label, cells, group_names, minority), group


def _drawn(group: np.ndarray, pool: dict, names: list[str], config: Config) -> dict:
    """Rows of each split: minority (groups 1, 2) and majority (0, 3) in the wanted proportion.

    Training: `celeba_majority_samples` of each majority group and this times (1-s)/s of each
    minority group, s = `spurious_strength`; target: `val_target_size`/8 of each group of the
    training faces; validation and test: four equal groups, as large as possible or as asked for.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "pictures", "drawn"))
    left = {
        n: [rng.permutation(rows[group[rows] == g]) for g in range(4)] for n, rows in pool.items()
    }
    most, s = config.celeba_majority_samples, config.spurious_strength
    # A strength of 0 would need infinitely many faces; 1e-9 needs too many, which is reported.
    few = round(most * (1 - s) / max(s, 1e-9))
    wanted = {
        "target": ("train", "val_target_size", [config.val_target_size // 8] * 4),
        "train": ("train", "celeba_majority_samples", [most, few, few, most]),
    }
    for name in ("val", "test"):
        n, smallest = getattr(config, f"num_{name}_samples"), min(map(len, left[name]))
        # At least one of each, so that an empty group is reported.
        counts = [max(smallest, 1)] * 4 if n is None else groups.split_counts(n, [1 / 4] * 4)
        wanted[name] = (name, f"num_{name}_samples", counts)
    drawn, problems = {}, []
    for name, (origin, key, counts) in wanted.items():
        for g, count in enumerate(counts):
            available = len(left[origin][g])
            if count > available:
                problems.append(
                    f"{key}: {count} faces of ({names[g]}) are needed for {name}, but {available} "
                    "are left in their official split; lower it"
                    + (", or raise spurious_strength" if name == "train" and g in (1, 2) else "")
                )
        taken = [rows[:count] for rows, count in zip(left[origin], counts)]
        left[origin] = [rows[count:] for rows, count in zip(left[origin], counts)]
        drawn[name] = rng.permutation(np.concatenate(taken))
    if problems:
        raise DataError(*problems)
    return drawn


def _label_all(split: Split, tasks, by_task) -> None:
    """Set the labels, attributes and groups of all tasks, (N, tasks), of a split."""
    rows = cast(Pictures, split.inputs).rows
    groups_of = torch.from_numpy(np.stack([group[rows] for group in by_task], axis=1))
    split.task_groups = groups_of
    columns = [
        torch.tensor(task.cells, dtype=torch.float32)[groups_of[:, t]]
        for t, task in enumerate(tasks)
    ]
    split.y, split.a = (part.contiguous() for part in torch.stack(columns, dim=1).unbind(-1))
