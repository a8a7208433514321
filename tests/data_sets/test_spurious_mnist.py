"""SpuriousMNIST: shortcuts pixel by pixel, counts, evaluation sets, the whole pipeline."""

import json
import signal
from decimal import Decimal

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from material import assert_equal, at_call, sent

import data_loader
import dfr as dfr_command
import main
from lab.config import strict_yaml
from lab.config.keys import Lines, NoShortcut, Square
from lab.config.loading import load_config, validate
from lab.data_sets import spurious_mnist
from lab.data_sets.sources import mnist
from lab.figures import drawing, pictures
from lab.folders import reading
from lab.system.errors import ConfigError, DataError

NO_ANALYSES = {"analyses": "none"}
CORNER = {"kind": "square", "position": "left_top", "size": 3}
OTHER = {"kind": "square", "position": "right_bottom", "size": 5}
LINES = {"kind": "lines", "orientation": "vertical", "distance": 7}
NONE = {"kind": "none"}
FEATURES = {
    3: {"main": CORNER, "minority": LINES, "probability": 0.9},
    8: {"main": OTHER, "probability": 0.75},
}


@pytest.fixture
def drawn(settings):
    """drawn(**keys) -> (configuration, splits) of a small SpuriousMNIST."""

    def load(**keys):
        small = NO_ANALYSES | {
            "dataset_name": "SpuriousMNIST",
            "labels": [3, 5, 8],
            "spurious_features": FEATURES,
            "loss_function": "cross_entropy",
            "normalize_inputs": False,
            "num_train_samples": 300,
            "num_val_samples": 60,
            "num_test_samples": 90,
        }
        config = settings(**small | keys)
        return config, data_loader.load(config)

    return load


def filled(splits, name):
    """{name of the group: count} of the groups of a split that are not empty."""
    counts = splits.named()[name].counts
    return {group: n for group, n in zip(splits.group_names, counts) if n}


# Drawing.


def naive(digit, shortcut):
    """A digit (28, 28) with its shortcut, one pixel after the other."""
    picture = digit.copy()
    for row in range(28):
        for column in range(28):
            if shortcut.kind == "square":
                left, top = shortcut.position.split("_")
                inside = (column if left == "left" else 27 - column) < shortcut.size
                if inside and (row if top == "top" else 27 - row) < shortcut.size:
                    picture[row, column] = 255
            elif shortcut.kind == "lines":
                place = row if shortcut.orientation == "horizontal" else column
                if place % shortcut.distance == 0 and digit[row, column] == 0:
                    picture[row, column] = 255
    return picture


SQUARES = [
    Square(kind="square", position=position, size=size)
    for position in ("left_top", "left_bottom", "right_top", "right_bottom")
    for size in (1, 3, 28)
]
ALL_LINES = [
    Lines(kind="lines", orientation=orientation, distance=distance)
    for orientation in ("horizontal", "vertical")
    for distance in (1, 7, 28)
]


def test_shortcuts_pixel_by_pixel(data_dir):
    digits = mnist.embedded(data_dir)[1].images[::250].copy()
    before, empty = digits.copy(), np.zeros((1, 28, 28), dtype=np.uint8)
    for shortcut in (*SQUARES, *ALL_LINES, NoShortcut(kind="none")):
        pictures = spurious_mnist.draw(digits, shortcut)
        assert pictures.dtype == np.uint8 and (digits == before).all()
        for digit, picture in zip(digits, pictures, strict=True):
            np.testing.assert_array_equal(picture, naive(digit, shortcut), str(shortcut))
        # The mask is what is drawn on an empty picture.
        np.testing.assert_array_equal(
            spurious_mnist.draw(empty, shortcut)[0] > 0, spurious_mnist.mask(shortcut)
        )


def test_names_distinguish_shortcuts():
    corners = [Square(kind="square", position="left_top", size=size) for size in (3, 5)]
    other = Square(kind="square", position="right_bottom", size=3)
    listed = [*corners, other, ALL_LINES[1], NoShortcut(kind="none")]
    assert spurious_mnist.names(listed) == [
        "square left top 3", "square left top 5", "square right bottom", "horizontal lines 7",
        "no shortcut",
    ]  # fmt: skip


# Groups and counts.


