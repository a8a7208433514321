"""Retraining the last layer by gradient descent, against training the whole, frozen network."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from helpers import in_float64, make_split, make_splits, many_groups

import dfr as dfr_command
import main
from lab.config import loading
from lab.config.seeds import derive_seed
from lab.evaluation import metrics
from lab.figures import drawing
from lab.networks import building
from lab.retraining import descent, dfr
from lab.retraining.head import load_head
from lab.retraining.subsets import fifths
from lab.splits.splits import Splits
from lab.system.errors import ConfigError, DataError, UserError

SGD = {"dfr_solver": "sgd", "dfr_sgd_epochs": 6, "dfr_sgd_batch_size": 7}
NO_ANALYSES = {"analyses": "none"}


def pictures_of_three_classes(counts, seed):
    split = many_groups(counts, num_attributes=2)
    noise = torch.randn(len(split), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    noise[:, 0, 0, 0] += split.y
    split.inputs = noise.double()
    return split


def problem(settings, **keys):
    """(network, splits, configuration) in float64; three classes with cross entropy."""
    config = settings(**SGD | NO_ANALYSES | {"hidden_dim": 6, "latent_size": 5} | keys)
    if config.loss_function == "cross_entropy":
        cells = tuple((y, a) for y in range(3) for a in range(2))
        counts = {
            "train": (9, 2, 8, 3, 2, 9),
            "test": (3, 0, 3, 3, 3, 3),
            "dfr": (15, 6, 9, 5, 7, 4),
        }
        made = {n: pictures_of_three_classes(c, i) for i, (n, c) in enumerate(counts.items())}
        splits = Splits(**made, group_names=list("abcdef"), cells=cells, num_classes=3)
    else:
        splits = make_splits(train=(20, 5, 5, 20), shape=(3, 8, 8))
        splits.dfr = make_split((20, 8, 9, 24), shape=(3, 8, 8), seed=9)
        splits = in_float64(splits)
    return building.build_for(config, splits).double(), splits, config


def trained_whole(net, splits, config):
    """The twin: the body frozen and in evaluation mode, the new last layer trained end to end."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    net.classifier = building.fresh_classifier(net, config, "dfr", "sgd", "classifier")
    mean, scale = 0.0, 1.0
    if config.dfr_standardize:
        h = net.hidden(splits.train.inputs)
        mean, scale = h.mean(0), h.std(0, correction=0)
        scale[scale == 0] = 1

    def outputs(x):
        return net.classifier((net.hidden(x) - mean) / scale).squeeze(1)

    source, loss = splits.dfr, config.loss.load().value
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "sgd", "split"))
    members = [rng.permutation(np.arange(s.start, s.stop)) for s in source.slices]
    held, fitting, number = [], [], 0
    for rows in members:
        n = sum(i % 5 == 4 for i in range(number, number + len(rows)))
        number += len(rows)
        held.append(rows[len(rows) - n :])
        fitting.append(rows[: len(rows) - n])
    optimizer = torch.optim.Adam(net.classifier.parameters(), lr=config.dfr_sgd_learning_rate)
    states, scores = [], []
    for epoch in range(1, config.dfr_sgd_epochs + 1):
        rng = np.random.default_rng(derive_seed(config.seed, "dfr", "sgd", "epoch", epoch))
        rows = np.sort(np.concatenate(fitting))
        if config.dfr_balance:
            smallest = min(map(len, fitting))
            rows = np.sort(np.concatenate([rng.permutation(r)[:smallest] for r in fitting]))
        rows = rng.permutation(rows)
        for start in range(0, len(rows), config.dfr_sgd_batch_size):
            batch = torch.from_numpy(rows[start : start + config.dfr_sgd_batch_size])
            optimizer.zero_grad()
            loss(outputs(source.inputs[batch]), source.y[batch]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses = loss(outputs(source.inputs), source.y)
        each = [losses[torch.from_numpy(rows)] for rows in held if len(rows)]
        score = sum(g.mean() for g in each) / len(each) if config.dfr_balance else torch.cat(each)
        scores.append(score.mean().item())
        states.append(copy.deepcopy(net.classifier.state_dict()))
    net.classifier.load_state_dict(states[int(np.argmin(scores))])
    return outputs, scores


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {"use_bias": True, "use_zero_bias_initialization": False},
        {"initialization_method": "NTP", "loss_function": "mse", "dfr_standardize": False},
        {"model_name": "ConvNet", "loss_function": "cross_entropy"},
        {"model_name": "ConvNet", "fix_final_layer": True, "dfr_standardize": False},
        {"model_name": "ResNet18", "dfr_sgd_epochs": 1, "dfr_sgd_batch_size": 30},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_cached_features_do_what_the_whole_frozen_network_does(settings, keys, balance):
    net, splits, config = problem(settings, **keys, dfr_balance=balance)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    head, results = dfr.retrain(net, splits, config)
    # Nothing of the network is touched, batch norm's statistics included.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    outputs, scores = trained_whole(net, splits, config)
    found = [row["val_loss"] for row in results["epochs"]]
    assert found == pytest.approx(scores, rel=1e-6)
    assert results["best_epoch"] == np.argmin(scores) + 1
    with torch.no_grad():
        expected = outputs(splits.test.inputs)
    h = np.concatenate(list(dfr.feature_batches(net, splits.test, config)))
    torch.testing.assert_close(head.outputs(h), expected, rtol=1e-5, atol=1e-6)
    loss = config.loss.load()
    summary = metrics.summary(expected, splits.test, loss, splits.train.shares)
    assert results["after"]["test"] == pytest.approx(summary, rel=1e-5, nan_ok=True)
    one_layer = head.linear()
    assert one_layer.weight.dtype == torch.float32
    f = one_layer(torch.from_numpy(h).float()).squeeze(1).double()
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-4)


