"""Nothing is lost: stopped, killed, or with a full disk, a run continues as before."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from material import SMALL, assert_equal, at_call, sent

from benchmarks import kill
from lab.figures import drawing
from lab.folders import status as run_status
from lab.retraining import regressions
from lab.runs import resuming
from lab.runs import run as run_folder
from lab.system import files
from lab.system.command import Stopped, exit_code, stop_signals, whole_step
from lab.training import recording

ROOT = Path(__file__).parents[2]
ADAM = ["optimizer=Adam", "learning_rate=1e-3", "train_batch_size=50"]  # 4 steps an epoch
CASES = {
    "adam": ADAM,
    "dro": ["debias_method=GroupDRO", "learning_rate=0.1", "momentum=0.5"],
    "plain": ["train_batch_size=null", "learning_rate=0.1"],
    "caps": ["jacobian_num_samples=5", "gradient_gram_num_samples=3", "train_batch_size=50"],
}


def finished(go, case, results="whole"):
    """A folder of its own with the whole run of a case."""

    def make(results):
        assert go(*CASES[case], results=results)[0] == 0

    return go.copied(case, make, results)


# Where the run is when the signal comes, and the checkpoint (epoch, step) it leaves.
MOMENTS = {
    "evaluation of epoch 0": (recording.Recorder, "evaluate", 1, None),
    "the first step": (torch.optim.AdamW, "step", 1, (0, 1)),
    "a step of epoch 2": (torch.optim.AdamW, "step", 6, (1, 2)),
    "the last step of epoch 3": (torch.optim.AdamW, "step", 12, (2, 4)),
    "evaluation of epoch 3": (recording.Recorder, "evaluate", 4, (2, 4)),
    "between the tables of epoch 3": (run_folder.Run, "analysis", 9, None),
    "a checkpoint": (files, "save", 3, None),
    "DFR": (regressions, "tune", 1, (4, 0)),
    "plots": (drawing, "save", 2, (4, 0)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment(go, monkeypatch, moment):
    reference = finished(go, "adam")
    owner, name, call, position = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, sent(signal.SIGTERM))
        code, lines = go(*ADAM)
    folder = go.folder()
    assert code == 143
    assert lines[-1] == f"python main.py --resume {folder}"
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    kill.read_everything(folder)
    if position:
        newest = max((folder / "checkpoints").glob("epoch_*"))
        assert newest.name == "epoch_{:07d}_step_{:09d}.pt".format(*position)
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)
    assert len(list((folder / "checkpoints").glob("epoch_*"))) == 2


@pytest.mark.parametrize("case", ["dro", "plain", "caps"])
def test_stopped_and_killed_in_full_batch_and_with_caps(go, monkeypatch, case):
    reference = finished(go, case)

    class Killed(BaseException):
        """Nothing of ours runs any more."""

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 3, sent(signal.SIGUSR1))
        code, _ = go(*CASES[case])
        assert code == 128 + signal.SIGUSR1
    folder = go.folder()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_call(patch, recording.Recorder, "evaluate", 2, die)
        go("--resume", str(folder))
    with open(folder / "analysis.csv", "a") as table:
        table.write("3,train,gap_dyn")  # torn
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)
    rows = pd.read_csv(folder / "analysis.csv")
    measured = rows[(rows["quantity"] == "measured") & (rows["split"] == "train")]
    known = measured.groupby("epoch")["value"].apply(lambda values: values.notna().all())
    assert known.tolist() == [case == "plain"] * 4 + [False]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_exit_codes_of_signals(go, monkeypatch, name):
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.AdamW, "step", 2, sent(getattr(signal, name)))
        code, lines = go(*ADAM)
    assert code == 128 + getattr(signal, name)
    assert f"Stopped by {name}." in lines
    assert "To resume:" in lines


def test_a_second_interrupt_stops_at_once():
    ends = []

    def command():
        with stop_signals(), whole_step():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # clusters repeat it; the step continues
            ends.append("terminated")
            signal.raise_signal(signal.SIGINT)
            ends.append("interrupted")

    assert exit_code(command) == 143
    assert ends == ["terminated"]


@pytest.mark.parametrize(("number", "reported"), [(errno.EROFS, 2), (errno.ENOTDIR, None)])
def test_what_the_disk_refuses_elsewhere_is_reported_too(capsys, number, reported):
    def command():
        raise OSError(number, os.strerror(number), "/some/place")

    if reported is None:
        with pytest.raises(OSError, match="place"):
            exit_code(command)
    else:
        assert exit_code(command) == reported
        assert capsys.readouterr().err == "/some/place: Read-only file system\n"


def test_a_step_that_is_torn_is_in_no_checkpoint(go, monkeypatch):
    """A second Ctrl-C in the middle of a step of GroupDRO, after q has moved."""
    reference = finished(go, "dro")

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 3, twice)
        code, lines = go(*CASES["dro"])
    folder = go.folder()
    assert code == 130
    assert lines[-1] == f"python main.py --resume {folder}"
    assert sorted(p.name for p in (folder / "checkpoints").glob("epoch*")) == [
        "epoch_0000002_step_000000000.pt"
    ]
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)


def test_signals_are_repeated(go, monkeypatch):
    """The last words are said whatever signals come after the first."""
    reference = finished(go, "adam")
    real = run_folder.Run._record_end

    def stormed(self, error):
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGINT", "SIGTERM"):
            signal.raise_signal(getattr(signal, name))
        real(self, error)

    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.AdamW, "step", 6, sent(signal.SIGTERM))
        patch.setattr(run_folder.Run, "_record_end", stormed)
        code, lines = go(*ADAM)
    folder = go.folder()
    assert code == 143
    assert lines[-1] == f"python main.py --resume {folder}"
    assert run_status.read_status(folder)["state"] == "stopped"
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)


def test_a_full_disk_is_reported_even_if_a_signal_came_first(go, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def terminate():
        monkeypatch.setattr(files.os, "write", full)
        signal.raise_signal(signal.SIGTERM)

    at_call(monkeypatch, torch.optim.AdamW, "step", 6, terminate)
    code, lines = go(*ADAM)
    assert code == 2
    assert any("gram.npz: cannot be written, No space left on device" in line for line in lines)
    assert lines[-1] == f"python main.py --resume {go.folder()}"


class Gone:
    """A console that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = isatty = lambda self: False


