"""Searching with optuna: the section's checks, workers that share a journal, pruning, going on.

The children are a small script that writes the files of a run, without training.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest

import sweep
from lab.sweeping import (
    attempts,
    collect,
    figures,
    journal,
    manifests,
    plan,
    search,
    space,
)
from lab.system.errors import ConfigError

ROOT = Path(__file__).parents[2]

# Stands for main.py. The accuracy grows with the learning rate and the epochs; it ends at
# learning_rate + seed / 100. What else it does is reported by experiment_name.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

if sys.argv[1] == "--resume":
    run = Path(sys.argv[2])
    given = json.loads((run / "given.json").read_text())
else:
    given = dict(argument.split("=", 1) for argument in sys.argv[3:])
    run = Path(given["results_dir"]) / "run_2026"
    run.mkdir()
    (run / "given.json").write_text(json.dumps(given))
with open(run / "attempts", "a") as file:
    file.write(f"{os.getpid()}\\n")
task, epochs = given["experiment_name"], int(given.get("epochs", 3))
end = float(given["learning_rate"]) + int(given["seed"]) / 100
groups = 9 if task == "groups" else 4
metric = "minority_acc" if task == "groups" else "worst_acc"


def print_lines(state, summary={}):
    reported = {"state": state, "phase": "training", "error": None, "id": "x", "summary": summary}
    (run / ".new").write_text(json.dumps(reported))
    os.replace(run / ".new", run / "status.json")


def stop(signum, frame):
    print_lines("stopped")
    sys.exit(128 + signum)


signal.signal(signal.SIGTERM, stop)
print_lines("running")
if task == "fail" and float(given["learning_rate"]) > 0.5:
    print("learning_rate: too large\\nTo resume:\\npython main.py --resume", run)
    sys.exit(2)
names = ["epoch", "val_worst_acc", "val_minority_acc", "test_worst_acc"]
names += [f"test_group_{g}_acc" for g in range(groups)]
history = run / "training_history.csv"
if not history.exists():
    history.write_text(",".join(names) + "\\n")
for epoch in range(len(history.read_text().splitlines()) - 1, epochs + 1):
    values = {"val_worst_acc": 0.001, "val_minority_acc": 0.001, "test_worst_acc": 0.5}
    values["val_" + metric] = end * epoch / epochs
    row = [epoch, *values.values(), *[0.5] * groups]
    with open(history, "a") as file:
        file.write(",".join(map(str, row)) + "\\n")
    while task == "wait" and epoch == 1 and not (run.parent.parent / "go").exists():
        time.sleep(0.01)
    if task == "slow":
        time.sleep(0.3)
summary = {"val_worst_acc": end, "test_worst_acc": 0.5, "test_avg_acc": 0.5}
print_lines("done", summary | {"test_adjusted_acc": 0.5})
"""
SPACE = {"learning_rate": {"uniform": [0.1, 0.9]}, "hidden_dim": {"choice": [8, 16]}}
SECTION = {"trials": 4, "search_space": SPACE, "pruner": "NopPruner"}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(attempts, "PROGRAM", path)
    return path


@pytest.fixture
def searched(tmp_path, stand_in):
    """searched(**section) -> the folder of a sweep that is to be searched."""

    def make(name="sweep", seeds=(0,), task="quick", overrides=(), **section):
        folder = tmp_path / name
        folder.mkdir()
        (folder / manifests.BASE).write_text("num_val_samples: 100\n")
        manifest = {
            "name": name,
            "config": "base.yaml",
            "base_overrides": [f"experiment_name={task}", *overrides],
            "keys": [],
            "seeds": list(seeds),
            "settings": [],
            "jobs": [],
            "optuna": SECTION | section,
        }
        manifests.write_manifest(folder, manifest)
        return folder

    return make


def trials_of(folder):
    return pd.read_csv(folder / "trials.csv", keep_default_na=False, na_values=["nan"])


