"""DFR against a direct scikit-learn run, and its edge cases."""

import json

import numpy as np
import pytest
import torch
from conftest import in_float64, make_split, make_splits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import dfr
import metrics
import model
from errors import DataError


def problem(settings, dfr_counts=(20, 8, 9, 24), **keys):
    config = settings(hidden_dim=6, eval_batch_size=7, dfr_num_retrains=4, **keys)
    splits = make_splits(train=(40, 10, 10, 40), test=(20, 20, 20, 20))
    splits.dfr = make_split(dfr_counts, seed=9)
    splits = in_float64(splits)
    net = model.build(config, (7,)).double()
    return net, splits, config


def spy_on_fits(monkeypatch):
    """Collects (rows, c, seed) of every fit."""
    import logistic

    tasks = []
    original = logistic.fit_all

    def fit_all(features, labels, wanted, penalty, workers):
        tasks.extend(wanted)
        return original(features, labels, wanted, penalty, workers)

    monkeypatch.setattr(logistic, "fit_all", fit_all)
    return tasks


@pytest.mark.parametrize("penalty", ["l1", "l2", "none"])
@pytest.mark.parametrize("layer", ["last_hidden", "layer_0", "layer_1"])
def test_against_a_direct_run(settings, monkeypatch, penalty, layer):
    net, splits, config = problem(
        settings, dfr_reg=penalty, dfr_target_layer=layer, dfr_c_options=[0.5, 2.0]
    )
    tasks = spy_on_fits(monkeypatch)
    head, results = dfr.retrain(net, splits, config)

    def features(split):
        h = split.inputs.flatten(1)
        if layer != "layer_0":
            h = torch.relu(6**0.5 * h @ net.layers[0].weight.T)
        return h.detach().numpy()

    scaler = StandardScaler().fit(features(splits.train))
    X, y = scaler.transform(features(splits.dfr)), splits.dfr.y.numpy()
    group = splits.dfr.group.numpy()
    coefficients, intercepts = [], []
    for rows, c, seed in tasks[-4:]:
        assert np.bincount(group[rows]).tolist() == [8, 8, 8, 8]
        if penalty == "none":
            twin = LogisticRegression(C=np.inf, max_iter=1000)
        else:
            twin = LogisticRegression(
                solver="liblinear",
                l1_ratio=1 if penalty == "l1" else 0,
                C=c,
                max_iter=1000,
                random_state=seed,
            )
        twin.fit(X[rows], y[rows])
        coefficients.append(twin.coef_[0])
        intercepts.append(twin.intercept_[0])
    assert len({tuple(rows) for rows, _, _ in tasks[-4:]}) == 4  # fresh subsets
    np.testing.assert_allclose(head.coefficients, np.mean(coefficients, 0), rtol=1e-6, atol=1e-9)
    assert head.intercept == pytest.approx(np.mean(intercepts), rel=1e-6)

    f = scaler.transform(features(splits.test)) @ head.coefficients + head.intercept
    loss = metrics.LOSSES["logistic"]
    expected = metrics.summary(torch.from_numpy(f), splits.test, loss, splits.train.shares)
    assert results["after"]["test"] == pytest.approx(expected, rel=1e-6)
    f = metrics.outputs(net, splits.test, 100)
    expected = metrics.summary(f, splits.test, loss, splits.train.shares)
    assert results["before"]["test"] == pytest.approx(expected, rel=1e-9)


