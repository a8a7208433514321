"""The matrix of spurious pairs on a stand-in: planted pairs, batched heads, runs trained apart."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import data_loader
import plotting
import spurious_matrix
from benchmarks import celeba_standin
from lab.config import loading
from lab.data_sets.sources import celeba
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOGISTIC
from lab.features import extraction as feature_extractor
from lab.folders import creating
from lab.folders import status as run_status
from lab.matrix import figures as matrix_plots
from lab.matrix import heads as batched_heads
from lab.matrix import settings, tables, training
from lab.matrix.collecting import attributes_of
from lab.networks import building, picture_nets
from lab.training import loop

ROOT = Path(__file__).parents[2]
NAMES = [
    "Bangs", "Blond_Hair", "Chubby", "Big_Lips", "Eyeglasses", "Male", "Smiling", "Wearing_Hat",
]  # fmt: skip
PLANTED = {"Blond_Hair": ("Male", -1), "Big_Lips": ("Chubby", 1)}
N = 800
TABLES = (
    "group_accuracies.csv", "spurious_matrix.csv", "spurious_pairs.csv", "cosine_rows.csv",
    "cosine_directions.csv", "clusters.json",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def decoded_once():
    """Every picture is decoded once for all networks, and their own figures are not drawn."""
    kept, decode = {}, celeba.CelebA.decode

    def once(self, i, rng=None):
        key = (self.storage.path, self.side, int(i))
        if key not in kept:
            kept[key] = decode(self, i)
        return kept[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(celeba.CelebA, "decode", once)
        patch.setattr(plotting, "draw", lambda folder, **_: [])
        yield


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """(data folder, attributes (N, 8)) of a stand-in with two planted pairs."""
    folder = tmp_path_factory.mktemp("faces")
    return folder, celeba_standin.write(folder, N, NAMES, PLANTED)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Data folder of a stand-in with three attributes of other names."""
    folder = tmp_path_factory.mktemp("few")
    celeba_standin.write(folder, 120, ["one", "two", "three"], {"one": ("two", 1)})
    return folder


def keys(data, results, **changes):
    """Settings for a small ConvNet on all of a stand-in."""
    return {
        "dataset_name": "CelebA", "data_dir": str(data), "results_dir": str(results),
        "target_resolution": 16, "num_train_samples": None, "num_val_samples": None,
        "num_test_samples": None, "normalize_inputs": False, "model_name": "ConvNet",
        "latent_size": 16, "epochs": 3, "train_batch_size": 32, "learning_rate": 0.02,
        "momentum": 0.9, "show_and_save_samples": False, "wandb": {"enable": False},
        "analyses": "none",
    } | changes  # fmt: skip


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(matrix_plots, "draw", lambda folder, file_format: [])


def written(path, **keys) -> str:
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def result_of(capsys) -> Path:
    return Path(capsys.readouterr().out.splitlines()[-1].removeprefix("Results: "))


def same_tables(one: Path, other: Path) -> None:
    for name in TABLES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory):
    """(configuration file, folder) of the matrix of all networks, trained one after the other."""
    place = tmp_path_factory.mktemp("whole")
    file = written(place / "config.yaml", **keys(faces[0], place / "results"))
    assert spurious_matrix.main(["--config", file, "--k", "3", "--eps", "10"]) == 0
    (folder,) = (place / "results").iterdir()
    return file, folder


def test_planted_pairs_stand_out(whole):
    T = pd.read_csv(whole[1] / "spurious_matrix.csv", index_col="attribute")
    assert list(T.index) == list(T.columns) == NAMES
    planted = {(label, shortcut) for label, (shortcut, _) in PLANTED.items()}
    pairs = pd.read_csv(whole[1] / "spurious_pairs.csv")
    assert set(zip(pairs["task"][:2], pairs["attribute"][:2])) == planted
    assert (pairs["delta"].diff()[1:] <= 0).all()
    assert (pairs["delta"] > 10).all()
    weakest = min(T.loc[attribute, task] for task, attribute in planted)
    for task in NAMES:
        assert math.isnan(T.loc[task, task])
        for attribute in NAMES:
            if attribute != task and (task, attribute) not in planted:
                assert T.loc[attribute, task] < weakest / 2


