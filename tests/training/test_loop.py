"""The loop: what theory predicts against what a step does, rows, checkpoints, divergence."""

import math

import numpy as np
import pytest
import torch
from helpers import make_splits
from material import trained

from lab.analyses import gram as analysis
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOGISTIC
from lab.training import checkpoints, recording

PAIRS = ("G(-1,+1)_vs_G(-1,-1)", "G(+1,-1)_vs_G(+1,+1)")


@pytest.mark.parametrize("method", ["None", "IW_uniform", "GroupDRO"])
@pytest.mark.parametrize("train", [(12, 5, 4, 9), (8, 0, 0, 6)], ids=["full", "empty"])
def test_method_total_is_measured(fake_run, settings, method, train):
    """A full-batch step of plain SGD does to the gap what the flow of the method says."""
    pair = [[-1, -1], [1, 1]]
    keys = {"gap_dynamics_factors": {"group_pairs": [pair, [[-1, 1], [1, -1]]]}}
    trained(
        fake_run, settings, make_splits(train=train), debias_method=method, dro_eta_q=0.5, **keys
    )
    for split in ("train", "test_under_train"):
        predicted = fake_run.values("gap_dynamics_factors", "method_total", split)
        measured = fake_run.values("gap_dynamics_factors", "measured", split)
        assert set(predicted) == set(measured)
        compared = 0
        for (epoch, name), value in measured.items():
            if epoch == 3:
                assert math.isnan(value)
            elif split == "train" and train[1] == 0 and name != "G(-1,-1)_vs_G(+1,+1)":
                assert math.isnan(value)
                assert math.isnan(predicted[epoch, name])
            else:
                assert value == pytest.approx(predicted[epoch, name], rel=1e-3)
                compared += 1
        assert compared >= 3
    if method != "None" and train[1]:
        total = fake_run.values("gap_dynamics_factors", "total", "train")
        predicted = fake_run.values("gap_dynamics_factors", "method_total", "train")
        assert total != pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(
    "keys",
    [
        {"train_batch_size": 8},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"optimizer": "Adam"},
        {"gradient_gram_num_samples": 2},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_measured_is_unknown_where_an_epoch_is_not_one_plain_step(fake_run, settings, keys):
    trained(fake_run, settings, **keys)
    measured = fake_run.values("gap_dynamics_factors", "measured", "train")
    assert len(measured) == 4 * 2
    assert all(math.isnan(value) for value in measured.values())


def test_a_batch_as_large_as_the_split_is_a_full_batch(fake_run, settings):
    trained(fake_run, settings, train_batch_size=30)
    measured = fake_run.values("gap_dynamics_factors", "measured", "train")
    assert all(math.isfinite(measured[0, pair]) for pair in PAIRS)


def test_history_has_every_quantity_at_every_epoch(fake_run, settings):
    net = trained(fake_run, settings, debias_method="GroupDRO", learning_rate=0.5)
    assert [row["epoch"] for row in fake_run.rows] == [0, 1, 2, 3]
    splits = make_splits()
    loss = LOGISTIC
    for name, split in (("train", splits.train), ("test", splits.test)):
        f = predictions.outputs(net, split, 100)
        expected = metrics.summary(f, split, loss, splits.train.shares)
        last = fake_run.rows[-1]
        found = {key: last[f"{name}_{key}"] for key in expected}
        assert found == pytest.approx(expected, rel=1e-9)
    weights = [[row[f"flow_weight_{g}"] for g in range(4)] for row in fake_run.rows]
    assert all(sum(w) == pytest.approx(1) for w in weights)
    assert weights[0] != weights[-1]


def test_analyses_do_not_change_the_training(fake_run, settings):
    """Same bytes in the history with analyses at every epoch and with none."""
    splits = make_splits(dtype=torch.float32)
    keys = {"train_batch_size": 8, "learning_rate": 0.5, "dtype": torch.float32}
    first = trained(fake_run, settings, splits, **keys)
    with_analyses, fake_run.rows = fake_run.rows, []
    never = {"analyses": "none"}
    second = trained(fake_run, settings, splits, **keys, **never)
    assert fake_run.rows == with_analyses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_epochs_of_the_analyses(fake_run, settings):
    trained(
        fake_run,
        settings,
        gradient_basis_analysis_epochs=[0, 2, 99],
        jacobian_norm_analysis_epochs=[],
        static_dynamic_decomposition_analysis_epochs=[3],
        analyze_model_output_expectation=False,
    )
    found = {}
    for row in fake_run.analyses:
        found.setdefault(row["analysis"], set()).add(row["epoch"])
    assert found == {
        "gradient_basis": {0, 2},
        "gap_dynamics_factors": {0, 1, 2, 3},
        "static_dynamic_decomposition": {3},
    }
    with np.load(fake_run.folder / "gram.npz", allow_pickle=False) as gram:
        assert gram["epochs"].tolist() == [0, 1, 2, 3]
        assert gram["labels"].tolist() == analysis.labels()
        assert gram["K"].shape == (4, 16, 16)
        assert np.isnan(gram["K"][0, 4:8]).all()
        assert np.isfinite(gram["K"][3]).all()


def test_only_the_jacobian_rows_can_have_samples_of_their_own(fake_run, settings):
    trained(fake_run, settings, jacobian_num_samples=3)
    with np.load(fake_run.folder / "gram.npz", allow_pickle=False) as gram:
        assert np.isfinite(gram["K_jacobian"][:, 4:8, 12:]).all()
        assert np.isnan(gram["K_jacobian"][:, :4, :4]).all()
        assert not np.allclose(gram["K_jacobian"][:, 4:8, 4:8], gram["K"][:, 4:8, 4:8])


@pytest.mark.parametrize("keys", [{"train_batch_size": 8}, {"debias_method": "GroupDRO"}])
def test_divergence_names_epoch_and_rate_and_keeps_the_rows(fake_run, settings, keys):
    with pytest.raises(recording.Diverged, match=r"learning_rate: .*epoch [12] .*rate 1e\+06"):
        trained(
            fake_run,
            settings,
            make_splits(dtype=torch.float32),
            torch.float32,
            loss_function="mse",
            learning_rate=1e6,
            epochs=30,
            **keys,
        )
    assert not math.isfinite(fake_run.rows[-1]["train_avg_loss"])
    assert (fake_run.folder / "gram.npz").exists()
    assert not (fake_run.folder / "model.pt").exists()


def test_checkpoints_are_the_last_two_and_load_safely(fake_run, settings):
    net = trained(fake_run, settings, epochs=7, checkpoint_every=2, debias_method="GroupDRO")
    found = sorted(p.name for p in (fake_run.folder / "checkpoints").iterdir())
    assert found == ["epoch_0000006_step_000000000.pt", "epoch_0000007_step_000000000.pt"]
    state = torch.load(fake_run.folder / "checkpoints" / found[1], weights_only=True)
    assert (state["epoch"], state["step"]) == (7, 0)
    assert set(state) == checkpoints.STATE
    assert len(state["method"]["log_q"]) == 4
    weights = torch.load(fake_run.folder / "model.pt", weights_only=True)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in weights.items())


def test_no_epoch_is_an_evaluation(fake_run, settings):
    trained(fake_run, settings, epochs=0)
    assert len(fake_run.rows) == 1
    assert fake_run.values("gap_dynamics_factors", "total", "train")


def test_group_weights_follow_the_recursion_over_the_epochs(fake_run, settings):
    trained(
        fake_run, settings, debias_method="GroupDRO", dro_eta_q=0.5, learning_rate=0.5, epochs=4
    )
    q = [0.25] * 4
    for row in fake_run.rows:
        losses = [row[f"train_group_{g}_loss"] for g in range(4)]
        raised = [weight * math.exp(0.5 * loss) for weight, loss in zip(q, losses)]
        q = [value / sum(raised) for value in raised]
        assert [row[f"flow_weight_{g}"] for g in range(4)] == pytest.approx(q, rel=1e-9)
