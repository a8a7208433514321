"""A sweep on a real SLURM: a cluster of one node on this machine, for as long as the test runs.

There is no accounting in it, as on many small clusters.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

import sweep
from lab.sweeping import (
    manifests,
    slurm,
    states,
)

pytestmark = pytest.mark.slurm
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
# Where an installation is allowed.
ALLOWED = ("CI", "SPURIOUS_SLURM_TEST")
LONG = 600  # epochs, some seconds
LOGS = (".out", ".err", ".log")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster():
    """Starts munged, slurmctld and slurmd, and stops them; yields the folder of their logs."""
    _install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets need a short path
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, ports=_free_ports(2), folder=folder).lstrip()
    )
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    files = ("munge.key", "munge.socket", "munged.pid", "munged.log", "munged.seed")
    munge = [f"--{name}={folder / file}" for name, file in zip(names, files)]
    daemons = []
    try:
        daemons.append(_start(folder, ["munged", "--foreground", "--force", *munge]))
        _await_up(lambda: (folder / "munge.socket").exists(), folder, daemons)
        daemons.append(_start(folder, ["slurmctld", "-D"]))
        daemons.append(_start(folder, ["slurmd", "-D", "-N", host]))
        _await_up(lambda: "idle" in _output("sinfo", "--noheader", "--format=%T"), folder, daemons)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root", "--quiet"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _install() -> None:
    """Skips the test with the reason where there is no SLURM and none may be installed."""
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("SLURM's daemons need Linux and root")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if not any(os.environ.get(name) not in (None, "", "0") for name in ALLOWED):
        pytest.skip(f"no SLURM here; {' or '.join(ALLOWED)}=1 allows to install {PACKAGES}")
    if not shutil.which("apt-get"):
        pytest.skip("no SLURM here, and no apt-get to install it")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "--quiet", *command], env=quiet, capture_output=True)
        if done.returncode:
            pytest.skip(f"apt-get {command[0]} fails: {done.stderr.decode()[-300:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(folder: Path, command: list[str]) -> subprocess.Popen:
    with open(folder / f"{command[0]}.out", "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _await_up(condition, folder: Path, daemons) -> None:
    end = time.monotonic() + 60
    while not condition():
        died = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if died or time.monotonic() > end:
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.out"))
            raise AssertionError(f"ended: {died}\n{logs}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory):
    """Four jobs: two are over at once, two last a few seconds."""
    folder = tmp_path_factory.mktemp("sweep")
    base = {
        "num_train_samples": 200, "num_test_samples": 60, "num_val_samples": 60, "hidden_dim": 8,
        "train_batch_size": None, "learning_rate": 0.01, "use_dfr": False, "checkpoint_every": None,
        "show_and_save_samples": False, "wandb": {"enable": False},
        "data_dir": str(folder / "data"), "results_dir": str(folder / "results"),
    }  # fmt: skip
    base |= {"analyses": "none"}
    (folder / "base.yaml").write_text(yaml.dump(base))
    whole = {
        "config": str(folder / "base.yaml"),
        "seeds": 2,
        "list": [{"epochs": 2}, {"epochs": LONG}],
        "slurm": {"time": 5, "array": 3, "partition": "none"},
    }
    (folder / "four.yaml").write_text(yaml.dump(whole))
    return folder / "four.yaml"


def _await(condition, folder: Path, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pages = [
                f"{p}:\n{p.read_text()[-1000:]}" for p in folder.rglob("*") if p.suffix in LOGS
            ]
            raise AssertionError("\n".join([_output("squeue"), *pages]))
        time.sleep(0.1)


@pytest.fixture(scope="module")
def finished(cluster, sweep_file):
    """The folder of the sweep after all that happens to it here."""
    assert sweep.main([str(sweep_file), "--cluster", "slurm"]) == 2  # no such partition
    (folder,) = (sweep_file.parent / "results" / "sweeps").iterdir()
    assert sweep.main(["--resume", str(folder), "--partition", "short"]) == 0
    manifest = manifests.read_manifest(folder)
    state = lambda job: states.states(folder, manifest)[job]
    ids = slurm.submitted_ids(folder)
    array = {name.partition("_")[0] for name in ids.values()}
    assert len(array) == 1 and sorted(ids) == ["0", "1", "2", "3"]  # one array
    assert state(3).state == "waiting"  # the array runs three at once
    _await(lambda: (state(2).epoch or 0) > 0, folder)
    assert state(2).state == "running"
    subprocess.run(["scancel", "--signal=USR2", ids["2"]], check=True)  # its time is nearly over
    _await(lambda: (state(3).epoch or 0) > 0, folder)
    assert state(3).state == "running"
    subprocess.run(["scancel", ids["3"]], check=True)
    _await(lambda: state(3).state == "missing", folder)
    assert state(3).error == "Stopped by SIGTERM."
    _await(lambda: [state(job).state for job in range(3)] == ["done"] * 3, folder)
    assert sweep.main(["--status", str(folder)]) == 1
    assert sweep.main(["--resume", str(folder), "--partition", "short"]) == 0
    again = slurm.submitted_ids(folder)
    assert {job for job in ids if again[job] != ids[job]} == {"3"}
    _await(lambda: state(3).state not in ("waiting", "running"), folder)
    _await(lambda: not _output("squeue", "--noheader"), folder)  # the last word is written, too
    return folder


def test_cancelled_and_pre_empted_jobs_go_on(finished, capsys):
    assert sweep.main(["--status", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [finished.name, "4 jobs: 4 done"]
    assert sweep.main(["--resume", str(finished)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    for job, attempts in enumerate([1, 1, 2, 2]):
        place = finished / "jobs" / f"{job:04d}"
        reported = json.loads((place / "job.json").read_text())
        expected = {"state": "finished", "returncode": 0, "error": None, "attempt": attempts}
        assert reported == expected
        (run,) = place.glob("*/status.json")  # one run, however many attempts
        history = pd.read_csv(run.parent / "training_history.csv")
        assert history["epoch"].tolist() == list(range(LONG + 1 if job > 1 else 3))
        resumed = json.loads((run.parent / "environment.json").read_text()).get("resumed", [])
        assert len(resumed) == attempts - 1


def test_its_runs_are_collected(finished):
    assert sweep.main(["--collect", str(finished)]) == 0
    summary = pd.read_csv(finished / "summary.csv")
    assert summary["seeds"].tolist() == [2, 2]
