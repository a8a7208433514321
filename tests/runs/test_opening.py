"""A finished run, opened from its folder."""

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import lab
from lab.evaluation import metrics, predictions
from lab.folders import status
from lab.system.errors import ConfigError


def test_an_opened_run_gives_what_was_trained_and_saved(go):
    code, _ = go("epochs=3")
    assert code == 0
    folder = go.folder()
    run = lab.open_run(folder)
    assert run.config.epochs == 3 and run.status["state"] == "done"
    history = pd.read_csv(folder / "training_history.csv")
    pd.testing.assert_frame_equal(run.tables.history, history)
    f = predictions.outputs(run.network("last"), run.splits.test, 64)
    right = metrics.correct(f, run.splits.test.y).double().mean().item()
    assert right == pytest.approx(history.test_avg_acc.iloc[-1], abs=1e-12)
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert all(torch.equal(saved[k], v) for k, v in run.network("last").state_dict().items())


def test_a_folder_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"--run: given .* does not exist"):
        lab.open_run(tmp_path)


def test_import_lab_takes_no_torch_and_tables_need_none():
    code = "import sys, lab; from lab.runs import opening; print('torch' in sys.modules)"
    root = Path(lab.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert "open_run" in dir(lab)
    with pytest.raises(AttributeError, match="no attribute 'open_runs'"):
        lab.open_runs  # noqa: B018


def test_metrics_in_the_status_stay_what_they_were(tmp_path):
    """An epoch is a whole number before and after a resumption reads and writes the file."""
    given = {"best_epoch": 6, "test_avg_acc": 1.0, "val_loss": math.nan}
    status.write_status(tmp_path, "done", "done", "x", given)
    before = (tmp_path / status.FILE).read_bytes()
    read = status.read_status(tmp_path)
    status.write_status(tmp_path, "done", "done", "x", read["summary"])
    assert (tmp_path / status.FILE).read_bytes() == before
    assert type(read["summary"]["best_epoch"]) is int
