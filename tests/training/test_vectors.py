"""Inputs that are vectors (N, d): analyses, training and retraining need no picture."""

import math

import torch
from material import trained

from lab.evaluation import metrics
from lab.retraining import dfr
from lab.splits.splits import Split, Splits

COUNTS = {"train": (40, 10, 10, 40), "test": (15, 15, 15, 15), "dfr": (12, 12, 12, 12)}


def blobs(counts, seed, dim=3):
    """Gaussian samples whose means are y in the first, and 2 a in the second coordinate."""
    repeats = torch.tensor(counts)
    y = torch.tensor([-1.0, -1.0, 1.0, 1.0]).repeat_interleave(repeats)
    a = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(repeats)
    inputs = torch.randn(len(y), dim, generator=torch.Generator().manual_seed(seed)) / 2
    inputs[:, 0] += y
    inputs[:, 1] += 2 * a
    return Split(inputs, y, a, list(counts))


def test_vectors_are_trained_on_analysed_and_retrained(fake_run, settings):
    parts = {name: blobs(counts, seed) for seed, (name, counts) in enumerate(COUNTS.items())}
    splits = Splits.from_named(parts, group_names=["a", "b", "c", "d"])
    keys = {"learning_rate": 0.3, "epochs": 20, "dfr_num_retrains": 2, "hidden_dim": 8}
    net = trained(fake_run, settings, splits, torch.float32, **keys)
    first, last = fake_run.rows[0], fake_run.rows[-1]
    assert last["train_avg_loss"] < 0.5 * first["train_avg_loss"]
    assert {row["analysis"] for row in fake_run.analyses} >= {"gradient_basis", "jacobian_norm"}
    assert all(math.isfinite(value) for name, value in last.items() if "flow" not in name)
    _, results = dfr.retrain(net, splits, settings(**keys))
    assert results["after"]["test"]["worst_acc"] >= results["before"]["test"]["worst_acc"]
    assert len(metrics.group_losses(results["after"]["test"])) == 4
    assert splits.samples == {}  # nothing to look at
