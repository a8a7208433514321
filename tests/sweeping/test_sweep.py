"""Sweeps: from a file to jobs, running them on this machine, what became of them."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import sweep
from lab.config import loading, strict_yaml
from lab.sweeping import launch, plan
from lab.system import cores
from lab.system.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
PRESETS = sorted(ROOT.glob("sweeps/*.yaml"))

# Stands for main.py: what a sweep needs of a run, in no time. What it does is told by `data_dir`.
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
    told = {"state": state, "phase": "training", "error": error, "id": "x", "summary": {}}
    (run / "status.json").write_text(json.dumps(told))


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
    monkeypatch.setattr(launch, "PROGRAM", program)
    monkeypatch.setattr(launch, "POLL", 0.02)


@pytest.fixture
def begin(write, tmp_path):
    """begin(task, document, overrides) -> (plan, its folder), nothing run."""

    def make(task="none", document=None, *overrides):
        document = document or {"seeds": 2, "grid": {"learning_rate": [0.1]}}
        path = write(document, epochs=3, data_dir=task, results_dir=str(tmp_path / "results"))
        sweep = plan.read(path, overrides)
        folder = plan.create(sweep, ["sweep.py"], {"kind": "local", "slurm": {}})
        return folder, plan.read_manifest(folder)

    return make


def problems(path, *overrides):
    with pytest.raises(ConfigError) as error:
        plan.read(path, overrides)
    return error.value.problems


# From a file to jobs


def test_a_grid_is_the_product_with_every_seed(write):
    grid = {"debias_method": ["None", "GroupDRO"], "train_correlation": [0.5, 0.8, 0.9]}
    read = plan.read(write({"seeds": [3, 7], "grid": grid | {"epochs": [4]}}))
    expected = []
    for method in grid["debias_method"]:
        for correlation in grid["train_correlation"]:
            for seed in (3, 7):
                setting = {"debias_method": method, "train_correlation": correlation, "epochs": 4}
                expected.append(setting | {"seed": seed})
    jobs = read.jobs()
    assert [job["overrides"] for job in jobs] == expected
    assert [job["job"] for job in jobs] == list(range(12))
    assert [job["setting"] for job in jobs] == [n for n in range(6) for _ in range(2)]
    assert jobs[11]["folder"] == "jobs/0011"
    assert read.keys == ["debias_method", "train_correlation"]  # epochs do not differ
    name = plan.setting_name(read.settings[1], read.keys)
    assert name == "debias_method=None, train_correlation=0.8"


def test_a_list_has_the_settings_as_they_are_written(write):
    entries = [{}, {"optimizer": "Adam", "learning_rate": 0.01}, {"learning_rate": 0.5}]
    read = plan.read(write({"seeds": 3, "list": entries}))
    assert read.settings == entries
    assert read.seeds == [0, 1, 2]
    assert read.keys == ["optimizer", "learning_rate"]
    names = [plan.setting_name(setting, read.keys) for setting in entries]
    assert names == ["base", "optimizer=Adam, learning_rate=0.01", "learning_rate=0.5"]


def drawn(write, draws=200, seed=0, **keys):
    section = {"seed": seed, "draws": draws, "keys": keys}
    return plan.read(write({"seeds": 1, "random": section})).settings


def test_random_draws_follow_their_distributions_and_seeds(write):
    keys = {
        "learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "momentum": {"uniform": [0.1, 0.9]},
        "hidden_dim": {"int_uniform": [4, 9]},
        "train_batch_size": {"choice": [8, 16, None]},
    }
    settings = drawn(write, **keys)
    rates = [setting["learning_rate"] for setting in settings]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    # Each half of the exponents gets half of the draws, up to four standard deviations.
    assert abs(sum(rate < 1e-3 for rate in rates) - 100) < 4 * math.sqrt(50)
    assert abs(sum(s["momentum"] < 0.5 for s in settings) - 100) < 4 * math.sqrt(50)
    assert {s["hidden_dim"] for s in settings} == set(range(4, 10))
    assert {s["train_batch_size"] for s in settings} == {8, 16, None}
    assert all(float(f"{rate:.4g}") == rate for rate in rates)
    # More draws and other keys leave the numbers as they were; another seed does not.
    again = drawn(write, draws=300, **keys, weight_decay={"uniform": [0, 1]})
    assert [s["learning_rate"] for s in again[:200]] == rates
    assert drawn(write, seed=1, **keys)[0] != settings[0]


def test_draws_differ(write):
    settings = drawn(write, draws=6, hidden_dim={"int_uniform": [4, 9]})
    assert sorted(s["hidden_dim"] for s in settings) == [4, 5, 6, 7, 8, 9]
    (problem,) = problems(
        write({"seeds": 1, "random": {"draws": 7, "keys": {"hidden_dim": {"int_uniform": [4, 9]}}}})
    )
    assert problem.startswith("random.draws: given 7, but only 6 different settings")


@pytest.mark.parametrize("value", [
    "None", "a: b", " x", "x #y", "3", "true", "", "é", "[1]", "-", 1e-5, 1e20, 0.1, True, None,
    [0, 1], [[[-1, 1], [1, 1]]], {"mode": "offline"}, "a'b\"c",
])  # fmt: skip
def test_values_read_back_as_they_were(value):
    assert strict_yaml.parse(plan.override_text(value), "key") == value


BAD = {
    "seeds: given null": {"grid": {"epochs": [1]}},
    "seeds: given 0": {"seeds": 0, "grid": {"epochs": [1]}},
    "seeds: given true": {"seeds": True, "grid": {"epochs": [1]}},
    "seeds: given [1, 1], with one twice": {"seeds": [1, 1], "grid": {"epochs": [1]}},
    "gird: no such key": {"seeds": 1, "gird": {}, "grid": {"epochs": [1]}},
    "given grid and list": {"seeds": 1, "grid": {"epochs": [1]}, "list": [{}]},
    "nothing given; allowed: one of grid": {"seeds": 1},
    "grid.epochs: given 1; allowed: a list": {"seeds": 1, "grid": {"epochs": 1}},
    "grid.epochs: 2 is there twice": {"seeds": 1, "grid": {"epochs": [2, 3, 2]}},
    "grid.seed: the sweep sets it; allowed: seeds": {"seeds": 1, "grid": {"seed": [1]}},
    "grid.results_dir: the sweep sets": {"seeds": 1, "grid": {"results_dir": ["a"]}},
    "every setting: epoch: given 1": {"seeds": 1, "grid": {"epoch": [1], "momentum": [0, 0.5]}},
    "grid.epochs=3; momentum: there is": {"seeds": 1, "grid": {"epochs=3; momentum": [1]}},
    "grid: 1,000,000 settings": {
        "seeds": 1, "grid": {"epochs": list(range(1000)), "hidden_dim": list(range(1000))}
    },
    "grid, seeds: 1 settings × 10001 seeds": {"seeds": 10**9, "grid": {"epochs": [1]}},
    "list: given {}": {"seeds": 1, "list": {}},
    "list: {'epochs': 2} is there twice": {"seeds": 1, "list": [{"epochs": 2}, {"epochs": 2}]},
    "random: given {'draws': 3}": {"seeds": 1, "random": {"draws": 3}},
    "random.draws: given 0": {"seeds": 1, "random": {"draws": 0, "keys": {"epochs": {}}}},
    "random.keys.epochs: given {}": {"seeds": 1, "random": {"draws": 1, "keys": {"epochs": {}}}},
    "random.keys.momentum.log_uniform: given [0, 1]": {
        "seeds": 1, "random": {"draws": 1, "keys": {"momentum": {"log_uniform": [0, 1]}}}
    },
    "random.keys.epochs.int_uniform: given [1, 2.5]": {
        "seeds": 1, "random": {"draws": 1, "keys": {"epochs": {"int_uniform": [1, 2.5]}}}
    },
    "slurm.time: given '1:00'": {"seeds": 1, "grid": {"epochs": [1]}, "slurm": {"time": "1:00"}},
    "slurm.nodes: no such key": {"seeds": 1, "grid": {"epochs": [1]}, "slurm": {"nodes": 2}},
    "seeds: given [-1]": {"seeds": [-1], "grid": {"epochs": [1]}},
    "seed: given 4294967296": {"seeds": [2**32], "grid": {"epochs": [1]}},
}  # fmt: skip


@pytest.mark.parametrize("expected", BAD)
def test_mistakes_are_told_in_one_line(write, expected):
    told = problems(write(BAD[expected]))
    assert any(expected in problem for problem in told), told


def test_a_problem_names_its_setting(write):
    grid = {"train_correlation": [0.5, 2], "debias_method": ["None", "SCALE"]}
    told = problems(write({"seeds": 2, "grid": grid}))
    first, second = "train_correlation=2, debias_method=None", "0.5, debias_method=SCALE"
    assert any(f"setting 2 ({first}) and 1 more: train_correlation: given 2" in t for t in told)
    assert any(f"setting 1 (train_correlation={second}) and 1 more: debias" in t for t in told)


def test_the_command_line_sets_what_the_sweep_does_not(write):
    path = write({"seeds": 2, "grid": {"epochs": [1, 2], "wandb.mode": ["offline"]}})
    assert plan.read(path, ["hidden_dim=8"]).overrides == ["hidden_dim=8"]
    assert "epochs: given on the command line, but the sweep sets epochs" in problems(
        path, "epochs=3"
    )
    assert "but the sweep sets wandb.mode" in problems(path, "wandb={enable: false}")[0]
    assert problems(path, "seed=3")[0].startswith("seed: the sweep sets it")
    assert problems(path, "hidden_dim=0")[0].startswith("every setting: hidden_dim: given 0")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    read = plan.read(path)
    assert f"python sweep.py {path.relative_to(ROOT)}" in path.read_text()
    assert read.optuna or len(read.settings) > 1


def test_the_manifest_and_the_base_are_kept_as_they_were(begin, tmp_path):
    folder, manifest = begin("none", None, "hidden_dim=8")
    assert folder.parent == tmp_path / "results" / "sweeps"
    assert folder.name == f"try_{manifest['created']}"
    assert manifest["config"] == str(tmp_path / "base.yaml")
    assert manifest["base_overrides"] == ["hidden_dim=8"]
    assert manifest["keys"] == []
    assert manifest["settings"] == [
        {"setting": 0, "name": "base", "overrides": {"learning_rate": 0.1}}
    ]
    assert strict_yaml.parse(manifest["sweep_file"], "")["seeds"] == 2
    (tmp_path / "base.yaml").write_text("epochs: 99\n")
    arguments = launch.Attempt(folder, manifest["jobs"][1]).command()[2:]
    job = loading.load_config(arguments[1], arguments[2:])
    assert (job.epochs, job.learning_rate, job.hidden_dim, job.seed) == (3, 0.1, 8, 1)
    assert job.results_dir == str(folder / "jobs" / "0001")
    assert job.wandb.group == folder.name


def test_a_new_sweep_never_takes_an_old_folder(begin, monkeypatch):
    monkeypatch.setattr(plan.folders, "now", lambda: "then")
    assert [begin()[0].name for _ in range(3)] == ["try_then", "try_then_2", "try_then_3"]


def test_debug_prints_the_commands_and_writes_nothing(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write({"seeds": 2, "grid": {"epochs": [1, 2]}})
    before = sorted(tmp_path.rglob("*"))
    assert sweep.main([str(path), "--cluster", "debug", "hidden_dim=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    found = []
    for line in lines:
        python, program, flag, base, *overrides = shlex.split(line)
        assert (python, program, flag) == ("python", "main.py", "--config")
        job = loading.load_config(base, overrides)
        found.append((job.epochs, job.seed, job.hidden_dim))
    assert found == [(1, 0, 8), (1, 1, 8), (2, 0, 8), (2, 1, 8)]


@pytest.mark.parametrize("arguments, expected", [
    ([], "command line: allowed: one of a sweep file"),
    (["--status", "nowhere"], "nowhere/manifest.json: not readable, so this is no sweep (No"),
    (["--resume", "nowhere", "--status", "nowhere"], "command line: allowed: one of"),
    (["--collect", "nowhere", "--jobs", "3"], "--jobs: allowed: with a sweep file or --resume"),
    (["nowhere.yaml"], "nowhere.yaml: cannot be read, No such file or directory\n"),
    (["nowhere.yaml", "--jobs", "0"], "--jobs: given 0"),
    (["nowhere.yaml", "--time", "0"], "slurm.time: given 0"),
])  # fmt: skip
def test_mistakes_on_the_command_line(arguments, expected, capsys):
    assert sweep.main(arguments) == 2
    assert capsys.readouterr().err.startswith(expected)


# One attempt at one job


def told(folder, job=0):
    return json.loads((folder / "jobs" / f"{job:04d}" / "job.json").read_text())


def epochs(folder, job=0):
    (history,) = folder.glob(f"jobs/{job:04d}/*/training_history.csv")
    return [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]


def test_an_attempt_runs_the_job_once(stand_in, begin):
    folder, manifest = begin()
    attempt = launch.Attempt(folder, manifest["jobs"][1])
    attempt()
    expected = {"state": "finished", "returncode": 0, "error": None, "attempt": 1}
    assert told(folder, 1) == expected
    assert plan.run_folder(folder, manifest["jobs"][1]) == folder / "jobs" / "0001" / "small_2026"
    assert plan.run_folder(folder, manifest["jobs"][0]) is None
    attempt()  # is done, so nothing happens
    assert told(folder, 1) == expected
    assert epochs(folder, 1) == [0, 1, 2, 3]


FAILURES = {
    "fail": (2, "training diverges"),
    "refuse": (1, "num_train_samples: too many"),
    "killed": (-9, "killed by SIGKILL (out of memory?)"),
}


@pytest.mark.parametrize("task", FAILURES)
def test_a_failure_is_told_with_its_last_error_line(stand_in, begin, task):
    code, error = FAILURES[task]
    folder, manifest = begin(task)
    with pytest.raises(launch.Failed):
        launch.Attempt(folder, manifest["jobs"][1])()
    expected = {"state": "failed", "returncode": code, "error": error, "attempt": 1}
    assert told(folder, 1) == expected
    with pytest.raises(launch.Failed):
        launch.Attempt(folder, manifest["jobs"][1])()
    assert told(folder, 1) == expected | {"attempt": 2}
    assert (folder / "jobs" / "0001" / "output.log").read_text().count("To resume") == 2 * (
        task == "fail"
    )


def test_the_next_attempt_goes_on_where_the_last_one_failed(stand_in, begin):
    folder, manifest = begin("fail")
    with pytest.raises(launch.Failed, match="training diverges"):
        launch.Attempt(folder, manifest["jobs"][1])()
    assert epochs(folder, 1) == [0, 1]
    (folder / "jobs" / "0001" / "repaired").touch()
    launch.Attempt(folder, manifest["jobs"][1])()
    assert epochs(folder, 1) == [0, 1, 2, 3]


def test_a_job_is_run_by_one_process_at_a_time(stand_in, begin, monkeypatch):
    monkeypatch.setattr(launch, "LOCK_WAIT", 0.2)
    folder, manifest = begin()
    with launch._locked(folder / "jobs" / "0000"):
        assert [state.state for state in launch.states(folder, manifest)] == ["running", "missing"]
        with pytest.raises(UserError, match="0000: in use by another process"):
            launch.Attempt(folder, manifest["jobs"][0])()
    launch.Attempt(folder, manifest["jobs"][0])()
    assert [state.state for state in launch.states(folder, manifest)] == ["done", "missing"]


def in_submitit(folder, job):
    """Submits a job that waits in epoch 1; returns submitit's job and the id of its process."""
    import submitit

    executor = submitit.LocalExecutor(folder / "submitit")
    with launch._findable():
        submitted = executor.submit(launch.Attempt(folder, job))
    children = Path(f"/proc/{submitted.job_id}/task/{submitted.job_id}/children")
    await_that(lambda: list(folder.glob("jobs/*/*/training_history.csv")), submitted.stderr)
    await_that(lambda: epochs(folder, job["job"]) == [0, 1], submitted.stderr)
    return submitted, int(children.read_text())