def test_gradient_descent_finds_the_least_squares_solution(settings):
    net, _, config = problem(
        settings, loss_function="mse", dfr_balance=False, dfr_standardize=False
    )
    config = config.model_copy(
        update={"dfr_sgd_epochs": 600, "dfr_sgd_patience": None, "dfr_sgd_batch_size": 1000,
                "dfr_sgd_learning_rate": 0.05}
    )  # fmt: skip
    h = np.random.default_rng(0).normal(size=(61, 6))
    features = make_split((20, 8, 9, 24))
    features.inputs = torch.from_numpy(h)
    layer = building.fresh_classifier(net, config, "anything")
    # What is held out is what is trained on, so that the last epochs are the best.
    members = [np.arange(part.start, part.stop) for part in features.slices]
    history = descent.train(layer, features, lambda _: np.arange(61), members, config)
    assert len(history) == 600
    expected, residual, *_ = np.linalg.lstsq(h, features.y.numpy(), rcond=None)
    weight, bias = layer.effective()
    np.testing.assert_allclose(weight.detach()[0], expected, rtol=1e-3, atol=1e-4)
    assert bias.tolist() == [0] and residual[0] / 61 == pytest.approx(history[-1]["val_loss"])


def test_patience_and_the_best_epoch(settings):
    keys = {"dfr_sgd_learning_rate": 0.5, "dfr_sgd_epochs": 300, "dfr_sgd_patience": 4}
    net, splits, config = problem(settings)
    config = config.model_copy(update=keys)
    head, results = dfr.retrain(net, splits, config)
    losses = [row["val_loss"] for row in results["epochs"]]
    assert [row["epoch"] for row in results["epochs"]] == list(range(1, len(losses) + 1))
    best = results["best_epoch"]
    assert losses.index(min(losses)) == best - 1
    assert len(losses) == best + 4 < 300
    stopped_there = config.model_copy(update={"dfr_sgd_epochs": best})
    again, _ = dfr.retrain(net, splits, stopped_there)
    np.testing.assert_array_equal(head.coefficients, again.coefficients)
    endless = config.model_copy(update={"dfr_sgd_epochs": best + 9, "dfr_sgd_patience": None})
    _, results = dfr.retrain(net, splits, endless)
    assert len(results["epochs"]) == best + 9