def test_groups_by_hand(drawn):
    _, splits = drawn(dfr_val_ratio=0.2)
    names = ["square left top", "square right bottom", "vertical lines 7", "no shortcut"]
    assert splits.group_names == [f"{label}, {name}" for label in (3, 5, 8) for name in names]
    assert splits.num_classes == 3 and len(splits.cells) == 12
    train = {
        "3, square left top": 72, "3, vertical lines 7": 8, "5, no shortcut": 80,
        "8, square right bottom": 60, "8, no shortcut": 20,
    }  # fmt: skip
    assert filled(splits, "train") == train
    test = {
        "3, square left top": 27, "3, vertical lines 7": 3, "5, no shortcut": 30,
        "8, square right bottom": 22, "8, no shortcut": 8,
    }  # fmt: skip
    assert filled(splits, "test") == test
    assert filled(splits, "val")["3, square left top"] == 18
    assert filled(splits, "opposite") == {
        "3, vertical lines 7": 27, "3, square left top": 3, "5, no shortcut": 30,
        "8, no shortcut": 22, "8, square right bottom": 8,
    }  # fmt: skip
    assert filled(splits, "clean") == {f"{label}, no shortcut": 30 for label in (3, 5, 8)}
    main = {"3, square left top": 30, "5, no shortcut": 30, "8, square right bottom": 30}
    assert filled(splits, "all_main") == filled(splits, "shortcut_only") == main
    # For retraining shortcut and label are independent.
    assert splits.dfr.counts == [5] * 12
    minority = dict(zip(splits.group_names, splits.train.minority))
    assert not any(minority[name] for name in main)
    assert minority["3, vertical lines 7"] and minority["8, no shortcut"]
    assert sum(minority.values()) == 9
    for g, name in enumerate(splits.group_names):
        found = splits.masks[g].numpy()
        assert found.any() == ("no shortcut" not in name)
        assert found[:3, :3].all() == ("left top" in name)


def test_29_of_100_for_a_probability_of_0_29(drawn):
    features = {3: {"main": CORNER, "probability": 0.29}, 8: {"main": OTHER, "probability": 0.57}}
    _, splits = drawn(
        labels=[3, 8], num_train_samples=200, dfr_reuse_train=True, spurious_features=features
    )
    assert filled(splits, "train")["3, square left top"] == 29
    assert filled(splits, "train")["8, square right bottom"] == 57
    assert int(100 * 0.29) == 28 and int(100 * 0.57) == 56  # what floats would give


@hypothesis.given(
    st.integers(0, 100_000), st.floats(0, 1) | st.integers(0, 10_000).map(lambda k: k / 10_000)
)
def test_counts_for_any_probability(n, probability):
    feature = validate(
        {"spurious_features": {3: {"main": CORNER, "minority": LINES, "probability": probability}}}
    ).spurious_features["3"]
    (main, count), (minority, rest) = spurious_mnist.shares(feature, n)
    assert (main.kind, minority.kind) == ("square", "lines")
    assert count + rest == n
    exact = n * Decimal(repr(probability))
    assert count <= exact < count + 1


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_random_probabilities(drawn, seed):
    rng = np.random.default_rng(seed)
    three, eight = rng.random(2).round(3).tolist()
    _, splits = drawn(
        labels=[8, 3],
        spurious_features={
            3: {"main": CORNER, "minority": OTHER, "probability": three},
            8: {"main": OTHER, "minority": CORNER, "probability": eight},
        },
        num_train_samples=211,
        dfr_val_ratio=0.0,
        use_dfr=False,
        seed=seed,
    )
    assert splits.group_names[0].startswith("8, ")
    for name, sizes in (("train", {8: 106, 3: 105}), ("test", {8: 45, 3: 45})):
        for label, own, other, p in ((3, "left top", "right bottom", three),
                                     (8, "right bottom", "left top", eight)):  # fmt: skip
            main = int(sizes[label] * Decimal(repr(p)))
            counts = filled(splits, name)
            assert counts.get(f"{label}, square {own}", 0) == main
            assert counts.get(f"{label}, square {other}", 0) == sizes[label] - main


