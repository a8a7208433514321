"""Early stopping: when training ends, what is kept, and resuming up to there and beyond."""

import math
import signal

import pandas as pd
import pytest
import torch
from helpers import make_split, make_splits
from material import assert_equal, at_call, sent, trained

from lab.config.loading import validate
from lab.system.errors import ConfigError, DataError
from lab.training import recording

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "patience", "last"),
    [
        ([5, 4, 3, 2, 1, 0], 1, 5),  # always smaller
        ([5, 4, 4, 3, 2, 1], 1, 2),  # equal is not smaller
        ([5, 4, 6, 3, 7, 8], 2, 5),  # every smaller one counts anew
        ([1, 2, 3, 4, 5, 6], 3, 3),  # the untrained network counts
        ([5, 6, 4, 5, 5, 3.9], 3, 5),
        ([5, 6, 4, 5, 5, 5], 3, 5),
        ([5, NAN, NAN, 1, 0, 0], 2, 2),  # undefined is not smaller
        ([1, 2, 3, 4, 5, 6], None, 5),
    ],
)
def test_training_ends_when_the_patience_is_over(
    settings, fake_run, monkeypatch, caplog, losses, patience, last
):
    real = recording.Recorder.evaluate

    def scripted(self, measurement):
        summaries = real(self, measurement)
        summaries["val"]["avg_loss"] = losses[measurement.epoch]
        return summaries

    monkeypatch.setattr(recording.Recorder, "evaluate", scripted)
    splits = make_splits()
    splits.val = make_split((3, 2, 1, 3), seed=5)
    keys = {"early_stopping_patience": patience, "num_val_samples": 9, "checkpoint_every": None}
    with caplog.at_level("INFO"):
        trained(fake_run, settings, splits, epochs=5, **keys)
    assert [row["epoch"] for row in fake_run.rows] == list(range(last + 1))
    found = [path.name for path in (fake_run.folder / "checkpoints").glob("epoch_*")]
    assert found == [f"epoch_{last:07d}_step_000000000.pt"]
    assert (fake_run.folder / "checkpoints" / "best.pt").exists()
    reported = f"Training ended at epoch {last}: the validation loss was lowest at epoch"
    assert (reported in caplog.text) == (
        last < 5 or losses == [5, 4, 6, 3, 7, 8] or losses[-1] == 5
    )


# The validation loss falls, then grows: few digits, a large network, large steps.
OVERFIT = [
    "num_train_samples=60", "num_val_samples=200", "hidden_dim=64", "optimizer=Adam",
    "learning_rate=0.02", "train_batch_size=12", "dfr_val_ratio=0.4", "checkpoint_every=3",
    "early_stopping_patience=3", "epochs=30",
]  # fmt: skip


def stopping_epoch(losses, patience):
    """The first epoch for which none of the last `patience` losses is below all before them."""
    for epoch in range(patience, len(losses)):
        if min(losses[epoch - patience + 1 : epoch + 1]) >= min(losses[: epoch - patience + 1]):
            return epoch
    return None


def stopped_early(go, results, *more):
    names = {setting.split("=")[0] for setting in more}
    given = [setting for setting in OVERFIT if setting.split("=")[0] not in names]
    code, lines = go(*given, *more, results=results)
    assert code == 0
    losses = pd.read_csv(go.folder(results) / "training_history.csv")["val_avg_loss"].tolist()
    assert stopping_epoch(losses, 3) == len(losses) - 1 < 30
    return go.folder(results), len(losses) - 1, lines


def test_a_run_that_is_stopped_and_resumed_ends_at_the_same_epoch(go, monkeypatch):
    reference, last, lines = stopped_early(go, "whole")
    assert any(f"Training ended at epoch {last}: " in line for line in lines)
    # Three steps an epoch: in the middle of the last one, and of one before.
    for steps in (3 * last - 1, 5):
        with monkeypatch.context() as patch:
            at_call(patch, torch.optim.AdamW, "step", steps, sent(signal.SIGTERM))
            assert go(*OVERFIT, results=f"stopped_{steps}")[0] == 143
        folder = go.folder(f"stopped_{steps}")
        assert go("--resume", str(folder))[0] == 0
        assert_equal(folder, reference)


def test_more_epochs_do_not_train_on_what_has_ended(go):
    reference, last, _ = stopped_early(go, "long", "epochs=40")
    folder, _, _ = stopped_early(go, "short")
    code, lines = go("--resume", str(folder), "epochs=40")
    assert code == 0
    assert any(f"Training ended at epoch {last}: " in line for line in lines)
    assert_equal(folder, reference)
    code, lines = go("--resume", str(folder), "early_stopping_patience=9")
    assert code == 2
    assert lines == [
        "early_stopping_patience: given 9, but the run to resume has 3; allowed: 3"
    ]  # fmt: skip


def test_more_epochs_for_a_run_that_had_patience_left(go):
    reference, last, _ = stopped_early(go, "whole")
    short = [setting for setting in OVERFIT if not setting.startswith("epochs")]
    assert go(*short, f"epochs={last - 2}", results="short")[0] == 0
    folder = go.folder("short")
    assert len(pd.read_csv(folder / "training_history.csv")) == last - 1
    assert go("--resume", str(folder), "epochs=30")[0] == 0
    assert_equal(folder, reference)


@pytest.mark.parametrize(
    ("keys", "val"),
    [
        ({}, "num_val_samples"),
        ({"dataset_name": "WaterBirds", "num_val_samples": 0}, "num_val_samples"),
        ({"dataset_name": "Dominoes", "val_target_size": 0}, "val_target_size"),
    ],
)
def test_refused_without_validation_data(keys, val):
    with pytest.raises(ConfigError) as error:
        validate(keys | {"early_stopping_patience": 4})
    assert list(error.value.problems) == [
        "early_stopping_patience: given 4, which needs the validation loss, but "
        f"{val} is 0; allowed: null, or {val} above 0"
    ]


def test_refused_where_the_data_turn_out_to_have_no_validation_split(settings, fake_run):
    with pytest.raises(DataError, match="early_stopping_patience: given 4, but there are no val"):
        trained(fake_run, settings, early_stopping_patience=4, num_val_samples=None)
    assert not fake_run.rows