def start_worker(folder, stand_in):
    code = (
        "import sys; from pathlib import Path; from lab.system.command import exit_code\n"
        "from lab.sweeping import attempts, search\n"
        f"attempts.PROGRAM = Path({str(stand_in)!r})\n"
        f"sys.exit(exit_code(lambda: search.work(Path({str(folder)!r}), poll=0.02)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_takes_all_trials_and_tells_them(searched, capfd):
    folder = searched()
    search.work(folder, poll=0.02)
    trials = trials_of(folder)
    assert trials.trial.tolist() == [0, 1, 2, 3] and set(trials.state) == {"done"}
    assert trials.value.tolist() == pytest.approx(trials.learning_rate.tolist())  # the last epoch's
    assert trials.epoch.tolist() == [3, 3, 3, 3]
    assert set(trials.hidden_dim) <= {8, 16} and trials.learning_rate.between(0.1, 0.9).all()
    for trial in trials.itertuples():
        run = folder / trial.folder / "run_2026"
        given = json.loads((run / "given.json").read_text())
        assert float(given["learning_rate"]) == trial.learning_rate  # exactly
        assert given["seed"] == "0" and given["wandb.group"] == "sweep"
    best = trials.loc[trials.value.idxmax()]
    assert (
        f"Best trial: {best.trial}, validation accuracy {best.value:.4f}" in capfd.readouterr().err
    )
    assert journal.show_status(folder) == 0
    first = trials.iloc[0]
    line = f"0000 done         3 {first.value:.3f}  learning_rate={first.learning_rate:.4g}, hidden"
    assert capfd.readouterr().out.startswith(line)
    search.work(folder, poll=0.02)  # nothing is left
    assert len(trials_of(folder)) == 4


def test_the_value_is_the_mean_over_the_seeds(searched):
    folder = searched(seeds=(0, 4), trials=1)
    search.work(folder, poll=0.02)
    (trial,) = trials_of(folder).itertuples()
    assert trial.value == pytest.approx(trial.learning_rate + 0.02)
    runs = sorted(path.parent.name for path in folder.glob("jobs/0000/*/run_2026"))
    assert runs == ["seed_0", "seed_4"]


def test_of_many_groups_the_minority_counts(searched):
    folder = searched(task="groups", trials=1)
    search.work(folder, poll=0.02)
    (trial,) = trials_of(folder).itertuples()
    assert trial.value == pytest.approx(trial.learning_rate)


def test_a_study_that_goes_on_draws_what_it_would_have_drawn(searched):
    """With one worker; TPE draws the first trials at random, the others by what came of these."""
    options = {"n_startup_trials": 3}
    whole = searched("whole", trials=6, sampler_options=options)
    parts = searched("parts", trials=2, sampler_options=options)
    search.work(whole, poll=0.02)
    search.work(parts, poll=0.02)
    manifest = manifests.read_manifest(parts)
    manifest["optuna"]["trials"] = 6
    manifests.write_manifest(parts, manifest)
    search.work(parts, poll=0.02)
    assert trials_of(parts).equals(trials_of(whole))
    assert trials_of(whole).learning_rate.nunique() == 6


def test_draws_differ_from_trial_to_trial_and_with_the_seed(searched):
    drawn = []
    for seed in (0, 1):
        options = {"sampler": "RandomSampler", "sampler_options": {"seed": seed}}
        folder = searched(f"seed{seed}", trials=3, **options)
        search.work(folder, poll=0.02)
        drawn += trials_of(folder).learning_rate.tolist()
    assert len(set(drawn)) == 6


@pytest.mark.filterwarnings("ignore:.*QMCSampler is experimental")
def test_a_quasi_random_sequence_is_one_sequence(searched):
    folder = searched(sampler="QMCSampler", sampler_options={"scramble": True}, trials=5)
    search.work(folder, poll=0.02)
    drawn = trials_of(folder).learning_rate[1:]  # QMC draws the first one independently
    assert sorted((4 * (drawn - 0.1) / 0.8).astype(int)) == [0, 1, 2, 3]  # one in each quarter


def test_a_failed_trial_does_not_stop_the_others(searched):
    folder = searched(task="fail", trials=6)
    search.work(folder, poll=0.02)
    trials = trials_of(folder)
    failed = trials.learning_rate > 0.5
    assert 0 < failed.sum() < 6
    assert (trials.state == failed.map({True: "failed", False: "done"})).all()
    assert set(trials.error[failed]) == {"learning_rate: too large"}


def test_two_workers_share_a_study(searched, stand_in):
    folder = searched(trials=8)
    workers = [start_worker(folder, stand_in) for _ in range(2)]
    reported = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], reported
    trials = trials_of(folder)
    assert trials.trial.tolist() == list(range(8)) and set(trials.state) == {"done"}
    assert trials.learning_rate.nunique() == 8
    attempts = [path.read_text().split() for path in folder.glob("jobs/*/run_2026/attempts")]
    assert [len(each) for each in attempts] == [1] * 8  # none twice
    shares = [Counter(line.split(":")[0] for line in text.splitlines()) for text in reported]
    assert all(any(f"Trial {n}" in share for n in range(8)) for share in shares)  # both had some


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_an_abandoned_trial_is_gone_on_with(searched, stand_in, signum):
    folder = searched(task="wait", trials=2)
    worker = start_worker(folder, stand_in)
    run = folder / "jobs/0000/run_2026"
    history = run / "training_history.csv"
    wait_for(lambda: history.exists() and len(history.read_text().splitlines()) == 3)
    worker.send_signal(signum)
    worker.communicate(timeout=60)
    if signum == signal.SIGKILL:  # its child is still there
        os.kill(int((run / "attempts").read_text()), signal.SIGKILL)
    else:
        assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert journal.table(folder).state.tolist() == ["running"]
    (folder / "jobs" / "go").touch()
    search.work(folder, poll=0.02)
    trials = trials_of(folder)
    assert trials.state.tolist() == ["done", "done"]
    assert trials.folder.tolist() == ["jobs/0000", "jobs/0002"]  # of trials 1 and 2; 0 was replaced
    assert len((run / "attempts").read_text().split()) == 2
    assert trials.value[0] == pytest.approx(trials.learning_rate[0])
    given = json.loads((run / "given.json").read_text())
    assert float(given["learning_rate"]) == trials.learning_rate[0]


