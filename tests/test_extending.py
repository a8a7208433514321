"""The worked examples of docs/extending.md, executed as they stand there: plugins."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import dfr
import main
import plotting
import sweep
from lab.config.loading import load_config
from lab.system.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.M | re.S))
SMALL = {
    "num_train_samples": 200, "num_test_samples": 80, "hidden_dim": 8, "epochs": 2,
    "checkpoint_every": 1, "dfr_num_workers": 1, "dfr_num_retrains": 2, "wandb.enable": "false",
}  # fmt: skip


def test_the_page_has_its_four_examples():
    assert list(EXAMPLES) == ["blobs.py", "focal.py", "two_layer_cnn.py", "flow_alignment.py"]


@pytest.fixture
def go(tmp_path, data_dir, monkeypatch, few_figures):
    """go(**settings) -> the folder of a small run with all examples as plugins."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(f"plugins: [{', '.join(EXAMPLES)}]\n")
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        given = SMALL | {"data_dir": data_dir, "results_dir": tmp_path / "results"} | settings
        before = {*tmp_path.glob("results/*")}
        overrides = [f"{name}={value}" for name, value in given.items()]
        assert main.main(["--config", "c.yaml", *overrides]) == 0
        (folder,) = {*tmp_path.glob("results/*")} - before
        return folder

    return run


def test_a_data_set_of_vectors_with_analyses_dfr_and_the_figure_of_a_plugin(go, tmp_path, capsys):
    folder = go(dataset_name="Blobs", blobs_dim=4, analyses="all")
    history = pd.read_csv(folder / "training_history.csv")
    assert history.train_avg_acc.iloc[-1] > 0.6
    rows = pd.read_csv(folder / "analysis.csv")
    found = rows[rows.analysis == "flow_alignment"]
    assert set(found.split) == {"train", "test"} and found.value.between(-1, 1).all()
    assert (folder / "plots" / "flow_alignment.png").exists()
    assert (folder / "dfr_results.json").exists() and not (folder / "samples.npz").exists()
    facts = json.loads((folder / "environment.json").read_text())["plugins"]
    assert [Path(plugin["file"]).name for plugin in facts] == list(EXAMPLES)
    # Plotting imports nothing unless the command line repeats it.
    (folder / "plots" / "flow_alignment.png").unlink()
    assert plotting.main([str(folder)]) == 0
    assert not (folder / "plots" / "flow_alignment.png").exists()
    assert plotting.main([str(folder), "plugins=[flow_alignment.py]"]) == 0
    assert (folder / "plots" / "flow_alignment.png").exists()
    # Nor does retraining; a repeated plugin brings the data back.
    capsys.readouterr()
    assert dfr.main(["--run", str(folder), "dfr_reg=l2"]) == 2
    assert "imported only if you repeat it: plugins=[" in capsys.readouterr().err
    names = ",".join(EXAMPLES)
    assert dfr.main(["--run", str(folder), "dfr_reg=l2", f"plugins=[{names}]"]) == 0


def test_a_method_and_a_network_and_resuming_with_a_changed_plugin(go, tmp_path, capsys):
    settings = {"debias_method": "Focal", "focal_gamma": 1.5, "model_name": "TwoLayerCNN"}
    folder = go(**settings, learning_rate=0.01, normalize_inputs="false")
    assert load_config(folder / "config_used.yaml").focal_gamma == 1.5  # by its stored facts
    with open(tmp_path / "focal.py", "a") as file:
        file.write("\n# changed\n")
    capsys.readouterr()
    assert main.main(["--resume", str(folder), "epochs=3"]) == 0
    assert f"plugin {tmp_path / 'focal.py'}: was " in capsys.readouterr().err
    assert len(pd.read_csv(folder / "training_history.csv")) == 4


def test_the_focal_loss_is_that_of_the_paper(tmp_path, settings):
    import torch
    from helpers import make_splits

    (tmp_path / "focal.py").write_text(EXAMPLES["focal.py"])
    (tmp_path / "c.yaml").write_text("plugins: [focal.py]\ndebias_method: Focal\n")
    config = load_config(tmp_path / "c.yaml", trust_plugins=True)
    method = config.method.load()(config, make_splits())
    f, y = torch.tensor([2.0, -0.5]), torch.tensor([1.0, 1.0])
    p = torch.sigmoid(y * f)
    expected = (-((1 - p) ** 2) * p.log()).mean()
    losses = config.loss.load().value(f, y)
    torch.testing.assert_close(method.batch_loss(losses, None), expected)