def test_pictures_are_digits_of_their_label_with_the_shortcut_of_their_group(drawn, data_dir):
    config, splits = drawn()
    shortcuts = spurious_mnist.distinct_shortcuts(config.spurious_features)
    parts = dict(zip(("training", "test"), mnist.embedded(data_dir)))
    for name, split in splits.named().items():
        part = parts["training" if name in ("train", "val", "dfr") else "test"]
        pictures = (split.inputs[:, 0] * 255).round().byte().numpy()
        assert split.inputs.shape == (len(split), 1, 28, 28) and split.inputs.max() <= 1
        for g, ((y, a), members) in enumerate(zip(splits.cells, split.slices)):
            assert (split.y[members] == y).all() and (split.a[members] == a).all()
            of_label = part.images[part.labels == config.labels[y]]
            if name == "shortcut_only":
                of_label = np.zeros_like(of_label[:1])
            there = {naive(digit, shortcuts[a]).tobytes() for digit in of_label}
            assert all(picture.tobytes() in there for picture in pictures[members]), (name, g)


def digits_of(splits, name):
    """Bytes of the part of every picture that no shortcut covers, sorted."""
    free = ~splits.masks.any(0).numpy()
    return sorted(picture[0].numpy()[free].tobytes() for picture in splits.named()[name].inputs)


def test_evaluation_sets_share_digits_but_not_shortcuts(drawn):
    _, splits = drawn()
    digits = {name: digits_of(splits, name) for name in ("test", *splits.evaluation_sets)}
    assert digits["test"] == digits["opposite"] == digits["clean"] == digits["all_main"]
    assert set(digits["shortcut_only"]) == {np.zeros_like(splits.masks[0], np.float32)[
        ~splits.masks.any(0).numpy()].tobytes()}  # fmt: skip
    # Exchanged digit by digit: what has the main shortcut here has the minority's there.
    free = ~splits.masks.any(0).numpy()

    def of_group(name, group):
        members = splits.named()[name].slices[splits.group_names.index(group)]
        return {p[0].numpy()[free].tobytes() for p in splits.named()[name].inputs[members]}

    here = of_group("test", "3, square left top")
    assert here == of_group("opposite", "3, vertical lines 7")
    assert here.isdisjoint(of_group("opposite", "3, square left top"))
    for one, other in (("train", "dfr"), ("train", "val"), ("val", "dfr"), ("train", "test")):
        assert set(digits_of(splits, one)).isdisjoint(digits_of(splits, other))


def test_a_given_opposite_and_a_given_set_for_retraining(drawn):
    opposite = {5: {"main": OTHER, "minority": LINES, "probability": 0.5}}
    retraining = {
        label: {"main": CORNER, "minority": OTHER, "probability": 0.5} for label in (3, 5, 8)
    }
    keys = {"opposite_spurious_features": opposite, "dfr_spurious_features": retraining}
    _, splits = drawn(dfr_val_ratio=0.2, **keys)
    assert filled(splits, "opposite") == {
        "3, no shortcut": 30, "5, square right bottom": 15, "5, vertical lines 7": 15,
        "8, no shortcut": 30,
    }  # fmt: skip
    assert filled(splits, "dfr") == {
        f"{label}, square {corner}": 10
        for label in (3, 5, 8)
        for corner in ("left top", "right bottom")
    }


def test_an_empty_mapping_means_no_shortcuts(drawn):
    _, splits = drawn(opposite_spurious_features={}, dfr_spurious_features={})
    assert splits.evaluation_sets["opposite"].counts == splits.evaluation_sets["clean"].counts
    assert set(filled(splits, "dfr")) == set(filled(splits, "clean"))


def test_retraining_on_the_training_digits(drawn):
    _, splits = drawn(dfr_reuse_train=True)
    assert len(splits.train) == len(splits.dfr) == 300
    assert splits.dfr.counts == [25] * 12
    assert digits_of(splits, "train") == digits_of(splits, "dfr")


def test_shortcuts_without_digits_in_training(drawn):
    _, splits = drawn(only_spurious=True)
    for name in ("train", "val"):
        split = splits.named()[name]
        for g, members in enumerate(split.slices):
            assert (split.inputs[members, 0].bool() == splits.masks[g]).all()
    for name in ("test", "dfr", "clean"):
        assert splits.named()[name].inputs.flatten(1).any(1).all()


