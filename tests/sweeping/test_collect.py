"""Collecting a sweep: its numbers against direct computations, the choice of the best setting."""

import json
import math
import re
import shutil
import subprocess
from itertools import product

import numpy as np
import pandas as pd
import pytest
import yaml

from lab.config import seeds
from lab.sweeping import collect, figures
from lab.system.errors import UserError

TERMS = ("term1", "term2", "term3", "total")


def name_of(overrides):
    return ", ".join(f"{key}={value}" for key, value in overrides.items())


def write_run(folder, rng, quality, epochs, val, groups, dfr, analysis):
    """The files of a finished run that collecting reads, with random numbers around `quality`."""
    folder.mkdir(parents=True)
    splits = ["train", "test", *["val"] * val]
    rows = []
    for epoch in range(epochs + 1):
        row = {"epoch": epoch}
        for split in splits:
            level = quality * (1 - math.exp(-epoch / 2))
            for metric in ("avg_acc", "adjusted_acc", "minority_acc", "majority_acc", "worst_acc"):
                gain = {"avg_acc": 0.2, "adjusted_acc": 0.3}.get(metric, 0)
                noise = rng.normal(0, 0.02)
                row[f"{split}_{metric}"] = min(1, max(0, level + gain + noise))
            row[f"{split}_avg_loss"] = math.exp(-level) + abs(rng.normal(0, 0.01))
            for group in range(groups):
                row[f"{split}_group_{group}_acc"] = level
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "training_history.csv", index=False)
    summary = {name: value for name, value in rows[-1].items() if name != "epoch"}
    if val:
        best = max(rows, key=lambda row: row["val_worst_acc"])
        summary["best_epoch"] = best["epoch"]
        summary |= {f"best_{k}": v for k, v in best.items() if k != "epoch"}
    if dfr:
        names = [f"{split}_{m}" for split in splits for m in collect.METRICS]
        summary |= {f"dfr_{n}": min(1, summary[n] + 0.1 + rng.normal(0, 0.01)) for n in names}
    status = {"state": "done", "phase": "done", "error": None, "id": "0", "summary": summary}
    (folder / "status.json").write_text(json.dumps(status))
    if analysis:
        terms = []
        pairs = ("G(-1,+1)_vs_G(-1,-1)", "G(+1,-1)_vs_G(+1,+1)")
        for epoch, split, pair in product(range(epochs + 1), ("train", "test"), pairs):
            values = rng.normal([-0.01, 0.003, 0.05 * math.exp(-epoch / 3)], 0.002)
            for term, value in zip(TERMS, [*values, values.sum()]):
                terms.append((epoch, split, "gap_dynamics_factors", pair, term, value))
        columns = ["epoch", "split", "analysis", "pair", "quantity", "value"]
        pd.DataFrame(terms, columns=columns).to_csv(folder / "analysis.csv", index=False)
    return summary


def write_sweep(
    folder, settings, seeds=3, quality=None, epochs=6, val=True, groups=4, dfr=True, analysis=False
):
    """A sweep of finished runs; returns [{"setting", "seed", **summary}] a run."""
    rng = np.random.default_rng(0)
    keys = list(dict.fromkeys(key for overrides in settings for key in overrides))
    manifest = {
        "name": "example",
        "config": "config.yaml",
        "base_overrides": [],
        "seeds": list(range(seeds)),
        "keys": keys,
        "settings": [
            {"setting": number, "name": name_of(overrides), "overrides": overrides}
            for number, overrides in enumerate(settings)
        ],
        "jobs": [],
        "optuna": None,
    }
    expected = []
    for (number, overrides), seed in product(enumerate(settings), range(seeds)):
        job = len(manifest["jobs"])
        place = f"jobs/{job:04d}"
        manifest["jobs"].append(
            {
                "job": job,
                "setting": number,
                "seed": seed,
                "overrides": overrides | {"seed": seed},
                "folder": place,
            }
        )
        level = quality[number] if quality else rng.uniform(0.3, 0.8)
        run = folder / place / "run_2026-01-01_00-00-00"
        summary = write_run(run, rng, level, epochs, val, groups, dfr, analysis)
        expected.append({"setting": number, "seed": seed} | summary)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return expected


def grid(**keys):
    return [dict(zip(keys, values)) for values in product(*keys.values())]


@pytest.fixture
def no_figures(monkeypatch):
    """For tests of the tables."""
    monkeypatch.setattr(figures, "draw", lambda *_: [])