def test_on_the_whole_split_a_method_follows_its_own_loss(go, tmp_path):
    """One batch of all samples with the gradient of the method's loss, not a step of ERM."""
    given = ["--config", "c.yaml", "train_batch_size=null", "epochs=2", "use_dfr=false"]
    small = ["num_train_samples=60", "num_test_samples=20", "hidden_dim=4", "wandb.enable=false"]
    losses = {}
    for name in ("None", "Focal"):
        place = f"results_dir={tmp_path / name}"
        assert main.main([*given, *small, place, f"debias_method={name}"]) == 0
        (folder,) = (tmp_path / name).iterdir()
        losses[name] = pd.read_csv(folder / "training_history.csv")["train_avg_loss"]
        weights = pd.read_csv(folder / "training_history.csv")["flow_weight_0"]
        assert weights.isna().all() == (name == "Focal")
    assert losses["None"][0] == losses["Focal"][0] and losses["None"][2] != losses["Focal"][2]


def test_a_plugin_named_twice(tmp_path, capsys):
    (tmp_path / "p.py").write_text("RECORDS = []\n")
    (tmp_path / "c.yaml").write_text("plugins: [p.py, p.py]\n")
    assert main.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "p.py: named twice; allowed: once" in capsys.readouterr().err


def test_a_sweep_over_a_plugins_key(go, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        "config: c.yaml\nseeds: 1\ngrid:\n  debias_method: [Focal]\n  focal_gamma: [0.0, 2.0]\n"
    )
    assert sweep.main(["s.yaml", "--cluster", "debug"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(str(tmp_path / "focal.py") in line for line in lines)
    (tmp_path / "s.yaml").write_text("config: c.yaml\nseeds: 1\ngrid:\n  focal_gamma: [-1.0]\n")
    assert sweep.main(["s.yaml", "--cluster", "debug"]) == 2
    assert "focal_gamma: given -1.0; allowed: a number from 0 to 20" in capsys.readouterr().err


def test_help_has_the_keys_of_plugins(go, capsys):
    assert main.main(["--help", "--config", "c.yaml"]) == 0
    out = capsys.readouterr().out
    assert "focal_gamma = 2.0" in out and "- Blobs: Gaussian blobs" in out


METHOD = (
    "from lab.config.registry import Method\nfrom lab.config.keys import own\n"
    "RECORDS = [Method('M', 'x', code=int, keys={{{}}})]\n"
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nraise ValueError('broken')\n", "p.py, line 2: ValueError: broken"),
        ("def f(:\n", "p.py, line 1: SyntaxError: "),
        ("import nonsense_module\n", "p.py, line 1: ModuleNotFoundError: "),
        ("import sys\nsys.exit(3)\n", "p.py, line 2: SystemExit: 3"),
        ("x = 1\n", "p.py: has no list RECORDS of records"),
        ("RECORDS = [1]\n", "p.py: has no list RECORDS of records"),
        (
            "from lab.config.registry import Method\nRECORDS = [Method('JTT', 'x', code=int)]\n",
            "the method JTT exists already",
        ),
        (
            "from lab.config.registry import Method\nfrom lab.config.keys import own\n"
            "RECORDS = [Method('M', 'x', code=int, keys={'epochs': own(int, 1, 'x')})]\n",
            "the key epochs of M exists already",
        ),
        (METHOD.format("'f': own(int, 1, 'x', min=1)"), "TypeError: own: given min; allowed"),
        (METHOD.format("'f': own(float, 0.5, 'x', ge=1)"), "the default 0.5 of the key f is not"),
        (METHOD.format("'f': own(int, 1.0, 'x')"), "the default 1.0 of the key f is not"),
        (METHOD.format("'f-g': own(int, 1, 'x')"), "line 3: ValueError: 'f-g': a name is a letter"),
        (
            "from lab.config.registry import DataSet\nDataSet('D', 'x', inputs='vector')\n",
            "line 2: ValueError: inputs: given 'vector'; allowed: pictures, vectors",
        ),
        (None, "p.py: no such file"),
    ],
    ids=lambda value: None if value is None else value[:25],
)
def test_a_plugin_that_is_none_is_one_line(tmp_path, capsys, code, expected):
    if code is not None:
        (tmp_path / "p.py").write_text(code)
    (tmp_path / "c.yaml").write_text("plugins: [p.py]\n")
    assert main.main(["--config", str(tmp_path / "c.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plugins: ") and expected in line


def test_nothing_is_imported_from_a_results_folder(tmp_path, capsys):
    (tmp_path / "config_used.yaml").write_text("epochs: 1\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "p.py").write_text("raise SystemExit('imported')\n")
    code = main.main([f"plugins=[{tmp_path}/deeper/p.py]"])
    assert code == 2 and "lies in a results folder" in capsys.readouterr().err


def test_a_mailed_folder_runs_nothing(tmp_path):
    """Its configuration names a plugin: only repeating it on the command line imports it."""
    seen = tmp_path / "imported"
    (tmp_path / "p.py").write_text(f"open({str(seen)!r}, 'w')\nRECORDS = []\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config_used.yaml").write_text(f"plugins: [{tmp_path / 'p.py'}]\n")
    with pytest.raises(ConfigError, match="not imported here; repeat plugins="):
        load_config(folder / "config_used.yaml")
    for command in (["plotting.py", folder], ["dfr.py", "--run", folder]):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True)
    assert not seen.exists()