def test_a_trial_that_has_just_ended_is_not_abandoned(searched):
    folder = searched(trials=1)
    search.work(folder, poll=0.02)
    study = journal.open_study(folder)
    (trial,) = study.get_trials()
    trial.state = optuna.trial.TrialState.RUNNING  # as it was seen before it ended
    assert not search._abandoned(folder, study, trial)


def test_a_trial_that_someone_works_on_is_left_alone(searched, stand_in):
    folder = searched(task="wait", trials=1)
    worker = start_worker(folder, stand_in)
    wait_for((folder / "jobs/0000/run_2026").exists)
    search.work(folder, poll=0.02)
    assert trials_of(folder).state.tolist() == ["running"]
    (folder / "jobs" / "go").touch()
    worker.communicate(timeout=60)
    assert trials_of(folder).state.tolist() == ["done"]


def test_a_trial_without_promise_is_pruned_and_its_child_stopped(searched):
    options = {"lower": 0.15, "n_warmup_steps": 1}  # of the first epoch of three
    space = {"learning_rate": {"choice": [0.2, 0.8]}}
    folder = searched(
        task="slow", trials=4, search_space=space, pruner="ThresholdPruner", pruner_options=options
    )
    search.work(folder, poll=0.05)
    trials = trials_of(folder)
    weak = trials.learning_rate == 0.2
    assert 0 < weak.sum() < 4
    assert (trials.state == weak.map({True: "pruned", False: "done"})).all()
    for trial in trials.itertuples():
        status = json.loads((folder / trial.folder / "run_2026/status.json").read_text())
        assert status["state"] == ("stopped" if trial.state == "pruned" else "done")
    assert (trials.epoch[weak] < 3).all()