def test_by_default_every_label_has_a_shortcut_of_its_own(drawn):
    config, _ = drawn(labels=[7, 1, 4], spurious_features=None, use_dfr=False)
    assert list(config.spurious_features) == ["7", "1", "4"]
    mains = [feature.main for feature in config.spurious_features.values()]
    minorities = [feature.minority for feature in config.spurious_features.values()]
    assert len(set(mains)) == 3 and minorities == [mains[1], mains[2], mains[0]]
    assert all(feature.probability == 0.99 for feature in config.spurious_features.values())
    ten = validate(
        {"dataset_name": "SpuriousMNIST", "loss_function": "cross_entropy"} | NO_ANALYSES
    )
    shortcuts = spurious_mnist.distinct_shortcuts(ten.spurious_features)
    assert len({spurious_mnist.mask(s).tobytes() for s in shortcuts}) == 11
    # A configuration file that lists all keys gives the same again.
    again = validate(strict_yaml.parse(strict_yaml.dump(config.resolved()), "again"))
    assert again.resolved() == config.resolved() and again.ignored == config.ignored


def test_all_available_digits(drawn):
    _, splits = drawn(num_train_samples=900, num_val_samples=None, num_test_samples=None)
    assert [len(splits.test), len(splits.val)] == [300, 300]
    assert len(splits.train) + len(splits.dfr) == 900
    with pytest.raises(DataError, match=r"num_train_samples: 1300 samples need 434 digits 3"):
        drawn(num_train_samples=1300)


def test_the_same_seed_gives_the_same_data(drawn):
    found = [drawn(seed=seed)[1].fingerprint() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_inputs_of_unit_norm_and_pictures_to_look_at(drawn):
    _, splits = drawn(normalize_inputs=True)
    norms = splits.train.inputs.flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.ones(len(norms)))
    assert splits.evaluation_sets["clean"].inputs.isfinite().all()
    shown, counts = splits.samples, splits.train.counts
    assert shown["pictures"].shape[1:] == (28, 28, 1) and shown["pictures"].max() == 1
    assert set(shown["group"]) == {g for g, n in enumerate(counts) if n}


# The configuration.

SHORTCUT = (
    "allowed: {kind: square, position: …, size: …}, {kind: lines, orientation: …, distance: …}, "
    "{kind: none}"
)
NO_KEY = "but there is no such key"
ERRORS = [
    ("{3: {main: {kind: square, position: left_top, size: 29}}}",
     "spurious_features.3.main.size: given 29; allowed: a whole number from 1 to 28"),
    ("{3: {main: {kind: square, size: 3}}}",
     "spurious_features.3.main.position: not given; allowed: left_top, left_bottom, right_top, "
     "right_bottom"),
    ("{3: {main: {kind: lines, orientation: vertical}}}",
     "spurious_features.3.main.distance: not given; allowed: a whole number from 1 to 28"),
    ("{3: {main: {kind: lines, orientation: vertical, distance: 0}}}",
     "spurious_features.3.main.distance: given 0; allowed: a whole number from 1 to 28"),
    ("{3: {main: {kind: lines, orientation: vertical, distance: 7, size: 3}}}",
     f"spurious_features.3.main.size: given 3, {NO_KEY}"),
    ("{3: {main: {kind: none}, minority: {kind: none, size: 3}}}",
     f"spurious_features.3.minority.size: given 3, {NO_KEY}"),
    ("{3: {main: {kind: circle}}}",
     "spurious_features.3.main: given {'kind': 'circle'}; " + SHORTCUT),
    ("{3: {main: square}}", "spurious_features.3.main: given 'square' (text); " + SHORTCUT),
    ("{3: {}}", "spurious_features.3.main: not given; " + SHORTCUT),
    ("{3: {main: {kind: none}, probability: 1.5}}",
     "spurious_features.3.probability: given 1.5; allowed: a number from 0 to 1"),
    ("{3: {main: {kind: none}, share: 1}}", f"spurious_features.3.share: given 1, {NO_KEY}"),
    ("{3: 5}", "spurious_features.3: given 5; allowed: a mapping with main, minority, probability"),
    ("{10: {main: {kind: none}}}",
     "spurious_features.10: given {'main': {'kind': 'none'}}, " + NO_KEY),
    ("{3: {main: {kind: none}}, 4: {main: {kind: none}}}",
     "spurious_features: given for 4; allowed: the labels, 3, 8"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ERRORS, ids=[text for text, _ in ERRORS])
def test_errors_are_one_line(tmp_path, text, expected):
    in_file, as_override = tmp_path / "a.yaml", tmp_path / "b.yaml"
    own = "dataset_name: SpuriousMNIST\nloss_function: cross_entropy\nlabels: [3, 8]\n"
    in_file.write_text(f"{own}spurious_features: {text}")
    as_override.write_text(own)
    for path, overrides in ((in_file, []), (as_override, [f"spurious_features={text}"])):
        with pytest.raises(ConfigError) as error:
            load_config(path, overrides)
        assert list(error.value.problems) == [expected]


def test_labels_may_be_numbers_or_text_and_overridden_one_by_one(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("spurious_features: {3: {main: {kind: none}}, '8': {main: {kind: none}}}")
    config = load_config(path, ["spurious_features.3.probability=0.5"])
    assert config.spurious_features["3"].probability == 0.5
    assert config.spurious_features["8"].probability == 1.0
    assert validate({"spurious_features": {8: {"main": NONE}}}).spurious_features["8"].main.kind


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"labels": [3, 3]}, "labels: given [3, 3]; allowed: a list of 2 to 10 different digits"),
        ({"labels": [3]}, "labels: given [3]; allowed: a list of 2 to 10 different digits"),
        (
            {"loss_function": "logistic"},
            "loss_function: given logistic, but the labels of SpuriousMNIST are classes here; "
            "allowed: cross_entropy",
        ),
        (
            {"dfr_val_split_strategy": "target"},
            "dfr_val_split_strategy: given target, but SpuriousMNIST has no target set; allowed: "
            "split_from_train",
        ),
        (
            {"dfr_val_ratio": 0.0},
            "dfr_val_ratio: given 0, which leaves DFR no data; allowed: above 0, below 1",
        ),
        (
            {"debias_method": "SCALE", "optimizer": "SGD"},
            "debias_method: given SCALE, which trains on a target set, but SpuriousMNIST has none",
        ),
    ],
)
def test_combinations(keys, expected):
    given = NO_ANALYSES | {"dataset_name": "SpuriousMNIST", "loss_function": "cross_entropy"} | keys
    with pytest.raises(ConfigError) as error:
        validate(given)
    assert list(error.value.problems) == [expected]