def await_that(condition, explain=lambda: ""):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_pre_empted_job_is_put_back_in_line_and_goes_on(stand_in, begin):
    folder, manifest = begin("wait")
    submitted, process = in_submitit(folder, manifest["jobs"][0])
    os.kill(process, signal.SIGUSR2)
    await_that(lambda: told(folder)["attempt"] == 2, submitted.stderr)
    (folder / "jobs" / "0000" / "go").touch()
    submitted.wait()
    assert told(folder) == {"state": "finished", "returncode": 0, "error": None, "attempt": 2}
    # The stand-in, unlike main.py, does not count the epoch as done in which it is stopped.
    assert epochs(folder) == [0, 1, 2, 3]
    assert "To resume:" in (folder / "jobs" / "0000" / "output.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_job_is_not_put_back_in_line(stand_in, begin, signum):
    folder, manifest = begin("wait")
    submitted, process = in_submitit(folder, manifest["jobs"][0])
    os.kill(process, signum)
    submitted.wait()
    assert submitted.exception()
    assert told(folder)["state"] == "cancelled"
    assert told(folder)["returncode"] == 128 + signum
    assert launch.states(folder, manifest)[0].state == "missing"


# Sweeps on this machine


def run_sweep(capsys, *arguments):
    """(exit code, lines of standard output, lines of standard error)"""
    code = sweep.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_a_failing_job_does_not_stop_the_others(stand_in, write, tmp_path, capsys):
    path = write(
        {"seeds": 2, "grid": {"learning_rate": [0.1, 0.2]}},
        epochs=3, data_dir="fail", results_dir=str(tmp_path / "results"),
    )  # fmt: skip
    code, out, err = run_sweep(capsys, path, "--jobs", 3, "hidden_dim=8")
    assert code == 1
    folder = Path(out[-1].removeprefix("Results: "))
    assert out[-2] == "4 jobs: 2 done, 2 failed"
    ended = sorted(line for line in err if line.startswith("00"))
    assert ended == [
        "0000 learning_rate=0.1, seed 0: done, worst group 0.030",
        "0001 learning_rate=0.1, seed 1: failed: training diverges",
        "0002 learning_rate=0.2, seed 0: done, worst group 0.030",
        "0003 learning_rate=0.2, seed 1: failed: training diverges",
    ]
    code, out, _ = run_sweep(capsys, "--status", folder)
    assert code == 1
    assert out == [
        folder.name,
        "4 jobs: 2 done, 2 failed",
        "job  state         epoch worst  seed  setting",
        "0000 done            3/3 0.030     0  learning_rate=0.1",
        "0001 failed          1/3 1.010     1  learning_rate=0.1",
        "     training diverges",
        "0002 done            3/3 0.030     0  learning_rate=0.2",
        "0003 failed          1/3 1.010     1  learning_rate=0.2",
        "     training diverges",
    ]
    (folder / "jobs" / "0003" / "repaired").touch()
    code, out, _ = run_sweep(capsys, "--resume", folder)
    assert (code, out[-2]) == (1, "4 jobs: 3 done, 1 failed")
    assert [told(folder, job)["attempt"] for job in range(4)] == [1, 2, 1, 2]
    (folder / "jobs" / "0001" / "repaired").touch()
    code, out, _ = run_sweep(capsys, "--resume", folder)
    assert (code, out[-2]) == (0, "4 jobs: 4 done")
    code, out, _ = run_sweep(capsys, "--resume", folder)
    assert (code, out[0]) == (0, f"{folder}: nothing to do")
    assert [told(folder, job)["attempt"] for job in range(4)] == [1, 3, 1, 2]


def test_ctrl_c_stops_the_jobs_with_their_checkpoints(stand_in, write, tmp_path, capsys):
    path = write(
        {"seeds": 3, "grid": {"learning_rate": [0.1]}},
        epochs=3, data_dir="wait", results_dir=str(tmp_path / "results"),
    )  # fmt: skip
    code = (
        "import sys, pathlib, sweep; from lab.sweeping import launch;"
        f"launch.PROGRAM = pathlib.Path({str(launch.PROGRAM)!r});"
        f"sys.exit(sweep.main([{str(path)!r}, '--jobs', '2']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0
    )
    waiting = lambda: list(tmp_path.glob("results/sweeps/*/jobs/*/*/training_history.csv"))
    await_that(lambda: [len(path.read_text().splitlines()) for path in waiting()] == [3, 3])
    (folder,) = (tmp_path / "results" / "sweeps").iterdir()
    manifest = plan.read_manifest(folder)
    assert [s.state for s in launch.states(folder, manifest)] == ["running", "running", "waiting"]
    code, _, err = run_sweep(capsys, "--resume", folder, "--jobs", 1)
    assert (code, err) == (0, ["3 job(s) are waiting or running already: left alone"])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-4:] == [
        "Stopping 2 job(s), which write their checkpoints",
        "Stopped by SIGINT.",
        "To resume:",
        f"python sweep.py --resume {folder}",
    ]
    assert [told(folder, job)["state"] for job in (0, 1)] == ["cancelled", "cancelled"]
    assert [state.state for state in launch.states(folder, manifest)] == ["missing"] * 3
    for job in range(3):
        (folder / "jobs" / f"{job:04d}" / "go").touch()
    code, _, _ = run_sweep(capsys, "--resume", folder, "--jobs", 3)
    assert code == 0
    assert [epochs(folder, job) for job in range(3)] == [[0, 1, 2, 3]] * 3