@pytest.mark.parametrize("balance", [True, False])
def test_a_fifth_is_held_out_and_epochs_are_balanced(settings, monkeypatch, balance):
    seen = {}

    def train(layer, features, epoch_rows, held_out, config):
        seen["epochs"] = [epoch_rows(np.random.default_rng(i)) for i in range(30)]
        seen["held_out"] = held_out
        return [{"epoch": 1, "val_loss": 1.0}]

    monkeypatch.setattr(descent, "train", train)
    net, splits, config = problem(settings, dfr_balance=balance)
    results = dfr.retrain(net, splits, config)[1]
    group = splits.dfr.group.numpy()
    assert [len(rows) for rows in seen["held_out"]] == [4, 1, 2, 5]
    assert all((group[rows] == g).all() for g, rows in enumerate(seen["held_out"]))
    trained_on = [set(rows.tolist()) for rows in seen["epochs"]]
    left = set(range(61)) - set(np.concatenate(seen["held_out"]).tolist())
    assert set.union(*trained_on) == left
    for rows in seen["epochs"]:
        assert np.bincount(group[rows]).tolist() == ([7] * 4 if balance else [16, 7, 7, 19])
    assert results["num_samples"] == (28 if balance else 49)
    assert results["samples_per_group"] == (7 if balance else None)


def test_a_new_layer_depends_on_seed_and_purpose_only(settings):
    for keys in ({"use_bias": True}, {"model_name": "ConvNet"}):
        net, _, config = problem(settings, **keys)
        state = torch.get_rng_state()
        one, same, other = (
            building.fresh_classifier(net, config, purpose) for purpose in ("a", "a", "b")
        )
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(one.weight, same.weight) and one.weight.dtype == torch.float64
        assert not torch.equal(one.weight, other.weight)
        assert not torch.equal(one.weight, net.classifier.weight)


def test_too_few_data_are_reported_before_training():
    splits = make_splits()
    splits.dfr = make_split((1, 1, 1, 1))
    dfr.check(splits)
    with pytest.raises(DataError, match=r"dfr_solver: sgd holds out a fifth .* 4 samples are too"):
        dfr.check(splits, "sgd")
    splits.dfr = make_split((1, 1, 1, 2))
    dfr.check(splits, "sgd")


def test_a_fifth_of_small_groups():
    assert fifths([5, 0, 10, 4]) == [1, 0, 2, 0]
    assert fifths([4] * 10) == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert fifths([1] * 10) == [0, 0, 0, 0, 1] * 2
    assert fifths([0, 4, 1, 3, 2]) == [0, 0, 1, 0, 1]


def test_groups_that_are_empty_or_tiny(settings):
    net, splits, config = problem(settings)
    splits.dfr = in_float64(make_splits(train=(9, 0, 1, 30), shape=(3, 8, 8))).train
    _, results = dfr.retrain(net, splits, config)
    assert results["num_samples"] == 16 and results["samples_per_group"] == 8


def test_a_learning_rate_that_is_too_large_is_reported(settings):
    net, splits, config = problem(settings, loss_function="mse")
    config = config.model_copy(update={"dfr_sgd_learning_rate": 1e200})
    with pytest.raises(UserError, match=r"dfr_sgd_learning_rate: given 1e\+200, .*; lower it"):
        dfr.retrain(net, splits, config)


