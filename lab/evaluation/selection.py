"""Selection rules: which epoch of a run is the best one, and by what runs are compared."""

import math
import re
from collections.abc import Iterable, Mapping

from lab.config.schema import Config
from lab.splits.splits import Splits
from lab.system.errors import DataError

FEW_GROUPS = 4  # the worst of a hundred groups of a handful of samples each means nothing


def check(splits: Splits, config: Config) -> None:
    """Raises `DataError` for settings that need other validation data than the splits have."""
    if config.early_stopping_patience and splits.val is None:
        raise DataError(
            f"early_stopping_patience: given {config.early_stopping_patience}, but there are "
            "no validation data; raise num_val_samples, or take null"
        )
    if config.best_epoch_by == "minority_acc" and splits.val and not has_minority(splits):
        raise DataError(
            "best_epoch_by: given minority_acc, but the validation data hold no sample of a "
            "minority group (of every task, if there are several); raise num_val_samples, or "
            "take worst_acc or avg_acc"
        )


def selection_metric(splits: Splits, config: Config) -> str:
    """The validation accuracy that chooses the best epoch.

    `best_epoch_by`, else the worst group's with up to four groups, with more the minority's.
    Without a minority in the validation data few groups are non-empty, one per label, and the
    worst group chooses again.
    """
    if config.best_epoch_by:
        return config.best_epoch_by
    few = len(splits.cells) <= FEW_GROUPS or not has_minority(splits)
    return "worst_acc" if few else "minority_acc"


def rank(epoch: int, summary: Mapping[str, float], metric: str) -> tuple[bool, float, float, float]:
    """The sort key of an epoch from its validation summary; the best epoch is the first maximum.

    The untrained network (epoch 0) is worse than any trained one. Ties of the metric go to the
    higher average accuracy, then to the lower average loss. NaN is worse than any number.
    """
    values = (summary[metric], summary["avg_acc"], -summary["avg_loss"])
    score, average, loss = (-math.inf if math.isnan(value) else value for value in values)
    return epoch > 0, score, average, loss


def has_minority(splits: Splits) -> bool:
    """Whether the validation data have samples that go against the shortcut, of every task."""
    val, tasks = splits.val, splits.tasks
    assert val is not None  # an epoch is chosen on validation data only
    parts = [val.of_task(t, task)[1] for t, task in enumerate(tasks)] if len(tasks) > 1 else [val]
    return all(bool(part.in_minority.any()) for part in parts)


def metric_between_runs(columns: Iterable[str]) -> str:
    """The accuracy by which finished runs are compared, from the names of their final metrics.

    The worst group's with up to four groups, with more the minority's (see `selection_metric`).
    """
    groups = [name for name in columns if re.fullmatch(r"test_group_\d+_acc", name)]
    return "worst_acc" if len(groups) <= FEW_GROUPS else "minority_acc"