@pytest.fixture
def swept(tmp_path, no_figures):
    """A sweep of two keys with validation and DFR, without two of its runs, and what it tells."""
    settings = grid(debias_method=["None", "GroupDRO"], train_correlation=[0.6, 0.8])
    expected = write_sweep(tmp_path, settings, quality=[0.3, 0.5, 0.7, 0.6])
    jobs = json.loads((tmp_path / "manifest.json").read_text())["jobs"]
    shutil.rmtree(next((tmp_path / jobs[4]["folder"]).iterdir()))  # a seed of setting 1
    shutil.rmtree(next((tmp_path / jobs[5]["folder"]).iterdir()))
    (tmp_path / jobs[4]["folder"] / "job.json").write_text('{"state": "failed", "attempt": 2}')
    return tmp_path, pd.DataFrame(expected).drop(index=[4, 5])


def test_numbers_are_those_of_a_direct_computation(swept):
    folder, expected = swept
    collect.collect(folder)
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False, na_values="nan")
    names = [f"{p}test_{m}" for p in ("", "dfr_", "best_") for m in ("avg_acc", "adjusted_acc")]
    names += ["test_worst_acc", "dfr_test_worst_acc", "best_test_worst_acc"]
    names += ["val_worst_acc", "dfr_val_worst_acc"]
    by = expected.groupby("setting")
    for name in names:
        assert summary[f"{name}_mean"].to_numpy() == pytest.approx(by[name].mean().to_numpy())
        std = by[name].std(ddof=1).to_numpy()
        assert summary[f"{name}_std"].to_numpy() == pytest.approx(std, nan_ok=True)
    found = {re.sub("_(mean|std|low|high)$", "", column) for column in summary.columns[6:]}
    assert found == set(names)
    assert summary.debias_method.tolist() == ["None", "None", "GroupDRO", "GroupDRO"]
    assert summary.train_correlation.tolist() == [0.6, 0.8, 0.6, 0.8]
    assert summary.seeds.tolist() == [3, 1, 3, 3]
    assert summary.jobs.tolist() == [3, 3, 3, 3]


def test_every_job_is_in_the_table_of_runs(swept):
    folder, expected = swept
    collect.collect(folder)
    runs = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values="nan")
    assert runs.job.tolist() == list(range(12))
    assert runs.seed.tolist() == [0, 1, 2] * 4
    states = ["done"] * 4 + ["failed", "waiting"] + ["done"] * 6
    assert runs.state.tolist() == states
    done = runs[runs.state == "done"]
    for name in expected.columns.drop(["setting", "seed"]):
        assert done[name].tolist() == expected[name].tolist(), name  # exactly
    assert runs[runs.state != "done"].test_worst_acc.isna().all()
    text = (folder / "summary.md").read_text()
    assert "2 of 12 jobs (4 failed, 5 waiting)" in text
    assert "| 1 of 3 | before |" in text


def test_a_seed_alone_has_no_deviation_and_no_interval(swept):
    folder, _ = swept
    collect.collect(folder)
    row = pd.read_csv(folder / "summary.csv").iloc[1]
    assert row.seeds == 1
    assert math.isfinite(row.test_worst_acc_mean)
    assert row[["test_worst_acc_std", "test_worst_acc_low", "test_worst_acc_high"]].isna().all()


