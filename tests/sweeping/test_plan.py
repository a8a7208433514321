"""From a sweep file to its jobs and its manifest."""

import math
import shlex
from pathlib import Path

import pytest

import sweep
from lab.config import loading, strict_yaml
from lab.sweeping import (
    attempts,
    grids,
    manifests,
    plan,
)
from lab.system.errors import ConfigError

ROOT = Path(__file__).parents[2]
PRESETS = sorted(ROOT.glob("sweeps/*.yaml"))


def problems(path, *overrides):
    with pytest.raises(ConfigError) as error:
        plan.read(path, overrides)
    return error.value.problems


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
    name = grids.setting_name(read.settings[1], read.keys)
    assert name == "debias_method=None, train_correlation=0.8"


def test_a_list_has_the_settings_as_they_are_written(write):
    entries = [{}, {"optimizer": "Adam", "learning_rate": 0.01}, {"learning_rate": 0.5}]
    read = plan.read(write({"seeds": 3, "list": entries}))
    assert read.settings == entries
    assert read.seeds == [0, 1, 2]
    assert read.keys == ["optimizer", "learning_rate"]
    names = [grids.setting_name(setting, read.keys) for setting in entries]
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
    assert strict_yaml.parse(grids.override_text(value), "key") == value


BAD = {
    "seeds: given null": {"grid": {"epochs": [1]}},
    "seeds: given 0": {"seeds": 0, "grid": {"epochs": [1]}},
    "seeds: given true": {"seeds": True, "grid": {"epochs": [1]}},
    "seeds: given [1, 1], with one twice": {"seeds": [1, 1], "grid": {"epochs": [1]}},
    "gird: no such key": {"seeds": 1, "gird": {}, "grid": {"epochs": [1]}},
    "given grid and list": {"seeds": 1, "grid": {"epochs": [1]}, "list": [{}]},
    "nothing given; allowed: one of grid": {"seeds": 1},
    "grid.epochs: given 1; allowed: a list": {"seeds": 1, "grid": {"epochs": 1}},
    "grid.epochs: 2 given twice": {"seeds": 1, "grid": {"epochs": [2, 3, 2]}},
    "grid.seed: the sweep sets it; allowed: seeds": {"seeds": 1, "grid": {"seed": [1]}},
    "grid.results_dir: the sweep sets": {"seeds": 1, "grid": {"results_dir": ["a"]}},
    "every setting: epoch: given 1": {"seeds": 1, "grid": {"epoch": [1], "momentum": [0, 0.5]}},
    "grid.epochs=3; momentum: no such": {"seeds": 1, "grid": {"epochs=3; momentum": [1]}},
    "grid: 1,000,000 settings": {
        "seeds": 1, "grid": {"epochs": list(range(1000)), "hidden_dim": list(range(1000))}
    },
    "grid, seeds: 1 settings × 10001 seeds": {"seeds": 10**9, "grid": {"epochs": [1]}},
    "list: given {}": {"seeds": 1, "list": {}},
    "list: {'epochs': 2} given twice": {"seeds": 1, "list": [{"epochs": 2}, {"epochs": 2}]},
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
def test_mistakes_are_reported_in_one_line(write, expected):
    reported = problems(write(BAD[expected]))
    assert any(expected in problem for problem in reported), reported


def test_a_problem_names_its_setting(write):
    grid = {"train_correlation": [0.5, 2], "debias_method": ["None", "SCALE"]}
    reported = problems(write({"seeds": 2, "grid": grid}))
    first, second = "train_correlation=2, debias_method=None", "0.5, debias_method=SCALE"
    assert any(f"setting 2 ({first}) and 1 more: train_correlation: given 2" in t for t in reported)
    assert any(f"setting 1 (train_correlation={second}) and 1 more: debias" in t for t in reported)


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
    arguments = attempts.Attempt(folder, manifest["jobs"][1]).command()[2:]
    job = loading.load_config(arguments[1], arguments[2:])
    assert (job.epochs, job.learning_rate, job.hidden_dim, job.seed) == (3, 0.1, 8, 1)
    assert job.results_dir == str(folder / "jobs" / "0001")
    assert job.wandb.group == folder.name


def test_a_new_sweep_never_takes_an_old_folder(begin, monkeypatch):
    monkeypatch.setattr(manifests.creating, "now", lambda: "then")
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