def test_tuning_fits_one_half_and_scores_the_other(settings, monkeypatch):
    _, splits, config = problem(settings, dfr_c_options=[3.0, 0.01, 0.3])
    rng = np.random.default_rng(0)
    X = rng.normal(size=(len(splits.dfr), 6))
    X[:, 0] += splits.dfr.y.numpy()
    tasks = spy_on_fits(monkeypatch)
    table = dfr.tune(X, splits.dfr, config)
    assert [row["c"] for row in table] == [0.01, 0.3, 3.0]
    seeded = np.random.default_rng(dfr.derive_seed(config.seed, "dfr", "tune"))
    fitting, scoring = dfr.halves(splits.dfr, seeded)
    assert [len(rows) for rows in fitting] == [10, 4, 5, 12]
    assert [len(rows) for rows in scoring] == [10, 4, 4, 12]
    assert sorted(np.concatenate(fitting + scoring)) == list(range(61))

    y, group = splits.dfr.y.numpy(), splits.dfr.group.numpy()
    for row, (rows, c, seed) in zip(table, tasks):
        assert set(rows) <= set(np.concatenate(fitting))
        assert np.bincount(group[rows]).tolist() == [4, 4, 4, 4]
        twin = LogisticRegression(
            solver="liblinear", l1_ratio=1, C=c, max_iter=1000, random_state=seed
        ).fit(X[rows], y[rows])
        assert row["worst_acc"] == min(twin.score(X[held], y[held]) for held in scoring)


def test_ties_go_to_the_smaller_c(settings, monkeypatch):
    net, splits, config = problem(settings, dfr_c_options=[5.0, 0.2, 1.0])
    tied = [{"c": c, "worst_acc": s} for c, s in ((0.2, 0.5), (1.0, 0.75), (5.0, 0.75))]
    monkeypatch.setattr(dfr, "tune", lambda *_: tied)
    assert dfr.retrain(net, splits, config)[1]["c"] == 1.0


def test_workers_do_not_change_the_result(settings):
    net, splits, one = problem(settings)
    two = one.model_copy(update={"dfr_num_workers": 2})
    first, second = dfr.retrain(net, splits, one), dfr.retrain(net, splits, two)
    assert np.array_equal(first[0].coefficients, second[0].coefficients)
    assert first[1] == second[1]


@pytest.mark.parametrize("counts", [(12, 0, 0, 9), (5, 1, 1, 5), (1, 1, 1, 1)])
def test_empty_and_tiny_groups(settings, counts):
    net, splits, config = problem(settings, dfr_counts=counts)
    _, results = dfr.retrain(net, splits, config)
    assert results["samples_per_group"] == min(filter(None, counts))
    assert np.isfinite(results["after"]["test"]["worst_acc"])


def test_data_that_cannot_be_used_is_said_before_training():
    splits = make_splits()
    with pytest.raises(DataError, match="dfr_val_ratio: too small"):
        dfr.check(splits)
    splits.dfr = make_split((4, 4, 0, 0))
    with pytest.raises(DataError, match="one label only"):
        dfr.check(splits)
    splits.dfr = make_split((4, 0, 1, 0))
    dfr.check(splits)


def test_fits_that_do_not_converge_are_told_once(settings, monkeypatch, caplog):
    import logistic

    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 1)
    net, splits, config = problem(settings)
    with caplog.at_level("WARNING", logger="spurious"):
        _, results = dfr.retrain(net, splits, config)
    assert results["converged_fits"] < 4
    assert any("did not converge" in record.message for record in caplog.records)


def test_saved_files_read_back(settings, tmp_path):
    net, splits, config = problem(settings)
    splits.test = make_split((5, 0, 5, 5), seed=4)
    head, results = dfr.retrain(net, splits, config)
    dfr.save(tmp_path, head, results, splits.group_names)
    read = json.loads((tmp_path / "dfr_results.json").read_text())
    assert read["after"]["test"]["group_1_acc"] is None
    assert read["after"]["train"] == results["after"]["train"]
    with np.load(tmp_path / "dfr_model.npz", allow_pickle=False) as saved:
        again = dfr.Head(
            saved["mean"], saved["scale"], saved["coefficients"], float(saved["intercept"])
        )
    h = np.concatenate(list(dfr.feature_batches(net, splits.test, config)))
    f = again.outputs(h)
    accuracy = (f * splits.test.y > 0).double().mean().item()
    assert accuracy == pytest.approx(results["after"]["test"]["avg_acc"])
    text = (tmp_path / "dfr_results.txt").read_text()
    assert "worst-group accuracy" in text
    assert max(map(len, text.splitlines()[2:])) <= 80
