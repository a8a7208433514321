"""What auto and null stand for where that depends on other settings."""

import pytest

from lab.config.loading import validate

KEYS = (
    "loss_function", "num_train_samples", "num_val_samples", "num_test_samples",
    "dfr_val_split_strategy", "dfr_val_ratio", "learning_rate",
)  # fmt: skip
FEW = (3000, 0, 1000)
ALL = (None, None, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("logistic", *FEW, "split_from_train", 0.2, 1.0)),
        ({"use_dfr": False}, ("logistic", *FEW, "split_from_train", 0.0, 1.0)),
        (
            {"use_dfr": False, "dfr_val_ratio": 0.3},
            ("logistic", *FEW, "split_from_train", 0.3, 1.0),
        ),
        ({"mnist_source": "full"}, ("logistic", None, 0, None, "split_from_train", 0.2, 1.0)),
        ({"dataset_name": "WaterBirds"}, ("logistic", *ALL, "original", 0.0, 1.0)),
        (
            {"dataset_name": "WaterBirds", "dfr_val_split_strategy": "split_from_train"},
            ("logistic", *ALL, "split_from_train", 0.2, 1.0),
        ),
        ({"dataset_name": "CelebA"}, ("logistic", *ALL, "original", 0.0, 1.0)),
        (
            {"dataset_name": "SpuriousMNIST"},
            ("cross_entropy", *FEW, "split_from_train", 0.2, 1.0),
        ),
        (
            {"dataset_name": "SpuriousMNIST", "dfr_reuse_train": True},
            ("cross_entropy", *FEW, "split_from_train", 0.0, 1.0),
        ),
        (
            {"dataset_name": "Dominoes", "dominoes_classes": "ten"},
            ("cross_entropy", *FEW, "split_from_train", 0.2, 1.0),
        ),
        ({"optimizer": "Adam"}, ("logistic", *FEW, "split_from_train", 0.2, 0.001)),
        (
            {"initialization_method": "NTP"},
            ("logistic", *FEW, "split_from_train", 0.2, 0.1),
        ),
        ({"model_name": "ConvNet"}, ("logistic", *FEW, "split_from_train", 0.2, 0.1)),
        ({"model_name": "ResNet18"}, ("logistic", *FEW, "split_from_train", 0.2, 0.001)),
        ({"num_train_samples": None}, ("logistic", None, 0, 1000, "split_from_train", 0.2, 1.0)),
    ],
    ids=str,
)
def test_what_follows_from_the_other_settings(given, expected):
    config = validate(given)
    assert tuple(getattr(config, key) for key in KEYS) == expected
    assert not config.ignored
    assert validate(config.resolved()).resolved() == config.resolved()  # as a resumed run reads it


def test_the_log_says_what_was_chosen():
    notes = " ".join(" ".join(validate({"dataset_name": "WaterBirds"}).notes).split())
    assert "num_train_samples: null (all)" in notes and "dfr_val_split_strategy: original" in notes
    assert "dfr_val_ratio" not in notes  # without effect here
    assert "learning_rate" not in " ".join(validate({"learning_rate": 1.0}).notes)
    assert all(len(note) <= 80 for note in validate({}).notes)
