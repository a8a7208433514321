"""Material that several test modules share: small data sets, stopped runs, compared folders."""

import json
import shutil
import signal

import numpy as np
import torch
from helpers import make_splits
from PIL import Image

from benchmarks import kill
from lab.data_sets.sources import cifar10
from lab.networks import building
from lab.training import loop

NO_ANALYSES = {"analyses": "none"}
REBALANCING = ("RWY", "RWG", "SUBY", "SUBG", "JTT")  # methods that draw their samples

# A small run of the default data set.
SMALL = [
    "num_train_samples=200", "num_test_samples=60", "num_val_samples=40", "hidden_dim=8",
    "epochs=4", "checkpoint_every=2", "dfr_num_workers=1", "dfr_num_retrains=2",
    "wandb.enable=false",
]  # fmt: skip

# The stand-in for CelebA of the fixture `faces`.
FACES = 360
FACE_ATTRIBUTES = ["Blond_Hair", "Male", "Smiling", "Young"]
PLANTED = {"Blond_Hair": ("Male", -1)}


def celeba_keys(folder, **changes):
    """Settings that take all faces of a stand-in, small."""
    return {
        "dataset_name": "CelebA", "data_dir": str(folder), "target_resolution": 16,
        "num_train_samples": None, "num_val_samples": None, "num_test_samples": None,
        "dfr_val_split_strategy": "original", "normalize_inputs": False,
    } | changes  # fmt: skip


def cifar10_pictures(n, seed=0):
    """Random pictures (n, 3, 32, 32) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def write_cifar10(data_dir, train=2, test=1, classes=cifar10.CLASSES, suffix=".png"):
    """A folder of pictures; returns {part: (N, 3, 32, 32)} in the order of class and name."""
    written = {}
    for seed, (part, n) in enumerate({"train": train, "test": test}.items()):
        written[part] = cifar10_pictures(n * len(classes), seed)
        for i, picture in enumerate(written[part]):
            folder = data_dir / "cifar10" / part / classes[i // n]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i % n:04d}{suffix}")
    return written


def trained(fake_run, settings, splits=None, dtype=torch.float64, **keys):
    """A network trained with these settings, by default for three full-batch epochs."""
    config = settings(**({"train_batch_size": None, "learning_rate": 1e-5, "epochs": 3} | keys))
    splits = make_splits() if splits is None else splits
    net = building.build(config, splits.train.inputs.shape[1:]).to(dtype)
    shutil.rmtree(fake_run.folder / "checkpoints", ignore_errors=True)  # a run from the start
    loop.train(net, splits, config, fake_run)
    return net


def assert_equal(folder, reference):
    """A finished run has the same tables and arrays as the reference, and no temporary files."""
    assert kill.differences(folder, reference) == []
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def at_call(monkeypatch, owner, name, call, action):
    """Run `action` before the given call (from 1) of a function, once."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def sent(signum):
    """A function that sends this process a signal."""
    return lambda: signal.raise_signal(signum)