def test_what_the_configuration_says_of_the_solver():
    with pytest.raises(ConfigError, match="dfr_target_layer: given layer_0, but dfr_solver: sgd"):
        loading.validate({"dfr_solver": "sgd", "dfr_target_layer": "layer_0"})
    given = {"dfr_reg": "l2", "dfr_num_retrains": 3, "dfr_sgd_patience": None}
    assert loading.validate(given).ignored == ("dfr_sgd_patience (only for dfr_solver: sgd)",)
    assert loading.validate(given | {"dfr_solver": "sgd"}).ignored == (
        "dfr_reg, dfr_num_retrains (only for dfr_solver: sklearn)",
    )
    off = loading.validate({"dfr_solver": "sgd", "use_dfr": False, "dfr_sgd_epochs": 3})
    assert off.ignored == (
        "dfr_solver (without use_dfr)", "dfr_sgd_epochs (only for dfr_solver: sgd)",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(data_dir, tmp_path_factory):
    """A run on 400 coloured digits whose DFR was done by gradient descent."""
    results = tmp_path_factory.mktemp("results")
    keys = {"num_train_samples": 400, "num_test_samples": 200, "hidden_dim": 16, "epochs": 2,
            "data_dir": data_dir, "results_dir": results, "dfr_num_workers": 1,
            "dfr_solver": "sgd", "dfr_sgd_epochs": 20, "wandb.enable": "false",
            "dfr_num_retrains": 3,
            "analyses": "none"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "FIGURES", {"dfr": drawing.FIGURES["dfr"]})
        assert main.main([f"{key}={value}" for key, value in keys.items()]) == 0
    (folder,) = results.iterdir()
    return folder


def test_a_run_and_its_files(run_folder):
    results = json.loads((run_folder / "dfr_results.json").read_text())
    assert results["solver"] == "sgd" and len(results["epochs"]) <= 20
    text = (run_folder / "dfr_results.txt").read_text()
    assert "gradient descent on" in text and "worst-group accuracy" in text
    assert (run_folder / "plots" / "dfr.png").exists()
    head = load_head(run_folder / "dfr_model.npz")
    assert head.coefficients.shape == (16,)


def test_both_solvers_in_one_table(run_folder, capsys):
    assert dfr_command.main(["--run", str(run_folder), "--compare"]) == 0
    (place,) = (run_folder / "dfr").iterdir()
    assert capsys.readouterr().out.strip() == f"Results: {place}"
    with open(place / "dfr_comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [(row["split"], row["quantity"]) for row in rows]
    assert cells == [(s, q) for s in ("train", "test") for q in ("avg_acc", "worst_acc")]
    own = json.loads((run_folder / "dfr_results.json").read_text())
    each = {s: json.loads((place / s / "dfr_results.json").read_text()) for s in dfr.SOLVERS}
    assert each["sgd"] == own  # what the run itself has done
    assert each["sklearn"]["solver"] == "sklearn"
    for row in rows:
        cell = row["split"], row["quantity"]
        assert float(row["before"]) == own["before"][cell[0]][cell[1]]
        for solver, found in each.items():
            assert float(row[solver]) == found["after"][cell[0]][cell[1]]
    text = (place / "dfr_comparison.txt").read_text().splitlines()
    assert text[0].split() == ["train", "before", "sklearn", "sgd"]
    assert text[6] == "worst-group accuracy" + " " * 4 + "".join(
        f"{float(rows[3][column]):>10.4f}" for column in ("before", "sklearn", "sgd")
    )
    assert (
        dfr_command.main(["--run", str(run_folder), "--compare", "dfr_target_layer=layer_0"]) == 2
    )
    assert "dfr_target_layer" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, code, expected", [
    (["dfr_reg=l2"], 0, "Given, but without effect here: dfr_reg (only for dfr_solver: sklearn)"),
    (["--compare", "dfr_solver=sgd"], 2, "dfr_solver: given with --compare, which takes sklearn"),
    (["dfr_spurious_features.3.probability=1"], 2, "allowed: keys of DFR, but not"),
])  # fmt: skip
def test_settings_that_do_not_count(run_folder, capsys, arguments, code, expected):
    assert dfr_command.main(["--run", str(run_folder), *arguments]) == code
    assert expected in capsys.readouterr().err