def test_tables_and_figures_follow(whole):
    folder = whole[1]
    found = json.loads((folder / "clusters.json").read_text())
    assert (found["k"], found["eps"], found["gamma"]) == (3, 10, 0.9)
    partitions = [found["directions"]["clusters"]]
    for clusters in found["coclusters"].values():
        partitions += [[c[side] for c in clusters] for side in ("attributes", "tasks")]
    for clusters in partitions:
        assert len(clusters) == 3
        assert sorted(itertools.chain(*clusters)) == sorted(NAMES)
    T = pd.read_csv(folder / "spurious_matrix.csv", index_col="attribute").fillna(0).to_numpy()
    rows = pd.read_csv(folder / "cosine_rows.csv", index_col="attribute").to_numpy()
    size = len(NAMES)
    with np.errstate(invalid="ignore"):  # constant rows, whose entries are 0 in the table
        pearson = np.corrcoef(T, T.T)[:size, size:]  # of row i with column j
    np.testing.assert_allclose(rows, np.nan_to_num(pearson), atol=1e-12)
    squares = np.square(found["directions"]["singular_values"])
    d = found["directions"]["d"]
    assert squares[: d - 1].sum() < 0.9 * squares.sum() <= squares[:d].sum() + 1e-9
    figures = [
        "spurious_matrix", "delta_histogram", "coclusters_standardised", "coclusters_cosine",
        "cosine_directions", *(f"tasks/{name}" for name in NAMES),
    ]  # fmt: skip
    for name in figures:
        assert (folder / "plots" / f"{name}.png").stat().st_size > 1000
    status = run_status.read_status(folder)
    assert (status["state"], status["phase"]) == ("done", "done")


def test_accuracies_are_those_of_a_run_with_this_shortcut(whole):
    """The groups of a task with another attribute are those of the run `task:attribute`."""
    table = pd.read_csv(whole[1] / "group_accuracies.csv")
    (run,) = (whole[1] / "runs" / "Big_Lips").iterdir()
    used = loading.load_config(run / creating.CONFIG)
    for attribute in ("Chubby", "Male"):
        config = used.model_copy(update={"groupings": [f"Big_Lips:{attribute}"]})
        splits = data_loader.load(config)
        network = building.build_for(config, splits)
        network.load_state_dict(torch.load(run / "model.pt", weights_only=True))
        f = predictions.outputs(network, splits.val, 1000)
        summary = metrics.summary(f, splits.val, LOGISTIC, splits.train.shares)
        rows = table[(table["task"] == "Big_Lips") & (table["attribute"] == attribute)]
        assert rows["group"].tolist() == [0, 1, 2, 3]
        assert rows["count"].tolist() == splits.val.counts
        expected = [summary[f"group_{g}_acc"] for g in range(4)]
        assert rows["accuracy"].tolist() == pytest.approx(expected)


def test_tasks_trained_apart_and_collected(whole, tmp_path, capsys, monkeypatch, no_figures):
    """Two of them by --task, the others taken over, in the layout of a sweep."""
    file, folder = whole
    for number, name in enumerate(NAMES):
        place = tmp_path / "sweep" / "jobs" / f"{number:04d}"
        if number < 2:
            given = ["--config", file, "--task", name, f"results_dir={place}", "use_dfr=false"]
            assert spurious_matrix.main(given) == 0
            (mine,), (theirs,) = place.iterdir(), (folder / "runs" / name).iterdir()
            one, other = (torch.load(run / "model.pt", weights_only=True) for run in (mine, theirs))
            assert all(torch.equal(one[key], other[key]) for key in other)
        else:
            shutil.copytree(folder / "runs" / name, place)
    samples, forward = [], picture_nets.PictureNet.forward
    monkeypatch.setattr(
        picture_nets.PictureNet,
        "forward",
        lambda self, x: samples.append(len(x)) or forward(self, x),
    )
    capsys.readouterr()
    given = ["--collect", str(tmp_path / "sweep"), "--k", "3", "--eps", "10"]
    assert spurious_matrix.main(given) == 0
    collected = result_of(capsys)
    assert collected.parent == tmp_path / "sweep" / "spurious_matrix"
    same_tables(collected, folder)
    # One pass of each network: every validation face once, in the batches of an evaluation.
    assert sum(samples) == len(NAMES) * N // 5
    assert len(samples) == len(NAMES) * 4