def test_keys_without_effect():
    given = {"labels": [1, 2], "only_spurious": True, "dfr_reuse_train": True}
    (line,) = validate(given).ignored
    assert line == "labels, only_spurious, dfr_reuse_train (only for SpuriousMNIST)"
    # Also without DFR its shortcuts have groups, and retraining takes them later.
    given = {"dataset_name": "SpuriousMNIST", "loss_function": "cross_entropy", "use_dfr": False}
    assert not validate(NO_ANALYSES | given | {"dfr_spurious_features": {}}).ignored
    given = NO_ANALYSES | {"dataset_name": "SpuriousMNIST", "loss_function": "cross_entropy"}
    given |= {"dfr_reuse_train": True, "dfr_val_ratio": 0.1, "use_grayscale": True}
    assert validate(given | {"train_correlation": 0.5}).ignored == (
        "train_correlation (only for ColoredMNIST, Dominoes)",
        "use_grayscale (only for ColoredMNIST, WaterBirds, Dominoes, CelebA)",
        "dfr_val_ratio (with dfr_reuse_train nothing is set aside)",
    )


# The whole pipeline.

SMALL = {
    "dataset_name": "SpuriousMNIST", "loss_function": "cross_entropy", "model_name": "ConvNet",
    "latent_size": 8, "labels": "[3, 8]", "num_train_samples": 100, "num_val_samples": 20,
    "num_test_samples": 40, "normalize_inputs": "false", "optimizer": "Adam",
    "learning_rate": 0.003, "train_batch_size": 20, "epochs": 3, "checkpoint_every": 1,
    "spurious_features": json.dumps(
        {3: {"main": CORNER, "minority": OTHER, "probability": 0.9},
         8: {"main": OTHER, "minority": CORNER, "probability": 0.9}}
    ),
    "dfr_c_options": "[1.0]", "dfr_num_retrains": 2, "dfr_num_workers": 1,
    "wandb.enable": "false", "analyses": "none",
}  # fmt: skip


