"""Configurations that version 0.1 wrote load, and their runs resume."""

from pathlib import Path

import pandas as pd

import main
from lab.config import strict_yaml
from lab.config.comparing import changes_results
from lab.config.loading import load_config, validate

OLD = Path(__file__).parent / "config_used_0_1.yaml"


def test_every_key_of_version_0_1_means_the_same():
    old, config = strict_yaml.read(OLD), load_config(OLD)
    now = config.resolved()
    assert set(now) - set(old) == {"plugins", "analyses", "dominoes_normalization"}
    assert {name: now[name] for name in old} == old
    assert changes_results(config, validate({"device": old["device"], "wandb": old["wandb"]})) == []


def test_a_run_of_version_0_1_resumes(tmp_path, data_dir, few_figures):
    small = {
        "num_train_samples": 200, "num_test_samples": 60, "hidden_dim": 8, "epochs": 2,
        "dfr_num_workers": 1, "dfr_num_retrains": 2, "wandb.enable": "false",
        "data_dir": data_dir, "results_dir": tmp_path,
    }  # fmt: skip
    assert main.main([f"{name}={value}" for name, value in small.items()]) == 0
    (folder,) = tmp_path.iterdir()
    used = folder / "config_used.yaml"
    kept = {k: v for k, v in strict_yaml.read(used).items() if k not in ("plugins", "analyses")}
    used.write_text(strict_yaml.dump(kept))
    assert main.main(["--resume", str(folder), "epochs=3"]) == 0
    assert len(pd.read_csv(folder / "training_history.csv")) == 4