def test_what_cannot_be_collected(whole, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(whole[1] / "runs", folder)
    (run,) = (folder / "Male").iterdir()
    given = ["--collect", str(folder), "--k", "3"]
    (run / creating.CONFIG).write_text(
        (run / creating.CONFIG).read_text().replace("epochs: 3\n", "epochs: 4\n")
    )
    assert spurious_matrix.main(given) == 2
    assert (
        "Male" in (reported := capsys.readouterr().err) and "epochs is 4, elsewhere 3" in reported
    )
    shutil.copytree(run, folder / "again")
    assert spurious_matrix.main(given) == 2
    assert "two finished runs of Male" in capsys.readouterr().err
    shutil.rmtree(folder / "Male")
    shutil.rmtree(folder / "again")
    assert spurious_matrix.main(given) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "no finished run of Male"
    assert spurious_matrix.main(["--collect", str(tmp_path / "none")]) == 2
    assert spurious_matrix.main(["--collect", str(whole[1] / "plots")]) == 2
    assert "no finished run of CelebA" in capsys.readouterr().err
    assert not (folder / "spurious_matrix").exists()


def interrupt(monkeypatch, owner, call: int) -> None:
    """SIGTERM at the call-th forward pass of a network."""
    calls, forward = [], owner.forward

    def counted(self, x):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x)

    monkeypatch.setattr(owner, "forward", counted)


def test_an_interrupted_matrix_goes_on(few, tmp_path, monkeypatch, capsys, no_figures):
    file = written(tmp_path / "config.yaml", **keys(few, tmp_path / "whole", epochs=1))
    given = ["--config", file, "--k", "2"]
    assert spurious_matrix.main(given) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    with monkeypatch.context() as patch:
        # A network's passes: 10 of one evaluation, 3 steps, 10 again; this is in the second.
        interrupt(patch, picture_nets.PictureNet, 40)
        code = spurious_matrix.main([*given, f"results_dir={tmp_path / 'parts'}"])
    assert code == 128 + signal.SIGTERM
    (parts,) = (tmp_path / "parts").iterdir()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python spurious_matrix.py --resume {parts}"
    )
    assert 0 < len(list((parts / "runs").iterdir())) < 3
    assert spurious_matrix.main(["--resume", str(parts)]) == 0
    same_tables(parts, whole)
    # Of what is finished only the tables and figures are made again, with other options too.
    assert spurious_matrix.main(["--resume", str(parts), "--gamma", "0.5"]) == 0
    assert json.loads((parts / "clusters.json").read_text())["gamma"] == 0.5


class FakeExtractor:
    """Features (N, 12) of CelebA's pictures: their attributes, mixed, and noise."""

    def __init__(self, config, device="cpu"):
        pass

    def extract(self, splits):
        def features(_, split):
            source, rng = split.inputs.source, np.random.default_rng(0)
            values = source.attributes @ rng.normal(size=(source.attributes.shape[1], 12))
            values += rng.normal(size=values.shape)
            found = torch.from_numpy(values[split.inputs.rows]).float()
            return dataclasses.replace(split, inputs=torch.nn.functional.normalize(found))

        return splits.changed(features)


FEATURES = {
    "use_feature_extractor": True, "target_resolution": 224, "model_name": "MLP", "hidden_dim": 16,
    "feature_extractor_weights": "random", "learning_rate": 0.5, "epochs": 4,
}  # fmt: skip