def test_a_console_that_is_gone_stops_nothing(go, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        patch.setattr(sys, "stdout", Gone())
        code, _ = go(*ADAM)
    assert code == 0
    assert run_status.read_status(go.folder())["state"] == "done"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        at_call(patch, torch.optim.AdamW, "step", 6, sent(signal.SIGINT))
        assert go(*ADAM, results="stopped")[0] == 130
    assert (go.folder("stopped") / "checkpoints" / "epoch_0000001_step_000000002.pt").exists()


def test_whole_steps_are_whole_and_the_handlers_are_given_back():
    before, done = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Stopped), stop_signals(), whole_step():
        with whole_step():
            signal.raise_signal(signal.SIGTERM)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_dies_of_the_signal_is_not_our_fault():
    def command():
        with stop_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Stopped:
                raise RuntimeError("a worker process terminated") from None

    assert exit_code(command) == 143


def test_killed_before_the_first_checkpoint_it_starts_over(go, monkeypatch):
    reference = finished(go, "adam")

    def die():
        raise MemoryError("as good as killed")

    with monkeypatch.context() as patch, pytest.raises(MemoryError) as raised:
        at_call(patch, torch.optim.AdamW, "step", 6, die)
        go(*ADAM)
    folder = go.folder()
    assert raised.value.__notes__[-1] == f"python main.py --resume {folder}"
    assert not list((folder / "checkpoints").glob("epoch_*"))
    assert len(pd.read_csv(folder / "training_history.csv")) == 2
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)


def test_a_finished_run_says_so(go):
    folder = finished(go, "adam")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, lines = go("--resume", str(folder))
    assert (code, lines) == (0, [])
    assert go.out == f"{folder}: finished already, nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_more_epochs_are_as_if_they_had_been_asked_for_at_once(go):
    for case in ("plain", "adam"):
        code, _ = go(*CASES[case], "epochs=7", results=f"long_{case}")
        assert code == 0
        folder = finished(go, case, results=f"short_{case}")
        assert go("--resume", str(folder), "epochs=7")[0] == 0
        assert_equal(folder, go.folder(f"long_{case}"))
        resumed = json.loads((folder / "environment.json").read_text())["resumed"]
        assert [facts["command"] for facts in resumed] == [
            ["main.py", "--resume", str(folder), "epochs=7"]
        ]