def test_cores_and_gpus_are_shared_out(stand_in, begin, monkeypatch, capsys):
    folder, _ = begin("environment")
    monkeypatch.setattr(cores, "available", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "5")  # what the user says, stays
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-1")
    assert run_sweep(capsys, "--resume", folder)[0] == 0  # one job a GPU
    seen = [json.loads(path.read_text()) for path in folder.glob("jobs/*/*/variables.json")]
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"3"}
    assert {one["LOKY_MAX_CPU_COUNT"] for one in seen} == {"5"}
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["3", "MIG-1"]


@pytest.mark.parametrize("memory, gpus, expected", [
    (64 * 2**30, 0, 8), (5 * 2**30, 0, 2), (2**30, 0, 1), (None, 0, 8), (64 * 2**30, 3, 3),
])  # fmt: skip
def test_how_many_jobs_run_at_once(monkeypatch, memory, gpus, expected):
    monkeypatch.setattr(cores, "available", lambda: 8)
    monkeypatch.setattr(launch.memory, "available", lambda: memory)
    assert launch.at_once(gpus) == expected


def test_two_jobs_with_the_same_features_extract_them_once(write, data_dir, tmp_path, capsys):
    """The real main.py, twice at once."""
    path = write(
        {"seeds": 1, "grid": {"learning_rate": [0.1, 0.2]}},
        num_train_samples=24, num_test_samples=12, hidden_dim=8, epochs=1, use_dfr=False,
        use_feature_extractor=True, feature_extractor_weights="random", num_workers=1,
        show_and_save_samples=False, data_dir=str(data_dir), results_dir=str(tmp_path / "results"),
        features_cache_dir=str(tmp_path / "features"),
        analyses="none",
    )  # fmt: skip
    code, out, err = run_sweep(capsys, path, "--jobs", 2)
    assert (code, out[-2]) == (0, "2 jobs: 2 done"), err
    folder = Path(out[-1].removeprefix("Results: "))
    logs = [path.read_text() for path in sorted(folder.glob("jobs/*/*/run.log"))]
    assert len(logs) == 2
    for split in ("train", "test"):
        assert sorted(f"Extracting {split}:" in log for log in logs) == [False, True]
        found = [bool(re.search(rf"Features from .*_{split}_ResNet18", log)) for log in logs]
        assert sorted(found) == [False, True]


