"""Which epoch is the best one."""

import math

import pytest
import torch
from helpers import make_split, make_splits
from material import trained

from lab.evaluation import selection
from lab.training import recording

# (worst-group accuracy, average accuracy, average loss) on validation data by epoch, from 0 on.
HISTORIES = [
    ([(0.9, 0.9, 0.1), (0.2, 0.5, 0.7), (0.3, 0.6, 0.7), (0.1, 0.9, 0.1)], 2),  # not untrained
    ([(0.0, 0.5, 0.7), (0.3, 0.6, 0.5), (0.3, 0.7, 0.9), (0.3, 0.6, 0.1)], 2),  # average accuracy
    ([(0.0, 0.5, 0.7), (0.3, 0.6, 0.5), (0.3, 0.6, 0.4), (0.3, 0.6, 0.6)], 2),  # loss
    ([(0.3, 0.5, 0.7), (0.3, 0.5, 0.7), (0.3, 0.5, 0.7), (0.3, 0.5, 0.7)], 1),  # the earliest
    ([(0.3, 0.5, 0.7), (math.nan, 0.5, 0.7), (0.0, 0.1, math.nan), (0.0, 0.1, 9.0)], 3),  # NaN
    ([(0.3, 0.5, 0.7)], 0),  # nothing but the untrained network
]


@pytest.mark.parametrize(("history", "best"), HISTORIES)
def test_the_best_epoch_of_a_run(settings, fake_run, monkeypatch, history, best):
    real = recording.Recorder.evaluate

    def scripted(self, measurement):
        summaries = real(self, measurement)
        names = ("worst_acc", "avg_acc", "avg_loss")
        summaries["val"] |= dict(zip(names, history[measurement.epoch]))
        return summaries

    monkeypatch.setattr(recording.Recorder, "evaluate", scripted)
    splits = make_splits()
    splits.val = make_split((3, 2, 1, 3), seed=5)
    keys = {"num_val_samples": 9, "epochs": len(history) - 1}
    trained(fake_run, settings, splits, **keys)
    kept = torch.load(fake_run.folder / "checkpoints" / "best.pt", weights_only=False)
    assert kept["epoch"] == best
    assert kept["score"] == pytest.approx(history[best][0], nan_ok=True)


def test_runs_are_compared_by_the_minority_where_groups_are_many():
    few = [f"test_group_{g}_acc" for g in range(4)]
    assert selection.metric_between_runs([*few, "test_group_0_loss"]) == "worst_acc"
    assert selection.metric_between_runs([*few, "test_group_4_acc"]) == "minority_acc"