def test_a_changed_configuration_is_refused_key_by_key(go, tmp_path):
    folder = finished(go, "adam")
    code, lines = go(
        "--resume", str(folder), "epochs=3", "learning_rate=0.5", "seed=1", "plot_format=svg",
        "gap_dynamics_factors.group_pairs=[]",
    )  # fmt: skip
    assert code == 2
    assert [line.split(":")[0] for line in lines] == [
        "seed", "epochs", "learning_rate", "gap_dynamics_factors"
    ]  # fmt: skip
    assert "epochs: given 3, but the run to resume has 4; allowed: 4 or more" in lines
    assert yaml.safe_load((folder / "config_used.yaml").read_text())["epochs"] == 4
    # The same configuration given anew, as a cluster does when it starts a job again.
    again = yaml.safe_load((folder / "config_used.yaml").read_text()) | {"num_workers": 2}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert go("--resume", str(folder), "--config", str(tmp_path / "again.yaml"))[0] == 0


def test_output_settings_may_change(go):
    folder = finished(go, "adam")
    before = (folder / "dfr_results.json").stat().st_mtime_ns
    assert go("--resume", str(folder), "plot_format=svg")[0] == 0
    assert (folder / "plots" / "training_history.svg").exists()
    assert (folder / "dfr_results.json").stat().st_mtime_ns == before
    assert yaml.safe_load((folder / "config_used.yaml").read_text())["plot_format"] == "svg"


def test_what_is_no_run_to_resume(go, tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        code, lines = go("--resume", str(folder))
        assert code == 2
        assert lines == [f"--resume: given {folder}, but there is no {folder}/config_used.yaml"]
    folder = finished(go, "plain")
    (folder / "status.json").write_text('{"phase": "training", "id": 3, "summary"')
    code, lines = go("--resume", str(folder))
    assert code == 2
    assert lines[0].startswith(f"{folder}/status.json: not readable")


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def stopped_run(go, monkeypatch):
    """A folder of its own with a run stopped in epoch 4, and its two checkpoints."""

    def make(results):
        with monkeypatch.context() as patch:
            at_call(patch, torch.optim.AdamW, "step", 14, sent(signal.SIGTERM))
            assert go(*ADAM, results=results)[0] == 143

    folder = go.copied("stopped", make, "results")
    return folder, sorted((folder / "checkpoints").glob("epoch_*"))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_taken(go, monkeypatch, tmp_path):
    reference = finished(go, "adam")
    folder, (_, newer) = stopped_run(go, monkeypatch)
    newer.write_bytes(newer.read_bytes()[:-500])
    code, lines = go("--resume", str(folder))
    assert code == 0
    assert any(f"{newer}: not readable" in line for line in lines)
    assert "Continuing from epoch 2" in lines
    assert_equal(folder, reference)


def test_a_single_bit_is_noticed(go, monkeypatch):
    reference = finished(go, "adam")
    folder, (_, newer) = stopped_run(go, monkeypatch)
    data = bytearray(newer.read_bytes())
    weights = torch.load(newer, weights_only=True)["model"]["layers.0.weight"].numpy().tobytes()
    data[data.index(weights) + 1000] ^= 4
    newer.write_bytes(data)
    code, lines = go("--resume", str(folder))
    assert code == 0
    assert any(f"{newer}: not readable" in line for line in lines)
    assert_equal(folder, reference)


@pytest.mark.parametrize("damage", ["gone", "garbage", "short"])
def test_matrices_that_are_missing_are_reported(go, monkeypatch, damage):
    folder, _ = stopped_run(go, monkeypatch)
    path = folder / "gram.npz"
    if damage == "short":
        with np.load(path) as kept:
            arrays = {name: kept[name][:1] for name in kept.files}
        np.savez(path, **arrays)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"PK garbage")
    code, lines = go("--resume", str(folder))
    assert code == 2
    assert lines[-1].startswith(f"{path}: missing or damaged")
    assert lines[-1].endswith(f"to start over, remove {folder / 'checkpoints'}")


