"""TensorBoard shows what the tables say, every row once."""

import errno
import io
import json
import logging
import math
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import main as program
import plotting
from lab.config import loading, schema
from lab.config.registry import Figure as FigureRecord
from lab.figures import drawing
from lab.runs import trackers
from lab.system import files
from lab.system.command import Stopped
from lab.training import steps

SMALL = [
    "num_train_samples=200", "num_test_samples=60", "num_val_samples=40", "hidden_dim=8",
    "use_bias=true", "epochs=4", "checkpoint_every=2", "dfr_num_workers=1", "dfr_num_retrains=2",
    "wandb.enable=false", "tensorboard=true",
]  # fmt: skip
FULL_BATCH = ["train_batch_size=null", "learning_rate=0.1"]  # has `measured` rows
ALL = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0, "compressedHistograms": 0}


@pytest.fixture
def go(tmp_path, data_dir, capsys, monkeypatch):
    """go(argument, …) -> (exit code, stderr lines); one small figure instead of all."""
    small = FigureRecord("small", "…", code=lambda run: Figure(figsize=(1, 2)))
    monkeypatch.setattr(drawing, "FIGURES", {"small": small})
    (tmp_path / "c.yaml").write_text("experiment_name: small\n")

    def run(*arguments):
        if "--resume" not in arguments:
            fixed = [f"results_dir={tmp_path / 'results'}", f"data_dir={data_dir}"]
            names = {argument.split("=")[0] for argument in arguments}
            small = [a for a in SMALL if a.split("=")[0] not in names]
            arguments = ["--config", str(tmp_path / "c.yaml"), *fixed, *small, *arguments]
        code = program.main(list(arguments))
        return code, capsys.readouterr().err.splitlines()

    run.folder = lambda: next((tmp_path / "results").iterdir())
    return run


def events(folder):
    """What TensorBoard reads; there is one file, directly in the folder."""
    (path,) = (folder / "tensorboard").iterdir()
    assert path.is_file()
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance=ALL)
    found.purge_orphaned_data = False  # nothing is to be hidden
    return found.Reload()


def reported(folder):
    """{tag: {epoch: value}} of the finite numbers in the tables."""
    found = {}
    history = pd.read_csv(folder / "training_history.csv")
    for name in history.columns.drop("epoch"):
        found[name] = dict(zip(history.epoch, history[name]))
    for row in pd.read_csv(folder / "analysis.csv", keep_default_na=False).itertuples():
        name = "/".join(part for part in (row.analysis, row.split, row.pair, row.quantity) if part)
        found.setdefault(name, {})[row.epoch] = float(row.value)
    finite = {
        name: {epoch: np.float32(v) for epoch, v in values.items() if math.isfinite(v)}
        for name, values in found.items()
    }
    return {name: values for name, values in finite.items() if values}


def assert_shows_the_tables(folder, epochs=4):
    """Scalars, histograms, sample pictures and plots: all of them, every step once, in order."""
    found, expected = events(folder), reported(folder)
    tags = found.Tags()
    assert {tag for tag in tags["scalars"] if not tag.startswith("final/")} == set(expected)
    for tag, values in expected.items():
        shown = [(event.step, np.float32(event.value)) for event in found.Scalars(tag)]
        assert shown == list(values.items()), tag
    assert sorted(tags["histograms"]) == ["classifier/bias", "classifier/weight"]
    for tag in tags["histograms"]:
        assert [event.step for event in found.Histograms(tag)] == list(range(epochs + 1))
    plots = {f"plots/{path.stem}" for path in (folder / "plots").iterdir()}
    names = pd.read_csv(folder / "group_counts.csv").name.unique()
    assert set(tags["images"]) == plots | {f"samples/{name}" for name in names}
    for tag in tags["images"]:
        (event,) = found.Images(tag)
        assert event.step == (epochs if tag in plots else 0)
    return found


def picture(found, tag):
    (event,) = found.Images(tag)
    assert (event.width, event.height) == Image.open(io.BytesIO(event.encoded_image_string)).size
    return event.encoded_image_string


def hyperparameters(found):
    """The plugin's data by tag."""
    contents = found.summary_metadata
    tags = found.PluginTagToContent("hparams")
    assert all(contents[tag].plugin_data.plugin_name == "hparams" for tag in tags)
    return {tag: HParamsPluginData.FromString(content) for tag, content in tags.items()}


