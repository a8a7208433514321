"""Sweep files, a stand-in for `main.py`, and sweeps that have not run yet."""

from pathlib import Path

import pytest
import yaml

from lab.sweeping import (
    attempts,
    local,
    manifests,
    plan,
)

ROOT = Path(__file__).parents[2]


# Stands for main.py: what a sweep needs of a run, in no time. `data_dir` says what it does.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
from lab.config import loading

arguments = sys.argv[1:]
if "--resume" in arguments:
    run = Path(arguments[1])
    c = loading.load_config(run / "config_used.yaml")
else:
    c = loading.load_config(arguments[1], arguments[2:])
    run = Path(c.results_dir) / "small_2026"
task = c.data_dir
if task == "refuse" and not run.exists():
    sys.exit("num_train_samples: too many\\n")
run.mkdir(exist_ok=True)
(run / "config_used.yaml").write_text(json.dumps(c.resolved()))
history = run / "training_history.csv"
if not history.exists():
    history.write_text("epoch,test_worst_acc\\n")


def tell(state, error=None):
    reported = {"state": state, "phase": "training", "error": error, "id": "x", "summary": {}}
    (run / "status.json").write_text(json.dumps(reported))


def stop(signum, frame):
    tell("stopped", "stopped")
    print("To resume:\\npython main.py --resume", run)
    sys.exit(128 + signum)


for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, stop)
tell("running")
for epoch in range(len(history.read_text().splitlines()) - 1, c.epochs + 1):
    if task == "fail" and c.seed == 1 and epoch == 2 and not (run.parent / "repaired").exists():
        tell("failed", "no")
        print("training diverges\\nTo resume:\\npython main.py --resume", run)
        sys.exit(2)
    with open(history, "a") as file:
        file.write(f"{epoch},{c.seed + epoch / 100}\\n")
    if task == "killed" and c.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "wait" and epoch == 1:
        while not (run.parent / "go").exists():
            time.sleep(0.02)
    if task == "environment":
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LOKY_MAX_CPU_COUNT")
        (run / "variables.json").write_text(json.dumps({n: os.environ.get(n) for n in names}))
tell("done")
"""


@pytest.fixture
def write(tmp_path):
    """write(sweep document, base document) -> path of the sweep file."""

    def make(document, **base):
        (tmp_path / "base.yaml").write_text(yaml.dump({"wandb": {"enable": False}} | base))
        path = tmp_path / "try.yaml"
        whole = {"config": str(tmp_path / "base.yaml")} | document
        path.write_text(yaml.dump(whole, sort_keys=False))
        return path

    return make


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Jobs run the stand-in for main.py."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.replace("ROOT", repr(str(ROOT))))
    monkeypatch.setattr(attempts, "PROGRAM", program)
    monkeypatch.setattr(local, "POLL", 0.02)


@pytest.fixture
def begin(write, tmp_path):
    """begin(task, document, overrides) -> (plan, its folder), nothing run."""

    def make(task="none", document=None, *overrides):
        document = document or {"seeds": 2, "grid": {"learning_rate": [0.1]}}
        path = write(document, epochs=3, data_dir=task, results_dir=str(tmp_path / "results"))
        sweep = plan.read(path, overrides)
        folder = manifests.create(sweep, ["sweep.py"], {"kind": "local", "slurm": {}})
        return folder, manifests.read_manifest(folder)

    return make
