"""Attempts at jobs, and sweeps on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweep
from lab.sweeping import (
    attempts,
    locks,
    manifests,
    resources,
    states,
)
from lab.system import cores
from lab.system.errors import UserError


def attempt_record(folder, job=0):
    return json.loads((folder / "jobs" / f"{job:04d}" / "job.json").read_text())


def epochs(folder, job=0):
    (history,) = folder.glob(f"jobs/{job:04d}/*/training_history.csv")
    return [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]


def test_an_attempt_runs_the_job_once(stand_in, begin):
    folder, manifest = begin()
    attempt = attempts.Attempt(folder, manifest["jobs"][1])
    attempt()
    expected = {"state": "finished", "returncode": 0, "error": None, "attempt": 1}
    assert attempt_record(folder, 1) == expected
    assert (
        manifests.run_folder(folder, manifest["jobs"][1]) == folder / "jobs" / "0001" / "small_2026"
    )
    assert manifests.run_folder(folder, manifest["jobs"][0]) is None
    attempt()  # is done, so nothing happens
    assert attempt_record(folder, 1) == expected
    assert epochs(folder, 1) == [0, 1, 2, 3]


FAILURES = {
    "fail": (2, "training diverges"),
    "refuse": (1, "num_train_samples: too many"),
    "killed": (-9, "killed by SIGKILL (out of memory?)"),
}


@pytest.mark.parametrize("task", FAILURES)
def test_a_failure_is_reported_with_its_last_error_line(stand_in, begin, task):
    code, error = FAILURES[task]
    folder, manifest = begin(task)
    with pytest.raises(attempts.Failed):
        attempts.Attempt(folder, manifest["jobs"][1])()
    expected = {"state": "failed", "returncode": code, "error": error, "attempt": 1}
    assert attempt_record(folder, 1) == expected
    with pytest.raises(attempts.Failed):
        attempts.Attempt(folder, manifest["jobs"][1])()
    assert attempt_record(folder, 1) == expected | {"attempt": 2}
    assert (folder / "jobs" / "0001" / "output.log").read_text().count("To resume") == 2 * (
        task == "fail"
    )


def test_the_next_attempt_goes_on_where_the_last_one_failed(stand_in, begin):
    folder, manifest = begin("fail")
    with pytest.raises(attempts.Failed, match="training diverges"):
        attempts.Attempt(folder, manifest["jobs"][1])()
    assert epochs(folder, 1) == [0, 1]
    (folder / "jobs" / "0001" / "repaired").touch()
    attempts.Attempt(folder, manifest["jobs"][1])()
    assert epochs(folder, 1) == [0, 1, 2, 3]


def test_a_job_is_run_by_one_process_at_a_time(stand_in, begin, monkeypatch):
    monkeypatch.setattr(attempts, "LOCK_WAIT", 0.2)
    folder, manifest = begin()
    with locks.locked(folder / "jobs" / "0000"):
        assert [state.state for state in states.states(folder, manifest)] == ["running", "missing"]
        with pytest.raises(UserError, match="0000: in use by another process"):
            attempts.Attempt(folder, manifest["jobs"][0])()
    attempts.Attempt(folder, manifest["jobs"][0])()
    assert [state.state for state in states.states(folder, manifest)] == ["done", "missing"]


def in_submitit(folder, job):
    """Submits a job that waits in epoch 1; returns submitit's job and the id of its process."""
    import submitit

    executor = submitit.LocalExecutor(folder / "submitit")
    with attempts.findable():
        submitted = executor.submit(attempts.Attempt(folder, job))
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
    await_that(lambda: attempt_record(folder)["attempt"] == 2, submitted.stderr)
    (folder / "jobs" / "0000" / "go").touch()
    submitted.wait()
    assert attempt_record(folder) == {
        "state": "finished",
        "returncode": 0,
        "error": None,
        "attempt": 2,
    }
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
    assert attempt_record(folder)["state"] == "cancelled"
    assert attempt_record(folder)["returncode"] == 128 + signum
    assert states.states(folder, manifest)[0].state == "missing"


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
    assert [attempt_record(folder, job)["attempt"] for job in range(4)] == [1, 2, 1, 2]
    (folder / "jobs" / "0001" / "repaired").touch()
    code, out, _ = run_sweep(capsys, "--resume", folder)
    assert (code, out[-2]) == (0, "4 jobs: 4 done")
    code, out, _ = run_sweep(capsys, "--resume", folder)
    assert (code, out[0]) == (0, f"{folder}: nothing to do")
    assert [attempt_record(folder, job)["attempt"] for job in range(4)] == [1, 3, 1, 2]


def test_ctrl_c_stops_the_jobs_with_their_checkpoints(stand_in, write, tmp_path, capsys):
    path = write(
        {"seeds": 3, "grid": {"learning_rate": [0.1]}},
        epochs=3, data_dir="wait", results_dir=str(tmp_path / "results"),
    )  # fmt: skip
    code = (
        "import sys, pathlib, sweep; from lab.sweeping import attempts;"
        f"attempts.PROGRAM = pathlib.Path({str(attempts.PROGRAM)!r});"
        f"sys.exit(sweep.main([{str(path)!r}, '--jobs', '2']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=attempts.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    waiting = lambda: list(tmp_path.glob("results/sweeps/*/jobs/*/*/training_history.csv"))
    await_that(lambda: [len(path.read_text().splitlines()) for path in waiting()] == [3, 3])
    (folder,) = (tmp_path / "results" / "sweeps").iterdir()
    manifest = manifests.read_manifest(folder)
    assert [s.state for s in states.states(folder, manifest)] == ["running", "running", "waiting"]
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
    assert [attempt_record(folder, job)["state"] for job in (0, 1)] == ["cancelled", "cancelled"]
    assert [state.state for state in states.states(folder, manifest)] == ["missing"] * 3
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
    monkeypatch.setattr(resources.memory, "available", lambda: memory)
    assert resources.at_once(gpus) == expected


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