def test_a_run(go):
    code, _ = go()
    folder = go.folder()
    assert code == 0
    found = assert_shows_the_tables(folder)

    histogram = found.Histograms("classifier/weight")[-1].histogram_value
    model = torch.load(folder / "model.pt", weights_only=True)
    weight = model["layers.1.weight"].double()
    assert histogram.num == sum(histogram.bucket) == weight.numel() == 8
    assert (histogram.min, histogram.max) == (weight.min(), weight.max())
    assert histogram.sum == pytest.approx(weight.sum().item())
    assert found.Histograms("classifier/bias")[-1].histogram_value.sum == pytest.approx(
        model["layers.1.bias"].item()
    )

    plot = folder / "plots" / "small.png"
    assert picture(found, "plots/small") == plot.read_bytes()
    samples = np.load(folder / "samples.npz", allow_pickle=False)
    name = pd.read_csv(folder / "group_counts.csv").name[1]
    grid = np.array(Image.open(io.BytesIO(picture(found, f"samples/{name}"))))
    group = samples["pictures"][samples["group"] == 1]
    np.testing.assert_allclose(grid / 255, np.concatenate(group, axis=1), atol=1 / 255)

    data = hyperparameters(found)
    config = loading.load_config(folder / "config_used.yaml")
    shown = data["_hparams_/session_start_info"].session_start_info.hparams
    assert set(shown) == {name for name, _, _ in schema.fields()}
    assert shown["learning_rate"].number_value == config.learning_rate
    assert shown["use_dfr"].string_value == "true"
    assert shown["weight_decay"].number_value == 0
    assert shown["wandb.entity"].string_value == "null"
    assert shown["debias_method"].string_value == "None"
    summary = json.loads((folder / "status.json").read_text())["summary"]
    finite = {f"final/{name}": value for name, value in summary.items() if value is not None}
    assert "final/dfr_test_worst_acc" in finite
    metrics = data["_hparams_/experiment"].experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == set(finite)
    assert "_hparams_/session_end_info" in data
    for tag, value in finite.items():
        (event,) = found.Scalars(tag)
        assert (event.step, event.value) == (4, np.float32(value))


