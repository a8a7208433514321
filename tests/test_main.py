"""The whole pipeline: files, exit codes, messages, determinism, trackers."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import main as program
from lab.config.loading import validate
from lab.runs.tables import ANALYSIS_COLUMNS

ROOT = Path(__file__).parent.parent
SMALL = [
    "num_train_samples=300",
    "num_test_samples=100",
    "hidden_dim=8",
    "epochs=2",
    "dfr_num_workers=1",
    "dfr_num_retrains=2",
    "wandb.enable=false",
]


@pytest.fixture
def run(tmp_path, data_dir, capsys):
    """run(key=value, …) -> (exit code, folder or None, stderr lines)."""
    (tmp_path / "c.yaml").write_text("experiment_name: small\n")

    def go(*overrides):
        fixed = [f"results_dir={tmp_path}/results", f"data_dir={data_dir}"]
        names = {override.split("=")[0] for override in overrides}
        small = [override for override in SMALL if override.split("=")[0] not in names]
        code = program.main(["--config", str(tmp_path / "c.yaml"), *fixed, *small, *overrides])
        captured = capsys.readouterr()
        last = captured.out.strip().splitlines()[-1] if captured.out.strip() else ""
        folder = Path(last.removeprefix("Results: ")) if last.startswith("Results: ") else None
        return code, folder, captured.err.splitlines()

    return go


FILES = {
    "config_used.yaml", "environment.json", "run.log", "training_history.csv", "analysis.csv",
    "gram.npz", "dfr_results.json", "dfr_results.txt", "group_counts.csv", "model.pt",
    "dfr_model.npz", "samples.npz", "timings.csv", "plots", "checkpoints", "status.json", ".lock",
}  # fmt: skip
PLOTS = {
    "training_history", "group_curves", "gaps", "gradient_basis", "gap_dynamics_factors",
    "static_dynamic_decomposition", "jacobian_norm", "model_output_expectation",
    "misclassification", "dfr", "samples",
}  # fmt: skip


def test_what_a_run_leaves(run):
    code, folder, _ = run("num_val_samples=40", "seed=3")
    assert code == 0
    assert re.fullmatch(r"small_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.name)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.stem for path in (folder / "plots").glob("*.png")} >= PLOTS
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    used = yaml.safe_load((folder / "config_used.yaml").read_text())
    assert validate(used).resolved() == used
    assert used["seed"] == 3
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["device"] in ("cpu", "cuda", "mps")
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["command"][0] == "main.py"
    assert "seed=3" in facts["command"]
    log = (folder / "run.log").read_text()
    assert "epoch 2/2" in log
    assert "Folder:" in log

    history = pd.read_csv(folder / "training_history.csv")
    assert history["epoch"].tolist() == [0, 1, 2]
    for split in ("train", "val", "test"):
        for name in ("avg_loss", "worst_loss", "avg_acc", "worst_acc", "adjusted_acc"):
            assert history[f"{split}_{name}"].notna().all()
        groups = history[[f"{split}_group_{g}_acc" for g in range(4)]]
        assert np.allclose(groups.min(axis=1), history[f"{split}_worst_acc"])
        groups = history[[f"{split}_group_{g}_loss" for g in range(4)]]
        assert np.allclose(groups.max(axis=1), history[f"{split}_worst_loss"])

    rows = pd.read_csv(folder / "analysis.csv", keep_default_na=False)
    assert tuple(rows.columns) == ANALYSIS_COLUMNS
    assert set(rows["split"]) == {"train", "test", "test_under_train"}
    assert not rows.duplicated(["epoch", "split", "analysis", "pair", "quantity"]).any()
    gap = rows[(rows["analysis"] == "gap_dynamics_factors") & (rows["quantity"] != "measured")]
    values = gap.assign(value=gap["value"].astype(float)).pivot_table(
        index=["epoch", "split", "pair"], columns="quantity", values="value"
    )
    assert len(values) == 3 * 3 * 2
    terms = values["term1"] + values["term2"] + values["term3"]
    assert np.allclose(terms, values["total"], rtol=1e-6, atol=1e-9)

    counts = pd.read_csv(folder / "group_counts.csv")
    total = counts.groupby("split")["count"].sum().to_dict()
    assert total == {"train": 240, "dfr": 60, "val": 40, "test": 100}
    assert counts["name"].tolist()[:2] == ["digit < 5, green", "digit < 5, red"]

    weights = torch.load(folder / "model.pt", weights_only=True)
    assert weights["layers.0.weight"].shape == (8, 2352)
    with np.load(folder / "samples.npz", allow_pickle=False) as samples:
        assert samples["pictures"].shape[1:] == (28, 28, 3)
    results = json.loads((folder / "dfr_results.json").read_text())
    before = {f"test_{k}": v for k, v in results["before"]["test"].items()}
    last = history.iloc[-1].to_dict()
    assert before == {name: pytest.approx(last[name], rel=1e-9) for name in before}


@pytest.mark.usefixtures("few_figures")
def test_equal_runs_are_equal_files(run):
    _, first, _ = run("checkpoint_every=1")
    _, second, _ = run("checkpoint_every=1")
    assert first != second
    for name in ("training_history.csv", "analysis.csv", "group_counts.csv", "dfr_results.json",
                 "dfr_results.txt", "config_used.yaml"):  # fmt: skip
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "model.pt").read_bytes() == (second / "model.pt").read_bytes()
    for name in ("gram.npz", "dfr_model.npz", "samples.npz"):
        with np.load(first / name) as a, np.load(second / name) as b:
            assert all(np.array_equal(a[key], b[key], equal_nan=True)
                       for key in a if a[key].dtype.kind != "U")  # fmt: skip
    _, other, _ = run("seed=1")
    name = "training_history.csv"
    assert (first / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.usefixtures("few_figures")
def test_threads_and_batches_of_evaluation_change_the_last_digits_only(run):
    _, reference, _ = run()
    expected = pd.read_csv(reference / "training_history.csv")
    threads = torch.get_num_threads()
    for count, overrides in ((threads, ["eval_batch_size=7"]), (threads % 2 + 1, [])):
        torch.set_num_threads(count)
        try:
            _, folder, _ = run(*overrides)
        finally:
            torch.set_num_threads(threads)
        history = pd.read_csv(folder / "training_history.csv")
        losses = [name for name in history if "loss" in name]
        assert np.allclose(history[losses], expected[losses], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["debias_method=IW_uniform", "learning_rate=0.1"],
        ["debias_method=GroupDRO", "loss_function=mse", "learning_rate=0.05"],
        ["initialization_method=NTP", "optimizer=Adam", "learning_rate=1e-3", "num_hidden_layers=2",
         "use_skip_connections=true", "use_bias=true", "use_grayscale=true", "plot_format=svg"],
        ["train_correlation=1", "gap_dynamics_factors.group_pairs=[[[-1,-1],[1,1]]]"],
        ["analysis_target=train", "jacobian_num_samples=5", "gradient_gram_num_samples=3",
         "use_dfr=false", "show_and_save_samples=false", "epochs=0"],
        ["dfr_reg=none", "dfr_target_layer=layer_0", "analysis_memory_gb=1e-5"],
    ],
    ids=["iw", "dro", "ntp", "empty groups", "caps", "slices"],
)  # fmt: skip
def test_settings_end_to_end(run, request, overrides):
    if not {"plot_format=svg", "train_correlation=1", "epochs=0"} & set(overrides):
        request.getfixturevalue("few_figures")  # nothing new to draw
    code, folder, _ = run(*overrides)
    assert code == 0
    assert list((folder / "plots").iterdir())
    log = (folder / "run.log").read_text()
    assert "Ended" not in log
    assert (folder / "dfr_results.json").exists() == ("use_dfr=false" not in overrides)
    assert (folder / "samples.npz").exists() == ("use_dfr=false" not in overrides)


@pytest.mark.usefixtures("few_figures")
def test_keys_without_effect_are_listed_once(run):
    _, folder, lines = run("dro_eta_q=0.5", "gradient_basis_analysis_epochs=[0, 7]")
    reported = [line for line in lines if "dro_eta_q" in line]
    assert len(reported) == 1
    assert "gradient_basis_analysis_epochs: 7 (beyond epochs = 2)" in reported[0]
    assert "dro_eta_q" in (folder / "run.log").read_text()


def test_configuration_errors_end_with_2_and_write_nothing(run, tmp_path):
    code, folder, lines = run("hiden_dim=3", "dfr_target_layer=layer_9", "epochs=many")
    assert code == 2
    assert folder is None
    assert [line.split(":")[0] for line in lines] == ["epochs", "hiden_dim", "dfr_target_layer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


def test_data_errors_end_with_2_and_write_nothing(run, tmp_path):
    code, folder, lines = run("num_test_samples=9000")
    assert code == 2
    assert folder is None
    assert lines[-1].startswith("num_test_samples: 9000 samples need")
    assert not (tmp_path / "results").exists()


def test_bad_command_lines(capsys):
    assert program.main(["--confg", "x"]) == 2
    assert "command line" in capsys.readouterr().err
    assert program.main(["--config"]) == 2
    assert "--config" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    code, _, lines = run()
    assert code == 2
    assert lines[-1].startswith("results_dir: ")


def test_divergence_keeps_and_plots_the_tables(run):
    code, folder, lines = run("learning_rate=1e6", "loss_function=mse", "epochs=30")
    assert code == 2
    assert re.search(r"learning_rate: the training loss is (nan|inf) at epoch \d+ with", lines[-1])
    assert (folder / "plots" / "training_history.png").exists()
    assert not (folder / "dfr_results.json").exists()
    assert f"Ended: {lines[-1]}" in (folder / "run.log").read_text()
    assert not np.isfinite(pd.read_csv(folder / "training_history.csv")["train_avg_loss"].iloc[-1])


def test_an_untrained_network_that_overflows_is_not_blamed_on_the_learning_rate(run):
    code, _, lines = run(
        "activation_function=exp",
        "num_hidden_layers=3",
        "initialization_method=NTP",
        "use_bias=true",
        "use_zero_bias_initialization=false",
        "hidden_dim=64",
        "use_skip_connections=true",
    )
    assert code == 2
    assert lines[-1].startswith("activation_function: the training loss of the untrained network")


def test_help_is_fast_and_imports_no_torch():
    code = "import sys, main; main.main(['--help']); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "learning_rate = null" in done.stdout
    assert time.perf_counter() - start < 10  # 0.5 s alone; generous for a busy machine


def command(tmp_path, data_dir, *overrides):
    fixed = ["--config", str(ROOT / "config.yaml"), f"data_dir={data_dir}"]
    names = {override.split("=")[0] for override in overrides} | {"wandb.enable"}
    small = [override for override in SMALL if override.split("=")[0] not in names]
    return [sys.executable, str(ROOT / "main.py"), *fixed, *small, *overrides]


def test_a_process_of_its_own_with_wandb_offline(tmp_path, data_dir):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    arguments = command(tmp_path, data_dir, "wandb.group=a sweep")
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Results: results/colored_mnist_")
    folder = tmp_path / last.removeprefix("Results: ")
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (binary,) = offline.glob("*.wandb")
    assert re.search(r"wandb: offline; to upload: wandb sync \S*offline-run-", done.stderr)
    logged, group = read_wandb(binary)
    assert group == "a sweep"
    history = pd.read_csv(folder / "training_history.csv")
    for row in history.to_dict("records"):
        epoch = row.pop("epoch")
        for name, value in row.items():
            assert logged[epoch][name] == pytest.approx(value)
    rows = pd.read_csv(folder / "analysis.csv", keep_default_na=False)
    for row in rows.to_dict("records"):
        name = "/".join(row[c] for c in ("analysis", "split", "pair", "quantity") if row[c])
        if np.isfinite(float(row["value"])):
            assert logged[row["epoch"]][name] == pytest.approx(float(row["value"]))
    names = {name for values in logged.values() for name in values}
    assert any(name.startswith("plots/training_history") for name in names)


def wandb_records(content):
    """The records of an offline file: LevelDB's log format after a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # no record starts in the last bytes of a block
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(path):
    """({epoch: {name: value}}, the run's group) of an offline file."""
    from wandb.proto import wandb_internal_pb2

    logged, group = {}, None
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        group = record.run.run_group or group
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            logged.setdefault(values.pop("epoch", None), {}).update(values)
    return logged, group


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption(tmp_path, data_dir, sent, code):
    process = subprocess.Popen(
        command(tmp_path, data_dir, "epochs=100000", "wandb.enable=false"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    (folder,) = (tmp_path / "results").iterdir()
    history = pd.read_csv(folder / "training_history.csv")
    assert history["epoch"].tolist() == list(range(len(history)))
    assert "Ended: " in (folder / "run.log").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "main.py --resume", "sweep.py --resume", "sweep.py --status", "sweep.py --collect",
        "dfr.py --run", "plotting.py",
    ],
)  # fmt: skip
def test_an_empty_shell_variable_names_no_folder(command, tmp_path):
    program, *option = command.split()
    arguments = [sys.executable, str(ROOT / program), *option, ""]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "given an empty name" in done.stderr
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_once_on_reading(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = validate({"results_dir": "~/x", "data_dir": "~"})
    assert (config.results_dir, config.data_dir) == (f"{tmp_path}/x", str(tmp_path))
