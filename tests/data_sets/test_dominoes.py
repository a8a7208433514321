"""Dominoes: pairing, counts, splits that share no picture and no digit, errors for people."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from material import write_cifar10

import data_loader
import main
from lab.config import loading, rules
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.data_sets import dominoes
from lab.data_sets.sources import cifar10, mnist
from lab.features import extraction as feature_extractor
from lab.splits import groups
from lab.system.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs"

TRAIN, TEST, DIGITS, TEST_DIGITS = 100, 30, 130, 34  # of each class


def unique(n, shape, seed):
    """Small random pictures, no two of them alike."""
    made = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    assert len({row.tobytes() for row in made}) == n
    return made


def made_pictures(per_class, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), per_class))
    return cifar10.Images(unique(len(labels), (3, 32, 32), seed), labels.astype(np.uint8))


def made_digits(per_class, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), per_class))
    return mnist.Digits(unique(len(labels), (28, 28), seed), labels.astype(np.uint8))


@pytest.fixture(scope="module")
def sources():
    pictures = made_pictures(TRAIN, 1), made_pictures(TEST, 2)
    return pictures, (made_digits(DIGITS, 3), made_digits(TEST_DIGITS, 4))


@pytest.fixture
def load(settings, sources, monkeypatch):
    """load(**keys) -> the splits of small made-up sources."""
    pictures, digits = sources

    def few(data_dir, classes, workers):
        wanted = [cifar10.CLASSES.index(name) for name in classes]
        rows = [np.isin(part.labels, wanted) for part in pictures]
        kept = [cifar10.Images(p.images[r], p.labels[r]) for p, r in zip(pictures, rows)]
        return *kept, "made up"

    monkeypatch.setattr(cifar10, "load", few)
    monkeypatch.setattr(mnist, "load", lambda *_: digits)

    def make(**keys):
        small = {"num_train_samples": None, "num_test_samples": None, "val_target_size": 80}
        return data_loader.load(settings(dataset_name="Dominoes", **small | keys))

    return make


NO_ANALYSES = {"analyses": "none"}
TEN = {"dominoes_classes": "ten", "loss_function": "cross_entropy", **NO_ANALYSES}


def kinds(part):
    """{bytes of a picture or digit: its label}"""
    return {image.tobytes(): int(label) for image, label in zip(*part)}


def contents(split):
    """Bytes of the digits and of the pictures of a split."""
    inputs = split.inputs
    return [[row.numpy().tobytes() for row in part] for part in (inputs.digits, inputs.pictures)]


def check_labels_and_disjointness(splits, sources, digits_twice=False):
    pictures, digits = sources
    picture_kinds, digit_kinds = (kinds(p[0]) | kinds(p[1]) for p in (pictures, digits))
    seen_pictures, seen_digits = [], []
    for name, split in splits.named().items():
        its_digits, its_pictures = contents(split)
        cells = [splits.cells[g] for g in split.group.tolist()]
        assert [(int(y), int(a)) for y, a in zip(split.y, split.a)] == cells
        binary = splits.num_classes == 2
        for (y, a), digit, picture in zip(cells, its_digits, its_pictures):
            assert digit_kinds[digit] == (a > 0 if binary else a)
            assert picture_kinds[picture] == ((1, 9)[y > 0] if binary else y)
        part = int(name == "test")
        assert set(its_pictures) <= set(kinds(pictures[part]))
        assert set(its_digits) <= set(kinds(digits[part]))
        assert len(set(its_pictures)) == len(its_pictures)
        seen_pictures.append(set(its_pictures))
        seen_digits.append(set(its_digits))
        if not digits_twice:
            assert len(set(its_digits)) == len(its_digits)
    for seen in (seen_pictures, seen_digits):
        assert len(set.union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.95, 1.0])
def test_ten_classes(load, sources, strength):
    splits = load(spurious_strength=strength, dfr_val_ratio=0, use_dfr=False, **TEN)
    assert splits.num_classes == 10 and len(splits.cells) == 100
    assert splits.group_names[1 * 10 + 3] == "automobile, 3"
    check_labels_and_disjointness(splits, sources)
    train = splits.train
    assert train.y.dtype == train.a.dtype == torch.int64
    n = 10 * TRAIN - 80
    assert train.y.bincount().tolist() == train.a.bincount().tolist() == [n // 10] * 10
    kept = int((train.y == train.a).sum())
    loose = round((1 - strength) * n)
    # Of those that are shuffled about a tenth gets its own digit again.
    assert n - loose <= kept <= n
    assert abs(kept - (n - 0.9 * loose)) <= 4 * (0.09 * loose) ** 0.5
    assert {name: len(split) for name, split in splits.named().items()} == {
        "train": n, "val": 40, "target": 40, "test": 10 * TEST,
    }  # fmt: skip
    for name in ("val", "target"):
        split = getattr(splits, name)
        assert split.y.bincount().tolist() == split.a.bincount().tolist() == [4] * 10
        assert (split.y == split.a).sum() < 12
    assert splits.test.y.bincount().tolist() == [TEST] * 10
    assert abs((splits.test.y == splits.test.a).float().mean() - 0.1) < 0.06
    assert splits.facts == {"cifar10": "made up", "mnist": "embedded"}


def test_what_is_loose_at_a_strength_is_loose_at_lower_ones(load):
    options = {"dfr_val_ratio": 0, "use_dfr": False, **TEN}

    def changed(strength):
        train = load(spurious_strength=strength, **options).train
        _, pictures = contents(train)
        return {p for p, y, a in zip(pictures, train.y, train.a) if y != a}

    assert len(changed(0.9) - changed(0.5)) < 0.2 * len(changed(0.9))
    assert len(changed(0.9)) < len(changed(0.5))


def test_binary_groups_follow_the_moments(load, sources):
    splits = load(
        num_train_samples=100, num_test_samples=40, train_correlation=0.6, train_label_marginal=0.2
    )
    check_labels_and_disjointness(splits, sources)
    assert splits.cells == groups.GROUPS and splits.num_classes == 2
    names = ["automobile, 0", "automobile, 1", "truck, 0", "truck, 1"]
    assert splits.group_names == names
    total = [a + b for a, b in zip(splits.train.counts, splits.dfr.counts)]
    assert total == groups.split_counts(100, groups.probabilities(0.2, 0, 0.6))
    assert splits.dfr.counts == [round(0.2 * n) for n in total]
    assert splits.val.counts == splits.target.counts == [10] * 4
    assert splits.test.counts == [10] * 4
    assert splits.train.y.dtype == torch.float32
    assert splits.train.moments.y_mean == pytest.approx(0.2, abs=0.02)


def test_null_takes_all_that_the_target_set_leaves(load):
    splits = load(train_correlation=0.5)
    assert len(splits.train) + len(splits.dfr) == 2 * TRAIN - 80
    assert load(val_target_size=0, num_train_samples=80).val is None
    splits = load(**TEN, val_target_size=0)
    assert splits.target is None and len(splits.train) + len(splits.dfr) == 10 * TRAIN


def test_smaller_sets_of_ten_classes_are_stratified(load, sources):
    splits = load(num_train_samples=203, num_test_samples=50, **TEN)
    check_labels_and_disjointness(splits, sources)
    y = torch.cat([splits.train.y, splits.dfr.y])
    assert sorted(y.bincount().tolist()) == [20] * 7 + [21] * 3
    assert splits.test.y.bincount().tolist() == [5] * 10


def test_the_same_splits_for_the_same_keys(load):
    first = load(**TEN).fingerprint()
    assert load(**TEN).fingerprint() == first
    assert load(**TEN, learning_rate=0.1, epochs=3).fingerprint() == first
    others = [
        load(**TEN, seed=1), load(**TEN, spurious_strength=0.9), load(**TEN, val_target_size=100),
        load(**TEN, image_size=224), load(**TEN, dfr_val_ratio=0.3),
    ]  # fmt: skip
    assert len({first, *(splits.fingerprint() for splits in others)}) == 6
    # Neither the strength of the shortcut nor DFR's hold-out touches what is tested on.
    for splits in (load(**TEN, spurious_strength=0.9), load(**TEN, dfr_val_ratio=0.3)):
        for name in ("val", "target", "test"):
            assert getattr(splits, name).digest() == getattr(load(**TEN), name).digest()


def test_too_few_digits_are_used_again_but_in_one_split_only(load, sources, monkeypatch, caplog):
    pictures, _ = sources
    few = made_digits(13, 5), made_digits(7, 6)
    monkeypatch.setattr(mnist, "load", lambda *_: few)
    with caplog.at_level("INFO", logger="spurious"):
        splits = load(**TEN)
    check_labels_and_disjointness(splits, (pictures, few), digits_twice=True)
    assert "train: mnist_source embedded has too few digits" in caplog.text
    assert "test: mnist_source embedded has too few digits" in caplog.text
    its_digits, _ = contents(splits.train)
    uses = pd.Series(its_digits).groupby(its_digits).size()
    of_digit = uses.groupby([kinds(few[0])[d] for d in uses.index])
    # Evenly, but for shares that do not divide.
    assert (of_digit.max() - of_digit.min() <= 1).all()
    assert f"up to {uses.max()} times each" in caplog.text
    monkeypatch.setattr(mnist, "load", lambda *_: (made_digits(3, 5), few[1]))
    with pytest.raises(DataError, match="has 3 digits 0 in its training part"):
        load(**TEN)


def test_asking_for_more_than_is_available(load):
    with pytest.raises(DataError) as error:
        load(num_train_samples=160)
    assert error.value.problems[0] == (
        "num_train_samples: 160 samples need 80 pictures of class automobile, but CIFAR-10's "
        "training part has 60 left; lower num_train_samples or val_target_size"
    )
    with pytest.raises(DataError, match="num_test_samples: 400 samples need 40 pictures of class"):
        load(num_test_samples=400, **TEN)
    with pytest.raises(DataError, match=r"val_target_size: 104 samples .*; lower val_target_size$"):
        load(val_target_size=208)
    with pytest.raises(
        DataError, match="val_target_size: given 200, which leaves no picture to train on"
    ):
        load(val_target_size=200)


def test_dfr_on_the_target_set(load):
    splits = load(dfr_val_split_strategy="target", **TEN)
    assert splits.dfr is splits.target
    assert len(splits.train) == 10 * TRAIN - 80  # nothing is set aside
    assert load(dfr_val_split_strategy="target", val_target_size=0, use_dfr=False).dfr is None


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, "norm"),
        ({"normalize_inputs": False}, "channels"),
        ({"image_size": 224}, "norm"),
        ({"image_size": 224, "normalize_inputs": False}, None),
        ({"image_size": 224, "use_feature_extractor": True}, None),
    ],
)
def test_how_inputs_are_scaled(load, keys, scaling):
    splits = load(num_train_samples=80, **keys)
    assert all(split.inputs.scaling == scaling for split in splits.named().values())
    assert splits.train.inputs.shape[-1] == keys.get("image_size", 32)


def test_samples_to_look_at(load):
    samples = load(train_correlation=0).samples
    assert samples["pictures"].shape == (32, 64, 32, 3)
    assert 0.99 < samples["pictures"].max() <= 1 and samples["pictures"].min() == 0
    assert np.bincount(samples["group"]).tolist() == [8] * 4
    assert load(image_size=224, train_correlation=0).samples["pictures"].shape == (32, 112, 112, 3)
    samples = load(spurious_strength=0.5, **TEN).samples
    assert np.bincount(samples["y"]).tolist() == [8] * 10
    assert (samples["y"] == samples["a"]).sum() == 40
    assert (10 * samples["y"] + samples["a"] == samples["group"]).all()
    assert len(load(spurious_strength=1, **TEN).samples["y"]) == 40


def test_shares():
    assert dominoes._shares(10, [3, 0, 4]) == [3, 0, 4]
    assert dominoes._shares(7, [3, 0, 4]) == [3, 0, 4]
    assert dominoes._shares(10, [100, 0, 1]) == [9, 0, 1]
    assert dominoes._shares(2, [100, 0, 1]) == [1, 0, 1]
    assert dominoes._shares(1, [100, 0, 1]) is None


def test_features_of_composed_pictures(load, settings, tmp_path):
    keys = {
        "use_feature_extractor": True, "feature_extractor_weights": "random", "image_size": 224,
        "feature_extractor_resnet_intermediate_layer": "layer1", "num_workers": 0,
        "features_cache_dir": str(tmp_path), "normalize_inputs": False, "num_train_samples": 10,
        "num_test_samples": 4, "val_target_size": 8, "dfr_val_split_strategy": "target",
    }  # fmt: skip
    splits = load(**keys)
    extractor = feature_extractor.Extractor(settings(dataset_name="Dominoes", **keys))
    extracted = extractor.extract(splits)
    for name, split in splits.named().items():
        pixels = torch.stack([split.inputs.decode_uint8(i) for i in range(len(split))])
        assert torch.equal(pixels.float() / 255, split.inputs[:])
        found = getattr(extracted, name)
        assert torch.allclose(found.inputs, extractor.backbone(pixels), atol=1e-4)
        assert found.counts == split.counts
    files = extractor.facts["files"]
    assert files["dfr"] == files["target"] and len(set(files.values())) == 4
    assert extracted.cells == splits.cells and extracted.facts == splits.facts


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"dominoes_classes": "ten", "loss_function": "logistic"},
            "loss_function: given logistic, but the labels of Dominoes are classes here; allowed: "
            "cross_entropy",
        ),
        (
            {"loss_function": "cross_entropy", **NO_ANALYSES, "analyze_jacobian_norm": True},
            "analyze_jacobian_norm: given true, but these analyses need a scalar output and four "
            "groups; allowed with loss_function cross_entropy: false, null",
        ),
        (
            {"val_target_size": 30},
            "val_target_size: given 30; allowed with dominoes_classes binary: multiples of 8 from "
            "0 below 10000",
        ),
        (
            {**TEN, "val_target_size": 50000},
            "val_target_size: given 50000; allowed with dominoes_classes ten: multiples of 20 from "
            "0 below 50000",
        ),
        (
            {"val_target_size": 0, "dfr_val_split_strategy": "target"},
            "val_target_size: given 0, but dfr_val_split_strategy: target needs a target set; "
            "allowed: multiples of 8 above 0, below 10000",
        ),
        (
            {"use_feature_extractor": True},
            "image_size: given 32, but feature extractors take pictures of 224 pixels; allowed "
            "with use_feature_extractor: 224",
        ),
        (
            {"dfr_val_split_strategy": "original"},
            "dfr_val_split_strategy: given original, but Dominoes has no official validation set; "
            "allowed: split_from_train, target",
        ),
        (
            {"dataset_name": "WaterBirds", "dfr_val_split_strategy": "target"},
            "dfr_val_split_strategy: given target, but WaterBirds has no target set; allowed: "
            "split_from_train, original",
        ),
        ({"image_size": 64}, "image_size: given 64; allowed: 32, 224"),
        ({"spurious_strength": 1.5}, "spurious_strength: given 1.5; allowed: a number from 0 to 1"),
    ],
)
def test_combinations_that_are_refused(keys, expected):
    with pytest.raises(ConfigError) as error:
        loading.validate({"dataset_name": "Dominoes"} | keys)
    assert error.value.problems == (expected,)


def test_the_configuration_knows_the_number_of_pictures():
    per_class = cifar10.PER_CLASS["train"]
    assert {"binary": 2 * per_class, "ten": 10 * per_class} == rules.DOMINOES_PICTURES
    assert rules.DOMINOES_PARTS == {"binary": 2 * 4, "ten": 2 * 10}


def test_all_analyses_to_switch_off_are_in_one_line():
    switches = {f"analyze_{name}": True for name in BUILT_IN.of(Analysis)}
    with pytest.raises(ConfigError) as error:
        loading.validate({"loss_function": "cross_entropy"} | switches)
    assert len(error.value.problems) == 1
    assert all(name in str(error.value) for name in switches)


def test_standard_analyses_that_do_not_apply_are_named_in_the_log():
    for analyses in ("standard", "all"):
        config = loading.validate({"loss_function": "cross_entropy", "analyses": analyses})
        note = config.notes[-1]
        assert note.startswith("Analyses that do not apply with loss_function cross_entropy: ")
        assert not any(getattr(config, f"analyze_{name}") for name in BUILT_IN.of(Analysis))
    with pytest.raises(ConfigError, match=r"analyses: \[jacobian_norm\]: given true, but"):
        loading.validate({"loss_function": "cross_entropy", "analyses": ["jacobian_norm"]})
    notes = loading.validate({"loss_function": "cross_entropy", "analyses": "none"}).notes
    assert not any("Analyses" in note for note in notes)


def test_keys_without_effect():
    dominoes_keys = {"val_target_size": 80, "spurious_strength": 0.5, "data_augmentation": True}
    assert loading.validate(dominoes_keys).ignored == (
        "val_target_size, spurious_strength, data_augmentation (only for Dominoes, CelebA)",
    )
    ten = {"dataset_name": "Dominoes", **TEN, "num_val_samples": 5, "train_correlation": 1}
    # Moments that contradict each other do not matter where they have no effect.
    assert loading.validate(ten | {"train_label_marginal": 0.5}).ignored == (
        "num_val_samples (only for ColoredMNIST, WaterBirds, CelebA, SpuriousMNIST)",
        "train_correlation, train_label_marginal (not with dominoes_classes: ten)",
    )
    both = {"dataset_name": "Dominoes", "train_correlation": 1, "mnist_source": "full"}
    assert loading.validate(both).ignored == ()
    target = {"dataset_name": "Dominoes", "dfr_val_split_strategy": "target"}
    config = loading.validate(target | {"dfr_num_retrains": 3})
    assert config.ignored == ("dfr_num_retrains (without dfr_balance there is one fit)",)
    assert (config.dfr_balance, config.dfr_standardize) == (False, False)
    config = loading.validate({"use_dfr": False, "dfr_balance": None})
    assert config.ignored == () and config.dfr_balance and config.dfr_standardize
    assert loading.validate(config.resolved()).ignored == ()


def test_a_run_from_a_folder_of_pictures(tmp_path, data_dir, capsys):
    """Binary, with the embedded digits: analyses, the target set, DFR on it, every table."""
    write_cifar10(tmp_path / "data", train=60, test=20, classes=("automobile", "truck"))
    options = {
        "dataset_name": "Dominoes", "data_dir": tmp_path / "data",
        "results_dir": tmp_path / "results", "num_train_samples": 64, "num_test_samples": 32,
        "val_target_size": 32, "hidden_dim": 8, "epochs": 1, "dfr_num_workers": 1,
        "dfr_val_split_strategy": "target", "wandb.enable": "false",
    }  # fmt: skip
    assert main.main([f"{key}={value}" for key, value in options.items()]) == 0
    folder = next((tmp_path / "results").iterdir())
    counts = pd.read_csv(folder / "group_counts.csv")
    assert counts.groupby("split")["count"].sum().to_dict() == {
        "train": 64, "val": 16, "target": 16, "test": 32, "dfr": 16,
    }  # fmt: skip
    history = pd.read_csv(folder / "training_history.csv")
    for split in ("train", "val", "target", "test"):
        right = history[[f"{split}_group_1_acc", f"{split}_group_2_acc"]].mean(axis=1)
        if split != "train":  # equal groups
            assert np.allclose(history[f"{split}_minority_acc"], right)
    results = json.loads((folder / "dfr_results.json").read_text())
    assert results["split_strategy"] == "target"
    assert set(results["after"]) == {"train", "val", "target", "test"}
    assert {path.stem for path in (folder / "plots").iterdir()} > {"dfr", "samples", "gaps"}


def test_the_normalization_of_the_presets():
    """Published runs divide by the published deviation, other runs by the exact one."""
    for name in ("erm", "erm_target", "scale", "dfr"):
        preset = loading.load_config(CONFIGS / f"dominoes_{name}.yaml")
        assert preset.dominoes_normalization == "published"
        assert "dominoes_normalization" not in " ".join(preset.ignored)
    given = {"dataset_name": "Dominoes", "dominoes_normalization": "published"}
    assert "dominoes_normalization" in " ".join(loading.validate(given).ignored)