def stop_at(monkeypatch, owner, name, call):
    """A signal at the given call (from 1) of a function."""
    real, calls = getattr(owner, name), []

    def function(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            raise Stopped(signal.SIGTERM, torn=True)  # no checkpoint: the last one is epoch 2's
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("owner, name, call", [
    (steps.Steps, "train_epoch", 4),  # epoch 3 is recorded, and rewound
    (steps.Steps, "train_epoch", 2),  # before any checkpoint
    (program, "_learn", 1),
    (plotting, "draw", 1),
])  # fmt: skip
def test_a_resumed_run_shows_every_row_once(go, monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call)
        assert go(*FULL_BATCH)[0] == 143
    folder = go.folder()
    found = events(folder)
    if call == 4:
        assert [event.step for event in found.Scalars("train_avg_loss")] == [0, 1, 2, 3]
        before = {event.step: event.wall_time for event in found.Scalars("train_avg_loss")}
    assert set(hyperparameters(found)) == {"_hparams_/session_start_info"}
    assert go("--resume", str(folder))[0] == 0
    found = assert_shows_the_tables(folder)
    assert len(hyperparameters(found)) == 3
    if call == 4:
        after = {event.step: event.wall_time for event in found.Scalars("train_avg_loss")}
        assert [after[step] == before[step] for step in range(3)] == [True] * 3


def test_a_longer_run_and_one_that_begins_to_be_shown(go):
    assert go(*FULL_BATCH, "tensorboard=false")[0] == 0
    folder = go.folder()
    assert not (folder / "tensorboard").exists()
    assert go("--resume", str(folder), "tensorboard=true", "epochs=5")[0] == 0
    found = events(folder)
    assert [event.step for event in found.Scalars("train_avg_loss")] == list(range(6))
    assert go("--resume", str(folder), "epochs=6")[0] == 0
    found, expected = events(folder), reported(folder)
    for tag, values in expected.items():
        assert [event.step for event in found.Scalars(tag)] == list(values), tag
    assert [event.step for event in found.Histograms("classifier/bias")] == [5, 6]
    (event,) = found.Images("plots/small")
    assert event.step == 6


def test_two_files_of_a_run_that_was_killed_between_them_become_one(go):
    assert go()[0] == 0
    folder = go.folder()
    (path,) = (folder / "tensorboard").iterdir()
    (folder / "tensorboard" / "events.out.tfevents.0").write_bytes(path.read_bytes()[:-1])
    (folder / "tensorboard" / ".events.out-123").write_bytes(b"half")
    config = loading.load_config(folder / "config_used.yaml")
    tracker = trackers.start_tensorboard(config, folder)
    tracker.images(list((folder / "plots").iterdir()))
    tracker.finish({}, failed=False)
    assert_shows_the_tables(folder)


def test_a_run_that_diverges(go):
    code, _ = go("learning_rate=1e6", "loss_function=mse", "activation_function=identity")
    assert code == 2
    folder = go.folder()
    history = pd.read_csv(folder / "training_history.csv")
    assert not np.isfinite(history.train_avg_loss.iloc[-1])
    found, expected = events(folder), reported(folder)
    for tag, values in expected.items():
        assert [event.step for event in found.Scalars(tag)] == list(values), tag
    assert found.Images("plots/small")
    assert set(hyperparameters(found)) == {"_hparams_/session_start_info"}


def test_values_that_are_no_numbers(settings, tmp_path):
    tracker = trackers.start_tensorboard(settings(tensorboard=True), tmp_path)
    tracker.log(3, {"a": math.nan, "b": math.inf, "c": 1e300, "d": 2})
    nan = torch.tensor([math.nan, math.inf, 1.0, 3.4e38, -3.4e38])
    tracker.histograms(3, {"some": nan, "none": nan[:2]})
    tracker.finish({"x": math.nan, "y": 1.0}, failed=False)
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {"c", "d", "final/y"}
    assert found.Scalars("d")[0].value == 2
    assert found.Tags()["histograms"] == ["some"]
    assert found.Histograms("some")[0].histogram_value.num == 3


def test_settings_that_are_mappings(settings, tmp_path):
    shortcut = {"kind": "square", "position": "left_top", "size": 4}
    config = settings(
        tensorboard=True, dataset_name="SpuriousMNIST", loss_function="cross_entropy",
        spurious_features={"3": {"main": shortcut}},
    )  # fmt: skip
    trackers.start_tensorboard(config, tmp_path).finish({}, failed=False)
    data = hyperparameters(events(tmp_path))["_hparams_/session_start_info"]
    shown = data.session_start_info.hparams["spurious_features"].string_value
    assert json.loads(shown)["3"]["main"] == shortcut


def test_a_full_disk_gives_one_warning_and_the_run_goes_on(go, monkeypatch):
    real, calls = files.Growing.append, []

    def full(self, data):
        if "tfevents" in self.path.name:
            calls.append(None)
            if len(calls) > 8:
                raise files.StorageError(f"{self.path}: {errno.ENOSPC}")
        return real(self, data)

    monkeypatch.setattr(files.Growing, "append", full)
    code, lines = go()
    assert code == 0
    assert sum("TensorBoard stopped tracking" in line for line in lines) == 1
    assert len(calls) == 9
    monkeypatch.undo()


@pytest.mark.parametrize("content", [b"\xff" * 100, b"", None])
def test_it_can_never_stop_a_run_that_starts(settings, tmp_path, caplog, content):
    folder = tmp_path / "tensorboard"
    if content is None:
        folder.write_text("a file in its place")
    else:
        folder.mkdir()
        (folder / "events.out.tfevents.1").write_bytes(content)
    logger = logging.getLogger("spurious")
    logger.addHandler(caplog.handler)
    try:
        tracker = trackers.start_tensorboard(settings(tensorboard=True), tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert (tracker is None) == (content is None)
    assert len(caplog.messages) == (content is None)
    if tracker:
        tracker.finish({}, failed=True)
        assert events(tmp_path).Tags()["scalars"] == []


def test_svg_plots_are_not_shown(settings, tmp_path, caplog):
    tracker = trackers.start_tensorboard(settings(tensorboard=True), tmp_path)
    logger = logging.getLogger("spurious")
    logger.addHandler(caplog.handler)
    try:
        tracker.images([tmp_path / "plots" / "dfr.svg"])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == [
        "tensorboard: shows no SVG; plot_format: png has the plots there, too"
    ]
    tracker.finish({}, failed=False)
    assert events(tmp_path).Tags()["images"] == []


def test_it_is_imported_only_when_asked_for(settings, tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    assert trackers.start_tensorboard(settings(), tmp_path) is None
    assert not list(tmp_path.iterdir())