def heads_of(folder) -> dict:
    """{parameter: (K, …)} of the heads that were trained in a folder."""
    blocks = torch.load(folder / "heads.pt", weights_only=True)["blocks"]
    return {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.01, "scheduler": "cosine"},
        {"optimizer": "Adam", "learning_rate": 0.01, "use_bias": True, "num_hidden_layers": 2},
        {"fix_final_layer": True, "initialization_method": "NTP", "loss_function": "mse"},
        {"train_batch_size": 10_000},  # which alone is a full-batch step
    ],
)
def test_batched_heads_are_those_trained_one_by_one(
    faces, tmp_path, monkeypatch, fake_run, changes
):
    monkeypatch.setattr(feature_extractor, "Extractor", FakeExtractor)
    monkeypatch.setattr(batched_heads, "BLOCK_BYTES", 4 * 16 * 13 * 3)  # three heads of 13 inputs
    config = loading.validate(keys(faces[0], tmp_path, **(FEATURES | changes)))
    correct, counts = training.train_heads(config, NAMES, "cpu", tmp_path)
    heads = heads_of(tmp_path)
    for t, name in list(enumerate(NAMES))[1:5]:  # of two blocks
        own = settings.task_config(config, settings.grouping(NAMES, name))
        splits = data_loader.load(own)
        attributes = attributes_of(splits.val.inputs)
        splits = FakeExtractor(own).extract(splits)
        network = building.build_for(own, splits)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        loop.train(network, splits, own, fake_run)
        for key, value in network.state_dict().items():
            fixed = key == "layers.1.weight" and config.fix_final_layer
            assert torch.equal(value, before[key]) == fixed
            assert torch.allclose(heads[f"mlp.{key}"][t], value, rtol=1e-4, atol=1e-5)
        # The groups of every attribute, by a loop over them.
        right = metrics.correct(predictions.outputs(network, splits.val, 1000), splits.val.y)
        for a in range(len(NAMES)):
            group = 2 * (attributes[:, t] > 0) + (attributes[:, a] > 0)
            assert counts[t, a].tolist() == np.bincount(group, minlength=4).tolist()
            expected = np.bincount(group, weights=right.numpy(), minlength=4)
            # An output next to 0 may fall on the other side.
            assert np.abs(correct[t, a] - expected).sum() <= 2


