"""Networks on pictures through the whole pipeline: every method, resuming, the best epoch, DFR."""

import json
import shutil
import signal

import pandas as pd
import pytest
import torch
from material import assert_equal, at_call, sent, write_cifar10
from PIL import Image

import dfr as dfr_command
import main
from lab.figures import drawing
from lab.folders import status as run_status

TEN = {
    "dataset_name": "Dominoes", "dominoes_classes": "ten", "loss_function": "cross_entropy",
    "spurious_strength": 0.9, "val_target_size": 80, "num_train_samples": 80,
    "num_test_samples": 40, "normalize_inputs": "false", "data_augmentation": "true",
    "model_name": "ConvNet", "latent_size": 6, "epochs": 3, "train_batch_size": 20,
    "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-3, "checkpoint_every": 1,
    "dfr_val_split_strategy": "target", "dfr_c_options": "[1.0, 0.1]", "dfr_num_workers": 1,
    "scheduler": "cosine", "wandb.enable": "false", "show_and_save_samples": "false",
    "analyses": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_cifar10(folder, train=20, test=4)
    return folder


@pytest.fixture
def go(tmp_path, pictures, capsys, monkeypatch):
    """go(results, key=value, …) -> (exit code, folder, stderr lines)."""
    monkeypatch.setattr(
        drawing, "FIGURES", {"training_history": drawing.FIGURES["training_history"]}
    )

    def run(results, **keys):
        given = TEN | {"data_dir": pictures, "results_dir": tmp_path / results} | keys
        code = main.main([f"{key}={value}" for key, value in given.items()])
        folders = list((tmp_path / results).glob("*"))
        return code, folders[0] if folders else None, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    "keys",
    [
        {"debias_method": "SCALE", "scale_group_size": 10},
        {"debias_method": "GroupDRO", "dfr_solver": "sgd"},
        {"debias_method": "IW_uniform", "scheduler": "none"},
        {"debias_method": "ERM_target", "dfr_network": "best"},
        {"model_name": "ResNet18", "epochs": 1, "train_batch_size": 79, "use_dfr": "false"},
        {
            "model_name": "MLP",
            "hidden_dim": 8,
            "group_batches": "mini",
            "debias_method": "GroupDRO",
        },
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_every_method_runs_and_resumes_in_the_middle_of_an_epoch(go, monkeypatch, keys):
    code, reference, _ = go("whole", **keys)
    assert code == 0
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 1 if "epochs" in keys else 3, sent(signal.SIGTERM))
        code, folder, lines = go("stopped", **keys)
    assert code == 143
    assert lines[-1] == f"python main.py --resume {folder}"
    assert main.main(["--resume", str(folder)]) == 0
    if keys.get("use_dfr") != "false":
        assert_equal(folder, reference)
    history = (folder / "training_history.csv").read_bytes()
    assert history == (reference / "training_history.csv").read_bytes()
    assert (folder / "analysis.csv").read_bytes() == (reference / "analysis.csv").read_bytes()
    assert (folder / "model.pt").read_bytes() == (reference / "model.pt").read_bytes()


def test_the_best_epoch_is_kept_and_reported(go):
    code, folder, lines = go("best", epochs=4, learning_rate=0.1)
    assert code == 0
    history = pd.read_csv(folder / "training_history.csv")
    by = ["val_minority_acc", "val_avg_acc", "val_avg_loss"]
    ranked = history[1:].sort_values(by, ascending=[False, False, True], kind="stable")
    best = int(ranked.index[0])  # never the untrained network
    summary = run_status.read_status(folder)["summary"]
    assert summary["best_epoch"] == best
    for name in ("test_minority_acc", "test_majority_acc", "val_avg_loss"):
        assert summary[f"best_{name}"] == pytest.approx(history.loc[best, name])
        assert summary[name] == pytest.approx(history[name].iloc[-1])
    assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["epoch"] == best
    assert any(f"at the best val epoch, {best}:" in line for line in lines)


def test_dfr_of_a_trained_run_again(go, tmp_path, capsys):
    code, folder, _ = go("run", use_dfr="false")
    assert code == 0
    assert not (folder / "dfr_results.json").exists()
    assert dfr_command.main(["--run", str(folder), "dfr_reg=l2"]) == 0
    place = capsys.readouterr().out.strip().removeprefix("Results: ")
    (made,) = (folder / "dfr").iterdir()
    assert place == str(made)
    again = json.loads((made / "dfr_results.json").read_text())
    assert (again["reg"], again["split_strategy"]) == ("l2", "target")
    history = pd.read_csv(folder / "training_history.csv")
    assert again["before"]["test"]["avg_acc"] == pytest.approx(history["test_avg_acc"].iloc[-1])

    # What the run itself would have done.
    code, whole, _ = go("with", dfr_reg="l2")
    assert code == 0
    assert json.loads((whole / "dfr_results.json").read_text()) == again

    for wrong in ("learning_rate=1", "dfr_val_split_strategy=split_from_train", "dfr_reg=l7"):
        assert dfr_command.main(["--run", str(folder), wrong]) == 2
        assert wrong.split("=")[0] in capsys.readouterr().err
    assert dfr_command.main(["--run", str(tmp_path)]) == 2
    assert f"--run: given {tmp_path}" in capsys.readouterr().err
    assert len(list((folder / "dfr").iterdir())) == 1


def test_other_data_are_refused(go, tmp_path, pictures, monkeypatch, capsys):
    """Neither resuming nor DFR may go on with other pictures: they could be test pictures."""
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 6, sent(signal.SIGTERM))
        code, folder, _ = go("run", data_dir=mine)
    assert code == 143
    changed = mine / "cifar10" / "train" / "cat" / "0000.png"
    Image.new("RGB", (32, 32), "red").save(changed)
    assert main.main(["--resume", str(folder)]) == 2
    assert "the data are not those of this run any more" in capsys.readouterr().err
    assert dfr_command.main(["--run", str(folder)]) == 2
    assert "the data are not those of this run any more" in capsys.readouterr().err
