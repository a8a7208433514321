"""Several processes do the steps of one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import make_splits

import main
from lab.config.loading import validate
from lab.networks import building
from lab.system import distributed
from lab.system.errors import ConfigError

ROOT = Path(__file__).parent.parent
ARGUMENTS = [
    "model_name=ConvNet", "latent_size=8", "num_train_samples=120", "num_test_samples=40",
    "num_val_samples=20", "epochs=4", "train_batch_size=25", "learning_rate=0.3",
    "normalize_inputs=false",
    "dfr_num_workers=1", "dfr_num_retrains=2", "wandb.enable=false", "checkpoint_every=1",
    "analyze_jacobian_norm=false", "debias_method=GroupDRO", "dro_eta_q=0.5",
]  # fmt: skip


@pytest.mark.usefixtures("few_figures")
def test_two_processes_learn_what_one_learns(tmp_path, data_dir):
    """The same curves with the same global batch; one folder, written by the first rank."""
    arguments = [*ARGUMENTS, f"data_dir={data_dir}"]
    assert main.main([*arguments, f"results_dir={tmp_path / 'one'}"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
         "main.py", *arguments, f"results_dir={tmp_path / 'two'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    expected, found = (pd.read_csv(f / "training_history.csv") for f in (one, two))
    numbers = [name for name in expected if "loss" in name or "weight" in name]
    assert np.allclose(found[numbers], expected[numbers], rtol=1e-3, atol=1e-5, equal_nan=True)
    assert expected["train_avg_loss"].iloc[-1] < 0.9 * expected["train_avg_loss"].iloc[0]
    assert done.stdout.count("Results: ") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_batch_norm_needs_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "grouped", lambda: True)
    monkeypatch.setattr(building.dist, "get_backend", lambda: "gloo")
    config = validate({"model_name": "ResNet18"})
    splits = make_splits(shape=(3, 32, 32))
    with pytest.raises(ConfigError, match="works over several processes on GPUs only"):
        building.build_for(config, splits)
    assert building.build_for(validate({"model_name": "ConvNet"}), splits)
    monkeypatch.setattr(building.dist, "get_backend", lambda: "nccl")
    kinds = {type(module).__name__ for module in building.build_for(config, splits).modules()}
    assert "SyncBatchNorm" in kinds
    assert "BatchNorm2d" not in kinds