def test_bootstrap_is_the_plain_loop():
    values = [0.5, 0.7, 0.62, 0.9]
    generator = np.random.default_rng(seeds.derive_seed(0, "bootstrap"))
    draws = generator.integers(4, size=(10_000, 4))
    means = sorted(sum(values[i] for i in draw) / 4 for draw in draws)

    def percentile(p):  # linear between the two nearest
        place = p / 100 * (len(means) - 1)
        below = math.floor(place)
        return means[below] + (place - below) * (means[below + 1] - means[below])

    assert collect.bootstrap(values) == pytest.approx((percentile(2.5), percentile(97.5)))
    assert collect.bootstrap([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert all(map(math.isnan, collect.bootstrap([0.5])))
    assert all(map(math.isnan, collect.bootstrap([0.5, math.nan])))


def test_bootstrap_covers_the_mean_as_often_as_promised():
    """Of many seeds; of a handful the percentile interval is known to be too short."""
    samples = np.random.default_rng(0).normal(size=(200, 60))
    covered = [low < 0 < high for low, high in (collect.bootstrap(s, 1000) for s in samples)]
    assert 0.9 < np.mean(covered) < 0.99


def chosen(folder):
    sweep = collect.read(folder)
    return collect.best_setting(sweep, collect.summarise(sweep))


def change(folder, column, values):
    """Give the runs of each setting this final metric."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for job in manifest["jobs"]:
        (path,) = (folder / job["folder"]).glob("*/status.json")
        status = json.loads(path.read_text())
        status["summary"][column] = values[job["setting"]]
        path.write_text(json.dumps(status))


def test_the_best_setting_is_chosen_by_validation_and_never_by_test(tmp_path, no_figures):
    write_sweep(tmp_path, grid(hidden_dim=[8, 16, 32]), dfr=False)
    change(tmp_path, "val_worst_acc", [0.5, 0.6, 0.4])
    assert chosen(tmp_path) == 1
    for column in ("test_worst_acc", "test_avg_acc", "best_test_worst_acc", "best_val_worst_acc"):
        change(tmp_path, column, [0.9, 0.1, 1.0])
    assert chosen(tmp_path) == 1
    collect.collect(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "Best setting: hidden\\_dim=16, with the highest mean validation" in text
    assert "at the last epoch. Test accuracy had no part" in text
    assert text.partition("**")[2].startswith("16** | **3** |")
    assert r"\textbf{16} & \textbf{3} & " in (tmp_path / "summary.tex").read_text()
    change(tmp_path, "val_worst_acc", [0.5, 0.6, 0.6])
    assert chosen(tmp_path) == 1  # the first of equals


def test_without_validation_no_best_setting_is_named(tmp_path, no_figures):
    write_sweep(tmp_path, grid(hidden_dim=[8, 16]), val=False, quality=[0.2, 0.9])
    collect.collect(tmp_path)
    assert chosen(tmp_path) is None
    for name in ("summary.md", "summary.tex"):
        text = (tmp_path / name).read_text()
        assert "No best setting is named" in text and "Best setting" not in text
        assert "**" not in text and "textbf{" not in text
    assert not [c for c in pd.read_csv(tmp_path / "summary.csv") if "val_" in c or "best_" in c]


def test_a_setting_without_validation_beside_others_cannot_be_compared(tmp_path):
    write_sweep(tmp_path, grid(num_val_samples=[0, 16]))
    assert chosen(tmp_path) is not None
    change(tmp_path, "val_worst_acc", [None, 0.9])
    assert chosen(tmp_path) is None


def test_of_many_groups_the_minority_decides(tmp_path, no_figures):
    write_sweep(tmp_path, grid(hidden_dim=[8, 16]), groups=100)
    change(tmp_path, "val_worst_acc", [0.9, 0.1])
    change(tmp_path, "val_minority_acc", [0.1, 0.9])
    assert chosen(tmp_path) == 1
    collect.collect(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "highest mean validation minority accuracy" in text
    assert "test worst group" in text and "test minority best epoch" in text


def test_nothing_finished_is_reported_not_guessed(tmp_path):
    write_sweep(tmp_path, grid(hidden_dim=[8]), seeds=2)
    shutil.rmtree(tmp_path / "jobs")
    collect.collect(tmp_path)
    assert "2 of 2 jobs (0 waiting, 1 waiting)" in (tmp_path / "summary.md").read_text()
    row = pd.read_csv(tmp_path / "summary.csv").iloc[0]
    assert row.seeds == 0 and math.isnan(row.test_worst_acc_mean)
    assert not (tmp_path / "plots").exists()


def test_what_is_no_sweep_or_damaged_is_an_error_for_people(tmp_path):
    with pytest.raises(UserError, match="no sweep"):
        collect.collect(tmp_path)
    write_sweep(tmp_path, grid(hidden_dim=[8]), seeds=1)
    (path,) = tmp_path.glob("jobs/0000/*/status.json")
    path.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(path))):
        collect.collect(tmp_path)


def test_latex_is_escaped():
    given = r"a_b & 100% $x^2$ {#1} ~ \n < > | ±"
    expected = r"a\_b \& 100\% \$x\textasciicircum{}2\$ \{\#1\} \textasciitilde{} "
    expected += r"\textbackslash{}n \textless{} \textgreater{} \textbar{} $\pm$"
    assert collect.escape(given) == expected


def test_latex_rows_have_as_many_cells_as_columns(tmp_path, no_figures):
    values = ["/weights_1/50%&$#.pth", "~/{x}^2"]
    write_sweep(tmp_path, grid(feature_extractor_weights=values), seeds=2)
    collect.collect(tmp_path)
    text = (tmp_path / "summary.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{([lc]+)\}", text)[1]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert (
        len(rows) == 3 + 2 * 2 * 2
    )  # the head in three lines; mean and interval, before and after DFR
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
        assert not row.startswith("[")
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"/weights\_1/50\%\&\$\#.pth" in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_latex_compiles(swept):
    folder, _ = swept
    collect.collect(folder)
    text = r"\documentclass{article}\begin{document}\input{summary}\end{document}"
    (folder / "paper.tex").write_text(text)
    subprocess.run(["pdflatex", "-halt-on-error", "paper"], cwd=folder, check=True)


def test_figures_are_drawn_where_they_make_sense(tmp_path):
    def drawn(name, settings, **options):
        (tmp_path / name).mkdir()
        write_sweep(tmp_path / name, settings, **options)
        collect.collect(tmp_path / name)
        return {path.stem for path in (tmp_path / name / "plots").iterdir()}

    always = {"accuracies", "training_curves"}
    assert drawn("one", grid(hidden_dim=[8, 16]), seeds=1, epochs=0, dfr=False) == always
    two = grid(hidden_dim=[8, 16], epochs=[1, 2])
    assert drawn("grid", two, seeds=2, epochs=2) == always | {"heat_map"}
    assert drawn("holes", two[1:], seeds=1, epochs=1) == always
    terms = drawn("terms", grid(hidden_dim=[8]), seeds=2, epochs=2, analysis=True)
    assert terms == always | {"gap_dynamics"}
    widths = grid(hidden_dim=[8, 16], learning_rate=[0.1, 1.0], initialization_method=["muP"])
    assert drawn("transfer", widths, seeds=1, epochs=1) == always | {"transfer"}


def test_too_many_settings_are_cut_or_put_into_panels(tmp_path):
    settings = grid(debias_method=["None", "GroupDRO"], hidden_dim=list(range(1, 7)))
    write_sweep(tmp_path, settings, seeds=1, epochs=1)
    sweep = collect.read(tmp_path)
    parts, note = figures.panels(sweep, list(range(12)), "first")
    assert [title for title, _ in parts] == ["debias_method=None", "debias_method=GroupDRO"]
    assert [len(part) for _, part in parts] == [6, 6] and note == ""
    change(tmp_path, "val_worst_acc", [number / 12 for number in range(12)])
    sweep = collect.read(tmp_path)
    ranked = collect.ranked(sweep, collect.summarise(sweep))
    assert ranked == list(range(11, -1, -1))
    assert figures.few(ranked, 3, "best") == ([9, 10, 11], " (the 3 best of 12 settings)")
    assert figures.few(ranked, 12, "best") == (list(range(12)), "")


def test_mean_and_band_over_seeds():
    first = pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=[0, 1, 2])
    second = pd.DataFrame({"x": [3.0, 2.0]}, index=[0, 1])
    over = figures.over_seeds([first, second], "x")
    assert over["mean"].tolist() == [2, 2, 3]
    assert over["std"].tolist()[:2] == pytest.approx([math.sqrt(2), 0])
    assert math.isnan(over["std"][2])


@pytest.mark.parametrize("strategy", ["split_from_train", "original"])
def test_accuracy_on_what_dfr_was_fitted_on_is_left_out(swept, strategy):
    folder, _ = swept
    for path in folder.rglob("status.json"):
        config = path.parent / "config_used.yaml"
        kept = yaml.safe_load(config.read_text()) if config.exists() else {}
        config.write_text(yaml.dump(kept | {"dfr_val_split_strategy": strategy}))
    runs = collect.read(folder).runs
    assert ("dfr_val_worst_acc" in runs) == (strategy == "split_from_train")
    assert "dfr_test_worst_acc" in runs and "val_worst_acc" in runs


def test_equally_good_settings_are_counted(swept):
    sweep = collect.read(swept[0])
    summary = collect.summarise(sweep)
    best = collect.best_setting(sweep, summary)
    assert not any("equally good" in line for line in collect.caption(sweep, summary, best))
    summary[f"val_{sweep.metric}_mean"] = 0.5
    lines = collect.caption(sweep, summary, collect.best_setting(sweep, summary))
    assert any("settings are equally good by that; this is the first" in line for line in lines)


def test_the_gap_figure_shows_the_flow_of_the_setting_s_own_method(tmp_path):
    """`method_total`, not ERM's `total`, of the training gap and of the test gap under its flow."""
    write_sweep(tmp_path, [{"debias_method": "RWG"}], seeds=2, analysis=True)
    for path in tmp_path.rglob("analysis.csv"):
        table = pd.read_csv(path)
        rows = table[table.quantity == "total"].assign(quantity="method_total")
        rows["value"] = 0.0014
        under = pd.concat([table, rows])
        under = under[under.split == "test"].assign(split="test_under_train")
        pd.concat([table, rows, under]).to_csv(path, index=False)
    sweep = collect.read(tmp_path)
    runs = {0: [figures.read_run(tmp_path / folder) for folder in sweep.done(0).folder]}
    figure = figures.gap_dynamics(sweep, runs, "first")
    assert {ax.get_title().splitlines()[-1] for ax in figure.axes} == {
        "train", "test gap, training gradient"
    }  # fmt: skip
    for ax in figure.axes:
        (line,) = [one for one in ax.get_lines() if "method" in one.get_label()]
        assert np.allclose(line.get_ydata(), 0.0014)