@pytest.fixture
def go(tmp_path, data_dir, capsys, monkeypatch):
    """go(results, key=value, …) -> (exit code, folder, stderr lines)."""
    names = ("evaluation_sets", "samples", "dfr")
    monkeypatch.setattr(drawing, "FIGURES", {name: drawing.FIGURES[name] for name in names})

    def run(results, **keys):
        given = SMALL | {"data_dir": data_dir, "results_dir": tmp_path / results} | keys
        code = main.main([f"{key}={value}" for key, value in given.items()])
        folders = list((tmp_path / results).glob("*"))
        return code, folders[0] if folders else None, capsys.readouterr().err.splitlines()

    return run


def test_from_the_digits_to_the_figures(go):
    code, folder, lines = go("whole")
    assert code == 0
    history = pd.read_csv(folder / "training_history.csv")
    results = json.loads((folder / "dfr_results.json").read_text())
    for name in ("test", "opposite", "clean", "all_main", "shortcut_only"):
        assert history[f"{name}_worst_acc"].between(0, 1).all()
        assert set(results["after"][name]) == set(results["before"][name])
        assert results["before"][name]["avg_acc"] == history[f"{name}_avg_acc"].iloc[-1]
        if name != "test":
            accuracy = f"{history[f'{name}_worst_acc'].iloc[-1]:.3f}"
            assert any(f"on {name}: worst group {accuracy}" in line for line in lines)
    counts = pd.read_csv(folder / "group_counts.csv")
    assert len(counts) == 8 * 6
    assert any("shortcut_only     40 in 2 of 6 groups" in line for line in lines)
    assert {path.stem for path in (folder / "plots").iterdir()} == {*drawing.FIGURES}
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    assert best["score"] == history["val_minority_acc"].max()
    run = reading.read_run(folder)
    texts = [ax.get_ylabel() for ax in pictures.samples(run).axes if ax.get_ylabel()]
    assert texts == [
        f"{label},\nsquare {corner}" for label in (3, 8) for corner in ("left top", "right bottom")
    ]


def test_without_a_minority_the_best_epoch_has_the_best_worst_group(go):
    features = {3: {"main": CORNER}, 8: {"main": OTHER}}
    code, folder, _ = go("all", spurious_features=json.dumps(features), dfr_network="best")
    assert code == 0
    history = pd.read_csv(folder / "training_history.csv")
    assert history["val_minority_acc"].isna().all()
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    trained = history[history.epoch > 0]
    assert trained["val_worst_acc"][best["epoch"]] == trained["val_worst_acc"].max()


@pytest.mark.parametrize("keys", [{}, {"debias_method": "GroupDRO", "model_name": "MLP"}], ids=str)
def test_resumed_in_the_middle_of_an_epoch(go, monkeypatch, keys):
    code, reference, _ = go("whole", group_batches="mini", **keys)
    assert code == 0
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.AdamW, "step", 6, sent(signal.SIGTERM))
        code, folder, _ = go("stopped", group_batches="mini", **keys)
    assert code == 143
    assert main.main(["--resume", str(folder)]) == 0
    assert_equal(folder, reference)


def test_retraining_again_takes_no_other_data(go, capsys):
    _, folder, _ = go("whole", epochs=1)
    assert dfr_command.main(["--run", str(folder), "dfr_reg=l2"]) == 0
    capsys.readouterr()
    assert dfr_command.main(["--run", str(folder), "dfr_reuse_train=true"]) == 2
    assert "dfr_reuse_train=true: allowed: keys of DFR, but not" in capsys.readouterr().err


def test_the_shortcut_is_learnt_instead_of_the_digit(go, monkeypatch):
    """What the data set is for, in seconds: right by the shortcut, wrong against it."""
    monkeypatch.setattr(drawing, "FIGURES", {})
    features = {
        3: {"main": CORNER, "minority": OTHER, "probability": 0.99},
        8: {"main": OTHER, "minority": CORNER, "probability": 0.99},
    }
    code, folder, _ = go(
        "effect",
        spurious_features=json.dumps(features),
        num_train_samples=300,
        epochs=4,
        latent_size=64,
        learning_rate=0.001,
        use_dfr="false",
    )
    assert code == 0
    last = pd.read_csv(folder / "training_history.csv").iloc[-1]
    assert last["all_main_worst_acc"] > 0.95 and last["shortcut_only_worst_acc"] == 1.0
    assert last["opposite_avg_acc"] < 0.5
    assert last["opposite_worst_acc"] < 0.2
