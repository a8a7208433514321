"""DFR against a direct scikit-learn run, and its edge cases."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import in_float64, make_split, make_splits, many_groups
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from lab.config.seeds import derive_seed
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOGISTIC
from lab.networks import building
from lab.retraining import dfr, regressions, report
from lab.retraining.head import Head
from lab.retraining.subsets import fitting_and_scoring
from lab.splits.splits import Splits
from lab.system.errors import DataError


def problem(settings, dfr_counts=(20, 8, 9, 24), **keys):
    config = settings(hidden_dim=6, eval_batch_size=7, dfr_num_retrains=4, **keys)
    splits = make_splits(train=(40, 10, 10, 40), test=(20, 20, 20, 20))
    splits.dfr = make_split(dfr_counts, seed=9)
    splits = in_float64(splits)
    net = building.build(config, (7,)).double()
    return net, splits, config


def spy_on_fits(monkeypatch):
    """Collects (rows, c, seed) of every fit."""
    from lab.retraining import logistic

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
    loss = LOGISTIC
    expected = metrics.summary(torch.from_numpy(f), splits.test, loss, splits.train.shares)
    assert results["after"]["test"] == pytest.approx(expected, rel=1e-6)
    f = predictions.outputs(net, splits.test, 100)
    expected = metrics.summary(f, splits.test, loss, splits.train.shares)
    assert results["before"]["test"] == pytest.approx(expected, rel=1e-9)


def test_tuning_fits_one_half_and_scores_the_other(settings, monkeypatch):
    _, splits, config = problem(settings, dfr_c_options=[3.0, 0.01, 0.3])
    rng = np.random.default_rng(0)
    X = rng.normal(size=(len(splits.dfr), 6))
    X[:, 0] += splits.dfr.y.numpy()
    tasks = spy_on_fits(monkeypatch)
    table = regressions.tune(X, splits.dfr, config)
    assert [row["c"] for row in table] == [3.0, 0.01, 0.3]  # as they are listed
    seeded = np.random.default_rng(derive_seed(config.seed, "dfr", "tune"))
    fitting, scoring = fitting_and_scoring(splits.dfr, seeded, [10, 4, 4, 12])
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
        right = twin.decision_function(X) * y > 0  # an output of exactly 0 is wrong
        accuracies = [right[held].mean() for held in scoring]
        assert row["worst_acc"] == min(accuracies)
        assert row["mean_group_acc"] == pytest.approx(sum(accuracies) / 4)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(5.0, 0.5, 0.9), (0.2, 0.75, 0.8), (1.0, 0.75, 0.8)], 0.2),  # the first listed
        ([(5.0, 0.75, 0.8), (0.2, 0.75, 0.9), (1.0, 0.75, 0.85)], 0.2),  # the higher mean
        ([(0.05, 0.0, 0.0), (1.0, 0.0, 0.42)], 1.0),  # no all-zero head beside a usable one
        ([(5.0, math.nan, 0.9), (1.0, 0.1, 0.2)], 1.0),
        ([(5.0, math.nan, math.nan), (1.0, math.nan, math.nan)], 5.0),
    ],
)
def test_ties_of_c(settings, monkeypatch, rows, expected):
    net, splits, config = problem(settings, dfr_c_options=[row[0] for row in rows])
    table = [{"c": c, "worst_acc": worst, "mean_group_acc": mean} for c, worst, mean in rows]
    monkeypatch.setattr(regressions, "tune", lambda *_: table)
    assert dfr.retrain(net, splits, config)[1]["c"] == expected


def test_a_head_without_coefficients_warns(settings, caplog):
    net, splits, config = problem(settings, dfr_c_options=[1e-9])
    _, results = dfr.retrain(net, splits, config)
    assert results["nonzero_coefficients"] == 0
    assert "all coefficients are 0" in caplog.text


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


def test_unusable_data_is_reported_before_training():
    splits = make_splits()
    with pytest.raises(DataError, match="use_dfr: no sample is set aside"):
        dfr.check(splits)
    splits.dfr = make_split((4, 4, 0, 0))
    with pytest.raises(DataError, match="one label only"):
        dfr.check(splits)
    splits.dfr = make_split((4, 0, 1, 0))
    dfr.check(splits)


def test_fits_that_do_not_converge_are_reported_once(settings, monkeypatch, caplog):
    from lab.retraining import logistic

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
        again = Head(
            saved["mean"], saved["scale"], saved["coefficients"], float(saved["intercept"])
        )
    h = np.concatenate(list(dfr.feature_batches(net, splits.test, config)))
    f = again.outputs(h)
    accuracy = (f * splits.test.y > 0).double().mean().item()
    assert accuracy == pytest.approx(results["after"]["test"]["avg_acc"])
    text = (tmp_path / "dfr_results.txt").read_text()
    assert "worst-group accuracy" in text
    assert max(map(len, text.splitlines()[2:])) <= 80


class Net(torch.nn.Module):
    """Outputs of several classes on the first features of random inputs."""

    def hidden(self, x, layer=None):
        return torch.tanh(2 * x.flatten(1)[:, :5])

    def forward(self, x):
        return self.hidden(x)[:, :3]


def three_classes(counts, seed):
    """Inputs with something to learn: the label in one coordinate, the attribute in another."""
    split = many_groups(counts, num_attributes=3)
    noise = torch.randn(len(split), 7, generator=torch.Generator().manual_seed(seed))
    split.inputs = 0.7 * noise
    for k in range(3):
        split.inputs[:, k] += (split.y == k).float()
    split.inputs[:, 3] += split.a - 1
    return split


def target_problem(settings, **keys):
    none = {"analyses": "none"}
    config = settings(
        dataset_name="Dominoes", dominoes_classes="ten", loss_function="cross_entropy",
        dfr_val_split_strategy="target", eval_batch_size=11, **none | keys,
    )  # fmt: skip
    target = three_classes((5, 6, 4, 7, 5, 6, 8, 4, 5), 2)
    splits = Splits(
        train=three_classes((20, 2, 3, 1, 20, 2, 2, 1, 20), 0),
        test=three_classes((6,) * 9, 1),
        group_names=[f"{y}, {a}" for y in range(3) for a in range(3)],
        val=three_classes((5, 7, 6, 6, 5, 5, 4, 8, 5), 3),
        target=target,
        dfr=target,
        num_classes=3,
    )
    return Net(), splits, config


def solver(penalty, c, seed):
    ratio = 1 if penalty == "l1" else 0
    return LogisticRegression(
        solver="liblinear", l1_ratio=ratio, C=c, max_iter=1000, random_state=seed
    )


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_the_target_set_against_a_direct_run(settings, monkeypatch, penalty):
    options = [0.3, 1.0, 30.0]  # with smaller ones all outputs of l1 are tied, which is wrong here
    net, splits, config = target_problem(settings, dfr_reg=penalty, dfr_c_options=options)
    tasks = spy_on_fits(monkeypatch)
    head, results = dfr.retrain(net, splits, config)
    assert all(list(rows) == list(range(50)) for rows, _, _ in tasks)  # all of it, as it is

    def features(split):
        return net.hidden(split.inputs).numpy()

    X, y = features(splits.target), splits.target.y.numpy()
    wrong_digit = (splits.val.y != splits.val.a).numpy()
    scores, means = [], []
    for (_, c, seed), row in zip(tasks, results["tuning"]):
        twin = OneVsRestClassifier(solver(penalty, c, seed)).fit(X, y)
        guess = twin.predict(features(splits.val)[wrong_digit])
        scores.append((guess == splits.val.y.numpy()[wrong_digit]).mean())
        right = twin.predict(features(splits.val)) == splits.val.y.numpy()
        of_groups = [right[part].mean() for part in splits.val.slices if part.stop > part.start]
        means.append(np.mean(of_groups))
        expected_row = {"c": c, "minority_acc": scores[-1], "mean_group_acc": np.mean(of_groups)}
        assert row == pytest.approx(expected_row)
    assert len(set(scores)) > 1
    assert results["c"] == max(zip(scores, means, [-i for i in range(3)], options))[3]
    assert results["tuned_for"] == "minority_acc"

    seed = tasks[-1][2]
    twin = OneVsRestClassifier(solver(penalty, results["c"], seed)).fit(X, y)
    expected = np.stack([one.coef_[0] for one in twin.estimators_])
    assert head.coefficients.shape == (3, 5)
    np.testing.assert_allclose(head.coefficients, expected, rtol=1e-6, atol=1e-9)
    intercepts = [one.intercept_[0] for one in twin.estimators_]
    np.testing.assert_allclose(head.intercept, intercepts, rtol=1e-6, atol=1e-9)
    assert (head.mean == 0).all() and (head.scale == 1).all()
    guess = twin.predict(features(splits.test))
    accuracy = (guess == splits.test.y.numpy()).mean()
    assert results["after"]["test"]["avg_acc"] == pytest.approx(accuracy)
    assert results["num_retrains"] == 1 and results["num_samples"] == 50
    assert set(results["after"]) == {"train", "test", "val", "target"}


def test_the_target_set_balanced_and_standardised(settings, monkeypatch):
    keys = {"dfr_balance": True, "dfr_standardize": True, "dfr_num_retrains": 3}
    net, splits, config = target_problem(settings, dfr_c_options=[0.7], **keys)
    tasks = spy_on_fits(monkeypatch)
    head, results = dfr.retrain(net, splits, config)
    X = [net.hidden(split.inputs).numpy() for split in (splits.train, splits.target)]
    scaler = StandardScaler().fit(X[0])
    np.testing.assert_allclose(head.mean, scaler.mean_, rtol=1e-5, atol=1e-7)
    coefficients = []
    for rows, c, seed in tasks[-3:]:
        assert np.bincount(splits.target.group[torch.from_numpy(rows)]).tolist() == [4] * 9
        twin = OneVsRestClassifier(solver("l1", c, seed))
        twin.fit(scaler.transform(X[1])[rows], splits.target.y.numpy()[rows])
        coefficients.append(np.stack([one.coef_[0] for one in twin.estimators_]))
    np.testing.assert_allclose(head.coefficients, np.mean(coefficients, 0), rtol=1e-4, atol=1e-6)
    assert results["num_retrains"] == 3 and results["samples_per_group"] == 4


@pytest.mark.parametrize("loss", ["logistic", "cross_entropy"])
def test_two_classes_on_the_target_set(settings, loss):
    none = {"analyses": "none"}
    config = settings(
        dataset_name="Dominoes", loss_function=loss, dfr_val_split_strategy="target",
        dfr_c_options=[1.0], **none,
    )  # fmt: skip
    splits = make_splits(dtype=torch.float32)
    splits.val, splits.target = make_split((5, 5, 5, 5), seed=8), make_split((9, 9, 9, 9), seed=9)
    splits.dfr = splits.target

    class Two(Net):
        def forward(self, x):
            f = self.hidden(x)[:, 0]
            return torch.stack([-f, f], 1) if loss == "cross_entropy" else f

    head, results = dfr.retrain(Two(), splits, config)
    X = Net().hidden(splits.target.inputs).numpy()
    seed = derive_seed(config.seed, "dfr", "solver", 0) % 2**31
    twin = solver("l1", 1.0, seed).fit(X, splits.target.y.numpy())
    if loss == "cross_entropy":
        assert head.coefficients.shape == (2, 5)
        difference = head.coefficients[1] - head.coefficients[0]
        bias = head.intercept[1] - head.intercept[0]
    else:
        difference, bias = head.coefficients, head.intercept
    np.testing.assert_allclose(difference, twin.coef_[0], rtol=1e-6, atol=1e-9)
    assert bias == pytest.approx(twin.intercept_[0], rel=1e-6, abs=1e-9)
    # Whichever way the outputs are written, they mean the same.
    f = torch.from_numpy(twin.decision_function(Net().hidden(splits.test.inputs).numpy()))
    logistic_loss = LOGISTIC
    expected = metrics.summary(f, splits.test, logistic_loss, splits.train.shares)
    assert results["after"]["test"] == pytest.approx(expected, rel=1e-6)


def test_all_of_the_hold_out_without_balancing(settings, monkeypatch):
    net, splits, config = problem(settings, dfr_balance=False, dfr_standardize=False)
    tasks = spy_on_fits(monkeypatch)
    head, results = dfr.retrain(net, splits, config)
    assert [len(rows) for rows, _, _ in tasks] == [31, 31, 31, 61]
    assert results["num_retrains"] == 1 and results["samples_per_group"] is None
    h = np.concatenate(list(dfr.feature_batches(net, splits.dfr, config)))
    twin = solver("l1", results["c"], tasks[-1][2]).fit(h, splits.dfr.y.numpy())
    np.testing.assert_allclose(head.coefficients, twin.coef_[0], rtol=1e-6, atol=1e-9)


def test_saved_files_of_several_classes(settings, tmp_path):
    net, splits, config = target_problem(settings)
    head, results = dfr.retrain(net, splits, config)
    dfr.save(tmp_path, head, results, splits.group_names)
    with np.load(tmp_path / "dfr_model.npz", allow_pickle=False) as saved:
        again = Head(*(saved[k] for k in ("mean", "scale", "coefficients", "intercept")))
    h = np.concatenate(list(dfr.feature_batches(net, splits.test, config)))
    right = metrics.correct(again.outputs(h), splits.test.y).double().mean().item()
    assert right == pytest.approx(results["after"]["test"]["avg_acc"])
    assert json.loads((tmp_path / "dfr_results.json").read_text())["tuned_for"] == "minority_acc"
    text = (tmp_path / "dfr_results.txt").read_text()
    assert "one fit on 50 samples" in text and "minority accuracy" in text
    assert "group" not in text.replace("worst-group", "")  # nine would be too many


def test_missing_labels_are_reported(settings):
    _, splits, _ = target_problem(settings)
    splits.dfr = three_classes((5, 6, 4, 7, 5, 6, 0, 0, 0), 2)
    with pytest.raises(DataError, match="hold 2 of 3 labels only"):
        dfr.check(splits)


@pytest.mark.parametrize(("strategy", "marked"), [("original", "val"), ("split_from_train", None)])
def test_the_split_that_dfr_was_fitted_on_is_marked(settings, strategy, marked):
    net, splits, config = problem(settings)
    splits.val = splits.dfr
    config = config.model_copy(update={"dfr_val_split_strategy": strategy})
    _, results = dfr.retrain(net, splits, config)
    assert results["fitted_on"] == marked
    lines = report.text(results, splits.group_names).splitlines()
    assert [line.split()[0] for line in lines if "(fitted on)" in line] == [marked] * bool(marked)