# States


def test_progress_is_the_last_row_of_the_history(tmp_path):
    assert launch.progress(None) == (None, None)
    assert launch.progress(tmp_path) == (None, None)
    history = tmp_path / "training_history.csv"
    history.write_text("epoch,train_avg_loss,test_worst_acc\n")
    assert launch.progress(tmp_path) == (None, None)
    for epoch in range(300):
        with open(history, "a") as file:
            file.write(f"{epoch},{epoch / 7},{epoch / 300}\n")
        assert launch.progress(tmp_path) == (epoch, epoch / 300)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """queue(lines) puts a `squeue` in the path that prints them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(*lines, code=0):
        text = "\n".join(["#!/bin/sh", *(f"echo {line}" for line in lines), f"exit {code}"])
        (folder / "squeue").write_text(text)
        (folder / "squeue").chmod(0o755)

    return make


@pytest.mark.parametrize("kind, queued, expected", [
    (None, None, ("missing", "not started")),
    ("submitted", None, ("missing", "not started")),
    ("submitted", "PENDING", ("waiting", None)),
    ("running", "RUNNING", ("running", None)),
    ("running", "PENDING", ("waiting", None)),  # after its node went down
    ("running", None, ("failed", "killed, it left no word")),
    ("failed", None, ("failed", "because")),
    ("failed", "PENDING", ("waiting", None)),
    ("cancelled", None, ("missing", "because")),
    ("finished", None, ("failed", "because")),
])  # fmt: skip
def test_states_without_accounting(begin, queue, kind, queued, expected):
    folder, manifest = begin()
    if kind:
        launch.write_attempt(folder / "jobs" / "0001", kind, 1, 0, "because")
    (folder / "slurm.json").write_text(json.dumps({"0": "12_0", "1": "12_1"}))
    queue("12_0 PENDING", *([f"12_1 {queued}"] if queued else []), "7 RUNNING")
    first, second = launch.states(folder, manifest)
    assert first.state == "waiting"
    assert (second.state, second.error) == expected


def test_a_queue_that_cannot_be_asked_is_an_error(begin, queue):
    folder, manifest = begin()
    (folder / "slurm.json").write_text(json.dumps({"0": "12_0"}))
    queue(code=1)
    with pytest.raises(UserError, match="squeue: cannot tell which jobs run"):
        launch.states(folder, manifest)


def test_the_table_fits_its_width_and_the_terminal(begin):
    grid = {"learning_rate": [0.1], "data_dir": [f"{'long ' * 20}{n}" for n in range(40)]}
    folder, manifest = begin("none", {"seeds": 1, "grid": grid})
    found = [launch.State("done", 3, 0.5)] * 39 + [launch.State("failed", 2, None, "x" * 90)]
    lines = launch.table(folder, manifest, found)
    assert len(lines) == 3 + 41
    assert max(map(len, lines)) == 80
    assert lines[-1] == "     " + "x" * 72 + "..."
    short = launch.table(folder, manifest, found, rows=10)
    assert len(short) == 10
    assert short[3].startswith("0039 failed          2/3           0  data_dir=long")
    assert short[-1] == "…"


def test_the_table_is_live_on_a_terminal_until_all_is_over(begin, monkeypatch, capsys):
    folder, _ = begin()
    waits = launch.State("waiting"), launch.State("running", 1, 0.25)
    pictures = [waits, waits, [launch.State("done", 3, 0.5), launch.State("failed", 2, 0.1, "no")]]
    monkeypatch.setattr(launch, "states", lambda *_: pictures.pop(0))
    monkeypatch.setattr(launch, "REFRESH", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sweep.main(["--status", str(folder)]) == 1
    tables = capsys.readouterr().out.split("\x1b[H\x1b[2J")[1:]
    assert len(tables) == 3
    assert "2 jobs: 1 waiting, 1 running" in tables[0]
    assert "0001 running         1/3 0.250     1  base" in tables[0]
    assert tables[2].splitlines()[-1] == "     no"


def test_without_slurm_nothing_is_written(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write({"seeds": 1, "grid": {"epochs": [1]}}, results_dir=str(tmp_path / "results"))
    assert sweep.main([str(path), "--cluster", "slurm"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