def test_half_a_line_of_a_machine_that_went_down_does_no_harm(searched):
    folder = searched(trials=2)
    search.work(folder, poll=0.02)
    with open(folder / journal.JOURNAL, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    manifest = manifests.read_manifest(folder)
    manifest["optuna"]["trials"] = 3
    manifests.write_manifest(folder, manifest)
    search.work(folder, poll=0.02)
    assert trials_of(folder).state.tolist() == ["done"] * 3


def test_several_workers_are_started_and_the_exit_code_tells_of_failures(
    searched, stand_in, monkeypatch, capfd
):
    code = "import sys; from pathlib import Path; from lab.sweeping import attempts, search; "
    code += f"attempts.PROGRAM = Path({str(stand_in)!r}); search.work(Path(sys.argv[1]), poll=0.02)"
    monkeypatch.setattr(search, "WORKER", [sys.executable, "-c", code])
    folder = searched(trials=3)
    assert search.run(folder, manifests.read_manifest(folder), 2) == 0
    out = capfd.readouterr().out.splitlines()
    assert out == ["3 trials: 3 done", f"Results: {folder}"]
    folder = searched("failing", task="fail", search_space={"learning_rate": {"choice": [0.9]}})
    assert search.run(folder, manifests.read_manifest(folder), 1) == 1
    capfd.readouterr()
    assert journal.show_status(folder) == 1
    line = "0000 failed                learning_rate=0.9\n     learning_rate: too large\n"
    assert capfd.readouterr().out.startswith(line)


def test_finished_trials_are_collected_as_settings(searched, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    folder = searched(task="fail", trials=6, seeds=(0, 1))
    search.work(folder, poll=0.02)
    collect.collect(folder)
    trials = trials_of(folder)
    done = trials[trials.state == "done"]
    summary = pd.read_csv(folder / "summary.csv")
    assert summary.setting.tolist() == done.trial.tolist()
    assert summary.seeds.tolist() == [2] * len(done)
    assert summary.learning_rate.tolist() == pytest.approx(done.learning_rate.tolist())
    assert summary.val_worst_acc_mean.tolist() == pytest.approx(done.value.tolist())
    text = (folder / "summary.md").read_text()
    assert f"{len(done)} done" in text and f"{6 - len(done)} failed" in text
    best = done.loc[done.value.idxmax()]
    assert f"learning\\_rate={best.learning_rate:.4g}" in text.partition("Best setting")[2]


@pytest.fixture
def problems(tmp_path):
    """problems(base text, **section) -> the lines of the `ConfigError`."""

    def of(base="num_val_samples: 100\n", overrides=(), **section):
        (tmp_path / "base.yaml").write_text(base)
        with pytest.raises(ConfigError) as error:
            space.check(SECTION | section, tmp_path / "base.yaml", list(overrides), [0])
        return list(error.value.problems)

    return of


@pytest.mark.parametrize("cluster", ["slurm", "debug"])
def test_a_search_runs_where_it_is_started(tmp_path, monkeypatch, capsys, cluster):
    monkeypatch.setattr("shutil.which", lambda name: name)
    (tmp_path / "base.yaml").write_text(f"num_val_samples: 10\nresults_dir: {tmp_path / 'results'}")
    text = json.dumps({"config": str(tmp_path / "base.yaml"), "seeds": 1, "optuna": SECTION})
    (tmp_path / "find.yaml").write_text(text)
    assert sweep.main([str(tmp_path / "find.yaml"), "--cluster", cluster]) == 2
    assert f"--cluster: given {cluster}, but the section optuna" in capsys.readouterr().err
    assert sweep.main([str(tmp_path / "find.yaml"), "num_val_samples=0"]) == 2
    assert "num_val_samples: given 0, but the search goes by" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_example_in_the_readme_is_a_section(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (
        (ROOT / "docs" / "sweeps.md")
        .read_text(encoding="utf-8")
        .partition("## Search with optuna")[2]
    )
    (tmp_path / "example.yaml").write_text(text.split("```")[1].removeprefix("yaml"))
    planned = plan.read(tmp_path / "example.yaml")
    section = space.check(planned.optuna, planned.base, planned.overrides, planned.seeds)
    assert section.trials == 30 and len(section.space) == 4


def test_without_a_validation_split_nothing_starts(problems):
    (line,) = problems("num_val_samples: 0\n")
    assert line.startswith("num_val_samples: given 0, but the search goes by validation accuracy")
    (line,) = problems("dataset_name: Dominoes\nuse_dfr: false\n", ["val_target_size=0"])
    assert line.startswith("val_target_size: given 0")


@pytest.mark.parametrize(
    ("section", "reported"),
    [
        ({"trials": 0}, "optuna.trials: given 0; allowed: a whole number from 1"),
        ({"trails": 3}, "optuna.trails: no such key; allowed: trials, search_space"),
        ({"sampler": "TPESample"}, "optuna.sampler: given 'TPESample' (text); allowed: TPESampler"),
        ({"sampler": "GridSampler"}, "optuna.sampler: given 'GridSampler' (text); allowed: "),
        ({"sampler": ["TPESampler"]}, "optuna.sampler: given ['TPESampler']; allowed: "),
        ({"pruner": "median"}, "optuna.pruner: given 'median' (text); allowed: "),
        ({"pruner": None}, "optuna.pruner: given null; allowed: "),
        ({"sampler_options": {"sead": 1}}, "optuna.sampler_options: given {'sead': 1}; TPESampler"),
        ({"sampler_options": [1]}, "optuna.sampler_options: given [1]; allowed: a mapping"),
        ({"search_space": {}}, "optuna.search_space: given {}; allowed: a distribution"),
        (
            {"search_space": {"seed": {"choice": [1, 2]}}},
            "optuna.search_space.seed: the sweep sets it",
        ),
        (
            {"search_space": {"learning_rate": {"normal": [0, 1]}}},
            "optuna.search_space.learning_rate: given {'normal': [0, 1]}; allowed: {uniform|",
        ),
        (
            {"search_space": {"learning_rate": {"log_uniform": [0, 1]}}},
            "optuna.search_space.learning_rate.log_uniform: given [0, 1]; allowed: [low, high]",
        ),
        (
            {"search_space": {"dfr_c_options": {"choice": [[1.0], [2.0]]}}},
            "optuna.search_space.dfr_c_options.choice: given [[1.0], [2.0]]; allowed with optuna",
        ),
        (
            {"search_space": {"learning_rat": {"uniform": [0.1, 1]}}},
            "learning_rat: given 0.1, but there is no such key; did you mean learning_rate?",
        ),
        (
            {"search_space": {"momentum": {"uniform": [0.1, 1]}}},
            "momentum: given 1; allowed: a number from 0 below 1",
        ),
    ],
)
def test_mistakes_in_the_section_are_reported(problems, section, reported):
    (line,) = [line for line in problems(**section) if line.startswith(reported)]
    assert line


@pytest.mark.parametrize("kind", ["sampler", "pruner"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_sampler_and_pruner_can_be_made_or_says_what_it_lacks(problems, tmp_path, kind):
    module, made, lacking = getattr(optuna, f"{kind}s"), set(), {}
    (line,) = problems(**{kind: "x"})
    for name in line.partition("allowed: ")[2].split(", "):
        assert hasattr(module, name)
        try:
            space.check(SECTION | {kind: name}, tmp_path / "base.yaml", [], [0])
            made.add(name)
        except ConfigError as error:
            lacking[name] = str(error)
    for name, reported in lacking.items():
        assert reported.startswith(f"optuna.{kind}_options: given {{}}; {name} says: ")
    usual = {"sampler": {"TPESampler", "RandomSampler"}, "pruner": {"MedianPruner", "NopPruner"}}
    assert made >= usual[kind]