def test_an_environment_that_cannot_be_read_is_reported(go, monkeypatch):
    folder, _ = stopped_run(go, monkeypatch)
    (folder / "environment.json").write_text('{"device": ')
    code, lines = go("--resume", str(folder))
    assert code == 0
    assert any("environment.json: not readable" in line for line in lines)


def test_damaged_tables_are_reported_with_what_to_do(go, monkeypatch):
    folder, _ = stopped_run(go, monkeypatch)
    table = folder / "analysis.csv"
    text = table.read_text()
    table.write_text(text.replace("quantity", "quantitY", 1))
    code, lines = go("--resume", str(folder))
    assert code == 2
    assert f"{table}: no column quantity" in lines


@pytest.mark.parametrize("name", ["config_yaml", "add_resumed"])
def test_an_extension_that_is_killed_at_once_is_not_finished(go, monkeypatch, name):
    go(*ADAM, "epochs=6", results="long")
    folder = finished(go, "adam")

    def die():
        raise MemoryError("as good as killed")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_call(patch, resuming, name, 1, die)
        go("--resume", str(folder), "epochs=6")
    assert go("--resume", str(folder), "epochs=6")[0] == 0
    assert_equal(folder, go.folder("long"))


def test_an_extension_that_diverges_leaves_no_results_of_another_network(go):
    keys = [
        "learning_rate=1.9",
        "loss_function=mse",
        "activation_function=identity",
        "momentum=0.9",
    ]
    code, _ = go(*keys, "epochs=0")
    assert code == 0
    folder = go.folder()
    code, lines = go("--resume", str(folder), "epochs=500")
    assert code == 2
    assert "training loss is" in lines[-1]
    assert run_status.read_status(folder)["summary"] == {}
    assert not list(folder.glob("dfr_*")) + list(folder.glob("model.pt"))


def test_a_run_that_another_process_has_changed_meanwhile(go, monkeypatch):
    folder, _ = stopped_run(go, monkeypatch)
    resumption = resuming.load_to_resume(folder, None, [])
    assert go("--resume", str(folder))[0] == 0
    with pytest.raises(resuming.UserError, match="another process has just resumed"):
        resuming.resume(resumption, "cpu", [])


@pytest.mark.parametrize("damage", ["pickle", "torch pickle", "garbage", "empty", "other"])
def test_checkpoints_from_strangers_are_refused(go, monkeypatch, tmp_path, damage):
    folder, paths = stopped_run(go, monkeypatch)
    trap = tmp_path / "trap"
    for path in paths:
        if damage == "pickle":
            path.write_bytes(pickle.dumps(Hostile(trap)))
        elif damage == "torch pickle":
            torch.save({"epoch": 1, "model": Hostile(trap)}, path)
        elif damage == "other":
            torch.save({"weights": torch.zeros(3)}, path)
        else:
            path.write_bytes(b"" if damage == "empty" else b"\x80garbage" * 50)
    code, lines = go("--resume", str(folder))
    assert code == 2
    assert not trap.exists()
    assert any("no usable checkpoint; to start over, remove this folder" in x for x in lines)


def test_tables_shorter_than_the_checkpoint_says(go, monkeypatch):
    reference = finished(go, "adam")
    folder, (_, newer) = stopped_run(go, monkeypatch)
    table = folder / "training_history.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))  # as after a power failure
    code, reported = go("--resume", str(folder))
    assert code == 0
    assert any(f"{newer}: not used, the tables are shorter" in line for line in reported)
    assert_equal(folder, reference)


def test_two_processes_cannot_have_the_same_run(go, monkeypatch):
    folder, _ = stopped_run(go, monkeypatch)
    # A lock belongs to a process: the other one has to be another.
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    hold += "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"\n"
        code, lines = go("--resume", str(folder))
        other.communicate(b"\n")
    assert other.returncode == 0
    assert code == 2
    assert lines[-3] == f"{folder}: in use by another process; wait for it or stop it"
    assert go("--resume", str(folder))[0] == 0


FULL = [(nth, errno.ENOSPC) for nth in (1, 4, 9, 14, 20, 27)]


