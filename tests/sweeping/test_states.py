"""The states of a sweep's jobs, and their table."""

import json
import os
import sys

import pytest

import sweep
from lab.sweeping import (
    attempts,
    states,
)
from lab.system.errors import UserError


def test_progress_is_the_last_row_of_the_history(tmp_path):
    assert states.progress(None) == (None, None)
    assert states.progress(tmp_path) == (None, None)
    history = tmp_path / "training_history.csv"
    history.write_text("epoch,train_avg_loss,test_worst_acc\n")
    assert states.progress(tmp_path) == (None, None)
    for epoch in range(300):
        with open(history, "a") as file:
            file.write(f"{epoch},{epoch / 7},{epoch / 300}\n")
        assert states.progress(tmp_path) == (epoch, epoch / 300)


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
    ("running", None, ("failed", "killed without a record of its end")),
    ("failed", None, ("failed", "because")),
    ("failed", "PENDING", ("waiting", None)),
    ("cancelled", None, ("missing", "because")),
    ("finished", None, ("failed", "because")),
])  # fmt: skip
def test_states_without_accounting(begin, queue, kind, queued, expected):
    folder, manifest = begin()
    if kind:
        attempts.write_attempt(folder / "jobs" / "0001", kind, 1, 0, "because")
    (folder / "slurm.json").write_text(json.dumps({"0": "12_0", "1": "12_1"}))
    queue("12_0 PENDING", *([f"12_1 {queued}"] if queued else []), "7 RUNNING")
    first, second = states.states(folder, manifest)
    assert first.state == "waiting"
    assert (second.state, second.error) == expected


def test_a_queue_that_cannot_be_asked_is_an_error(begin, queue):
    folder, manifest = begin()
    (folder / "slurm.json").write_text(json.dumps({"0": "12_0"}))
    queue(code=1)
    with pytest.raises(UserError, match="squeue: no list of running jobs"):
        states.states(folder, manifest)


def test_the_table_fits_its_width_and_the_terminal(begin):
    grid = {"learning_rate": [0.1], "data_dir": [f"{'long ' * 20}{n}" for n in range(40)]}
    folder, manifest = begin("none", {"seeds": 1, "grid": grid})
    found = [states.State("done", 3, 0.5)] * 39 + [states.State("failed", 2, None, "x" * 90)]
    lines = states.table(folder, manifest, found)
    assert len(lines) == 3 + 41
    assert max(map(len, lines)) == 80
    assert lines[-1] == "     " + "x" * 72 + "..."
    short = states.table(folder, manifest, found, rows=10)
    assert len(short) == 10
    assert short[3].startswith("0039 failed          2/3           0  data_dir=long")
    assert short[-1] == "…"


def test_the_table_is_live_on_a_terminal_until_all_is_over(begin, monkeypatch, capsys):
    folder, _ = begin()
    waits = states.State("waiting"), states.State("running", 1, 0.25)
    pictures = [waits, waits, [states.State("done", 3, 0.5), states.State("failed", 2, 0.1, "no")]]
    monkeypatch.setattr(states, "states", lambda *_: pictures.pop(0))
    monkeypatch.setattr(states, "REFRESH", 0)
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
    assert "no sbatch is on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