def test_heads_end_to_end_in_one_pass_and_resumed(faces, tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.setattr(feature_extractor, "Extractor", FakeExtractor)
    changes = FEATURES | {"epochs": 15, "eval_batch_size": 64}
    file = written(tmp_path / "config.yaml", **keys(faces[0], tmp_path / "whole", **changes))
    given = ["--config", file, "--k", "3"]
    passes, forward = [], batched_heads.Heads.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            batched_heads.Heads, "forward", lambda self, x: passes.append(x) or forward(self, x)
        )
        assert spurious_matrix.main(given) == 0
    steps = 15 * math.ceil(480 / 32)
    assert [len(x) for x in passes[steps:]] == [64, 64, 32]  # of the validation faces, once
    (whole,) = (tmp_path / "whole").iterdir()
    with monkeypatch.context() as patch:
        interrupt(patch, batched_heads.Heads, 50)
        code = spurious_matrix.main([*given, f"results_dir={tmp_path / 'parts'}"])
    assert code == 128 + signal.SIGTERM
    (parts,) = (tmp_path / "parts").iterdir()
    state = torch.load(parts / "heads.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (3, 50 - 3 * 15)
    assert spurious_matrix.main(["--resume", str(parts)]) == 0
    same_tables(parts, whole)
    one, other = heads_of(parts), heads_of(whole)
    assert all(torch.equal(one[key], other[key]) for key in other)
    capsys.readouterr()
    # More epochs go on from the last; the checkpoint of other data is refused.
    assert spurious_matrix.main(["--resume", str(parts), "epochs=16"]) == 0
    assert torch.load(parts / "heads.pt", weights_only=True)["epoch"] == 16
    state["data"] = "other"
    torch.save(state, parts / "heads.pt")
    assert spurious_matrix.main(["--resume", str(parts), "epochs=17"]) == 2
    assert "not those of this run" in capsys.readouterr().err
    (parts / "heads.pt").write_bytes(b"damaged")
    assert spurious_matrix.main(["--resume", str(parts), "epochs=17"]) == 2
    assert "heads.pt: not readable" in capsys.readouterr().err


def test_heads_that_diverge_are_named(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_extractor, "Extractor", FakeExtractor)
    changes = FEATURES | {"learning_rate": 1e6, "loss_function": "mse", "epochs": 50}
    file = written(tmp_path / "config.yaml", **keys(faces[0], tmp_path, **changes))
    assert spurious_matrix.main(["--config", file, "--k", "3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert line.startswith("learning_rate: the network for Bangs is not finite at epoch")


def test_storage_orders_are_those_of_the_runs(faces, tmp_path):
    config = loading.validate(keys(*faces[:1], tmp_path))
    base = data_loader.load(settings.task_config(config, settings.grouping(NAMES, "Bangs")))
    rows = base.train.inputs.rows
    orders = training.storage_orders(rows, faces[1][rows])
    for order, name in zip(orders, NAMES):
        text = settings.grouping(NAMES, name)
        own = data_loader.load(settings.task_config(config, text))
        assert rows[order].tolist() == own.train.inputs.rows.tolist()


@pytest.mark.parametrize(
    "changes, reported",
    [
        ({"debias_method": "GroupDRO"}, "debias_method: given GroupDRO"),
        ({"remove_minority_groups_train": True}, "remove_minority_groups_train: given true"),
        ({"num_val_samples": 0}, "num_val_samples: given 0"),
        ({"celeba_splits": "drawn", "dfr_val_split_strategy": "target"}, "celeba_splits: given"),
        (FEATURES | {"train_batch_size": None}, "train_batch_size: given null"),
        (FEATURES | {"early_stopping_patience": 3}, "early_stopping_patience: given 3"),
        (FEATURES | {"loss_function": "cross_entropy"}, "loss_function: given 'cross_entropy'"),
    ],
)
def test_settings_that_cannot_be_compared(few, tmp_path, capsys, changes, reported):
    file = written(tmp_path / "config.yaml", **keys(few, tmp_path / "results", **changes))
    assert spurious_matrix.main(["--config", file, "--k", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(reported) and "allowed" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "given, reported",
    [
        ([], "--k: given 10; allowed: 2 to 3"),
        (["--k", "1"], "--k: given 1; allowed: 2 to the number of attributes"),
        (["--k", "2", "--eps", "-1"], "--eps: given -1; allowed: 0 to 200"),
        (["--k", "2", "--gamma", "nan"], "--gamma: given nan; allowed: above 0, up to 1"),
        (["--task", "tow"], "groupings: given tow, but "),
        (["--task", "one", "--resume", "x"], "command line: allowed: one of --task"),
        (["--resume", "x"], "--config: given "),
    ],
)
def test_wrong_commands(few, tmp_path, capsys, given, reported):
    file = written(tmp_path / "config.yaml", **keys(few, tmp_path / "results"))
    assert spurious_matrix.main(["--config", file, *given]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(reported)
    assert not (tmp_path / "results").exists()


def test_other_data_sets_are_refused(capsys):
    assert spurious_matrix.main(["--config", str(ROOT / "config.yaml")]) == 2
    assert "dataset_name: given ColoredMNIST; allowed here: CelebA" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["celeba", "celeba_features"])
def test_presets_can_be_run(name):
    config = loading.load_config(ROOT / "configs" / f"{name}_spurious_matrix.yaml")
    settings.check(config)
    # What a job of the sweep, which only sets the task, has to have from the file.
    assert all(getattr(config, key) == value for key, value in settings.OWN.items())


def test_the_sweep_has_a_job_for_every_attribute():
    sweep = yaml.safe_load((ROOT / "sweeps" / "celeba_spurious_train.yaml").read_text())
    assert sweep["config"] == "configs/celeba_spurious_matrix.yaml"
    assert sweep["seeds"] == 1 and set(sweep["grid"]) == {"groupings"}
    names = celeba_standin.NAMES
    wanted = [[settings.grouping(names, name)] for name in names]
    assert sweep["grid"]["groupings"] == wanted


def test_a_copy_of_an_attribute_is_listed_first(tmp_path, caplog):
    """Task A has B as an exact copy, and C as a strong shortcut; no sample measures δ of A by B."""
    copied, strong, weak = [50, 0, 0, 50], [40, 10, 10, 40], [25, 25, 25, 25]
    counts = np.array([[copied, copied, strong], [copied, copied, weak], [strong, weak, copied]])
    correct = np.where(counts == 10, 0, counts)
    tables.write_accuracies(tmp_path, ["A", "B", "C"], correct, counts)
    with caplog.at_level("INFO"):
        tables.write_deltas(tmp_path, 10)
    pairs = pd.read_csv(tmp_path / "spurious_pairs.csv", keep_default_na=False)
    assert pairs["copy"].tolist() == ["exact", "exact", "", ""]
    assert pairs["task"].tolist()[:2] == ["A", "B"] and set(pairs["task"][2:]) == {"A", "C"}
    assert "A: B is its exact copy" in caplog.text
    square = pd.read_csv(tmp_path / "spurious_matrix.csv", index_col="attribute").to_numpy()
    assert np.isnan(np.diag(square)).all() and np.isfinite(square).sum() == 6