@pytest.mark.parametrize(("nth", "code"), [*FULL, (7, errno.EROFS), (11, errno.EDQUOT)])
def test_disk_full_at_the_nth_write(go, monkeypatch, tmp_path, nth, code):
    reference = finished(go, "adam")
    real, calls = os.write, []

    def full(file, data):
        calls.append(1)
        if len(calls) >= nth:
            if len(calls) == nth:
                real(file, data[: len(data) // 2])  # half of it still fits
            raise OSError(code, os.strerror(code))
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        ended, lines = go(*ADAM)
    assert ended == 2
    (problem,) = [x for x in lines if re.search(r"cannot be written, .* bytes needed, ", x)][-1:]
    assert str(tmp_path / "results") in problem
    assert os.strerror(code) in problem
    if nth < 4:  # not even the folder
        assert list((tmp_path / "results").iterdir()) == []
        return
    folder = go.folder()
    assert lines[-1] == f"python main.py --resume {folder}"
    kill.read_everything(folder)
    text = (folder / "run.log").read_text()
    assert "bytes needed" in text
    assert go("--resume", str(folder))[0] == 0
    assert_equal(folder, reference)


def test_a_real_limit_on_file_sizes(tmp_path, data_dir):
    """The operating system itself refuses, through every writer that there is."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "import main; sys.exit(main.main(sys.argv[1:]))"
    )
    (tmp_path / "c.yaml").write_text("experiment_name: small\n")
    done = subprocess.run(
        [sys.executable, "-c", limited, "--config", str(tmp_path / "c.yaml"), *SMALL,
         f"data_dir={data_dir}", f"results_dir={tmp_path / 'results'}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert re.search(r"cannot be written, File too large, [\d,]+ bytes needed", done.stderr)
    (folder,) = (tmp_path / "results").iterdir()
    assert done.stderr.splitlines()[-1] == f"python main.py --resume {folder}"
    kill.read_everything(folder)


def test_a_log_that_cannot_be_written_is_reported_once(go, monkeypatch, capsys):
    def full(self, record):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            self.handleError(record)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder._LogFile, "emit", full)
        code, lines = go(*ADAM)
    assert code == 0
    assert sum("run.log: cannot be written, No space left" in line for line in lines) == 1


def test_growing_files_have_whole_records_only(tmp_path, monkeypatch):
    growing = files.Growing(tmp_path / "t.csv")
    growing.append(b"one\n")
    real = os.write

    def half(file, data):
        if len(data) < 4:
            raise KeyboardInterrupt
        return real(file, data[:2])

    monkeypatch.setattr(files.os, "write", half)
    with pytest.raises(KeyboardInterrupt):
        growing.append(b"a\nbc\n")
    monkeypatch.undo()
    assert (tmp_path / "t.csv").read_bytes() == b"one\n"
    growing.append(b"two\n")
    growing.close()
    assert (tmp_path / "t.csv").read_bytes() == b"one\ntwo\n"
    assert growing.size == 8


def test_torn_lines_are_cut(tmp_path):
    path = tmp_path / "t.csv"
    for before, after in ((b"a\nb\nc", b"a\nb\n"), (b"a", b""), (b"a\n", b"a\n"), (b"", b"")):
        path.write_bytes(before)
        files.cut_torn_line(path)
        assert path.read_bytes() == after


def test_wandb_goes_on_with_the_same_run(go, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.AdamW, "step", 6, sent(signal.SIGTERM))
        go(*ADAM, "wandb.enable=true", "wandb.mode=offline")
    folder = go.folder()
    assert go("--resume", str(folder))[0] == 0
    found = {path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}
    assert found == {json.loads((folder / "status.json").read_text())["id"]}


def test_status_of_a_run(go, monkeypatch):
    folder = finished(go, "adam")
    status = run_status.read_status(folder)
    assert (status["state"], status["phase"], status["error"]) == ("done", "done", None)
    last = pd.read_csv(folder / "training_history.csv").iloc[-1]
    assert status["summary"]["test_worst_acc"] == pytest.approx(last["test_worst_acc"])
    assert np.isfinite(status["summary"]["dfr_test_worst_acc"])
    code, lines = go(
        "learning_rate=1e6", "loss_function=mse", "activation_function=identity", results="diverged"
    )
    assert code == 2
    status = run_status.read_status(go.folder("diverged"))
    assert status["state"] == "failed"
    assert status["error"] == lines[-1]


def test_runs_killed_at_random_moments(capsys):
    assert kill.main(2, seed=1) == 0
    assert capsys.readouterr().out.count(": equal\n") == 2
