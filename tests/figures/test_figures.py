"""Figures from small made-up tables: which are drawn, what they say, and that they never warn."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lab.figures import history as plotting
from lab.splits import groups

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ["digit < 5, red", "digit < 5, green", "digit ≥ 5, red", "digit ≥ 5, green"]
PAIRS = ((1, 0), (2, 3))
MANY_GROUPS = ("group_accuracies", "evaluation_sets", "scale")
FOUR_GROUPS = [name for name in plotting.FIGURES if name not in MANY_GROUPS]
CONFIG = """\
experiment_name: colored_mnist
debias_method: GroupDRO
plot_format: png
gap_dynamics_factors:
  group_pairs: [[[-1, 1], [-1, -1]], [[1, -1], [1, 1]]]
"""


def group_counts(empty=()):
    """Counts with a strong correlation in train; the groups in `empty` have no training samples."""
    rows = []
    for split, counts in (("train", [2400, 100, 110, 2390]), ("test", [490, 510, 520, 480])):
        counts = [0 if split == "train" and g in empty else n for g, n in enumerate(counts)]
        for g, (n, (y, a)) in enumerate(zip(counts, groups.GROUPS, strict=True)):
            share = n / sum(counts)
            rows.append((split, g, y, a, NAMES[g], n, share))
    columns = ["split", "group", "y", "a", "name", "count", "share"]
    return pd.DataFrame(rows, columns=columns)


def training_history(counts, epochs):
    """Exponential learning curves: majority groups are learnt at once, minority groups late."""
    time = np.arange(epochs + 1)
    table = {"epoch": time}
    for split in ("train", "test"):
        n = counts[counts.split == split]["count"].to_numpy()
        shares = counts[counts.split == "train"]["share"].to_numpy()
        losses, accuracies = [], []
        for g in range(4):
            slow = g in (1, 2)
            floor = 0.1 if split == "train" else 0.3 + 0.3 * slow
            bump = 1.2 * slow * time / 3 * np.exp(-time / 4)
            losses.append(floor + (0.69 - floor) * np.exp(-time / (9 if slow else 1.5)) + bump)
            accuracies.append(np.clip(1.02 - 0.85 * losses[g], 0, 1))
            if n[g] == 0:
                losses[g] = accuracies[g] = np.full(len(time), np.nan)
            table[f"{split}_group_{g}_loss"] = losses[g]
            table[f"{split}_group_{g}_acc"] = accuracies[g]
        weights = n / n.sum()
        table[f"{split}_avg_loss"] = np.nansum(weights[:, None] * losses, axis=0)
        table[f"{split}_worst_loss"] = np.nanmax(losses, axis=0)
        table[f"{split}_avg_acc"] = np.nansum(weights[:, None] * accuracies, axis=0)
        table[f"{split}_worst_acc"] = np.nanmin(accuracies, axis=0)
        table[f"{split}_adjusted_acc"] = np.nansum(shares[:, None] * accuracies, axis=0)
    return pd.DataFrame(table | {f"flow_weight_{g}": np.full(len(time), 0.25) for g in range(4)})


def analysis(epochs, empty=(), every=1):
    """Smooth made-up values of every quantity; NaN where an empty group of train is involved."""
    rows, names = [], [groups.name(g) for g in range(4)]

    def add(epoch, split, kind, pair, **values):
        rows.extend((epoch, split, kind, pair, key, value) for key, value in values.items())

    for epoch in range(0, epochs + 1, every):
        decay = np.exp(-epoch / 6)
        for split in ("train", "test", "test_under_train"):
            nan = np.nan if empty and split != "test" else 1.0
            for number, (one, two) in enumerate(PAIRS):
                pair = groups.pair_name(one, two)
                scale = 1 - 0.3 * number
                terms = {
                    "term1": nan * -0.06 * decay * (1 - decay) * scale,
                    "term2": nan * 0.0004 * np.cos(epoch / 3),
                    "term3": nan * 0.8 * decay * np.cos(epoch / 8) * scale,
                }
                total = sum(terms.values())
                measured = np.nan if split == "test" or epoch == epochs else 0.97 * 0.4 * total
                terms |= {"total": total, "method_total": 0.4 * total, "measured": measured}
                add(epoch, split, "gap_dynamics_factors", pair, **terms)
                parts = {"TermA": 0.5 * decay, "TermB": -0.2 * decay, "TermC": 0.1 * (1 - decay)}
                parts = {key: nan * value for key, value in parts.items()}
                kind = "static_dynamic_decomposition"
                add(epoch, split, kind, pair, **parts, total=sum(parts.values()))
        for split in ("train", "test"):
            nan = np.nan if empty and split == "train" else 1.0
            basis = {"inv": 0.5, "Y": 0.9, "A": 0.6, "AY": 1.4}
            norms = {f"norm_{k}": nan * v * (0.02 + decay) for k, v in basis.items()}
            add(epoch, split, "gradient_basis", "", **norms)
            keys = ("inv_Y", "inv_A", "inv_AY", "Y_A", "Y_AY", "A_AY")
            cosines = {f"cosine_{k}": nan * np.sin(i + epoch / 9) for i, k in enumerate(keys)}
            add(epoch, split, "gradient_basis", "", **cosines)
            jacobian, outputs = {}, {}
            for g, code in enumerate(names):
                there = np.nan if g in empty and split == "train" else 1.0
                y, a = groups.GROUPS[g]
                jacobian[f"norm_sq_{code}"] = there * (2 + g / 3 + epoch * (1 + g / 4))
                outputs[f"mean_{code}"] = there * (1 - decay) * (1.5 * y + 1.2 * a)
                outputs[f"std_{code}"] = there * (0.1 + 0.8 * (1 - decay))
                for h in range(g + 1, 4):
                    pair = groups.pair_name(g, h)
                    cosine = nan * (1 - 0.9 * (1 - decay) * (0.5 + 0.25 * (h - g)))
                    jacobian |= {f"dot_{pair}": cosine, f"cosine_{pair}": cosine}
                    jacobian[f"dist_sq_{pair}"] = 1 - cosine
            jacobian |= {"norm_Delta_S": nan * (1 + epoch), "norm_Delta_L": nan * (2 + epoch / 4)}
            jacobian["ratio_Delta_S_L"] = nan * (1 + epoch) / (2 + epoch / 4)
            add(epoch, split, "jacobian_norm", "", **jacobian)
            add(epoch, split, "model_output_expectation", "", **outputs)
    return pd.DataFrame(rows, columns=["epoch", "split", "analysis", "pair", "quantity", "value"])


def accuracies(values):
    """One split's metrics in dfr_results.json."""
    row = {f"group_{g}_acc": value for g, value in enumerate(values)}
    average = float(np.mean(values))
    return row | {"avg_acc": average, "adjusted_acc": average, "worst_acc": min(values)}


def write_run(folder, epochs=6, empty=(), every=1):
    """A run folder with every table; returns the folder."""
    folder.mkdir()
    counts = group_counts(empty)
    counts.to_csv(folder / "group_counts.csv", index=False)
    training_history(counts, epochs).to_csv(folder / "training_history.csv", index=False)
    analysis(epochs, empty, every).to_csv(folder / "analysis.csv", index=False)
    (folder / "config_used.yaml").write_text(CONFIG, encoding="utf-8")
    before, after = accuracies([0.97, 0.62, 0.58, 0.96]), accuracies([0.88, 0.83, 0.8, 0.87])
    result = {"target_layer": "last_hidden", "split_strategy": "balanced", "reg": "l1", "c": 0.1}
    result["tuning"] = [{"c": 10.0**-k, "worst_acc": 0.8 - 0.02 * (k - 1) ** 2} for k in range(4)]
    result |= {
        key: {"train": row, "test": row} for key, row in (("before", before), ("after", after))
    }
    (folder / "dfr_results.json").write_text(json.dumps(result), encoding="utf-8")
    generator = np.random.default_rng(0)
    members = np.repeat(np.arange(4), 5)
    pictures = generator.random((20, 28, 28, 3), dtype=np.float32)
    pictures *= np.where(members % 2, 0, 1)[:, None, None, None] * [1, 0, 0] + [0, 0.3, 0]
    signs = {"y": np.where(members > 1, 1, -1), "a": np.where(members % 2, 1, -1)}
    np.savez(folder / "samples.npz", pictures=pictures.astype(np.float32), group=members, **signs)
    few = np.arange(20) % 5 < 2
    heat = {when: generator.random((8, 28, 28)) for when in ("before_dfr", "after_dfr")}
    np.savez(folder / "gradcam.npz", pictures=pictures[few], group=members[few], **heat)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A whole run folder and the paths of its figures."""
    folder = write_run(tmp_path_factory.mktemp("whole") / "run")
    return folder, plotting.draw(folder)


def test_every_figure_is_a_readable_picture(drawn):
    folder, paths = drawn
    assert paths == [folder / "plots" / f"{name}.png" for name in FOUR_GROUPS]
    assert sorted((folder / "plots").iterdir()) == sorted(paths)
    for path in paths:
        picture = imread(path)
        assert 300 < picture.shape[0] < 1600 and 600 < picture.shape[1] < 1600
        assert np.ptp(picture[..., :3]) > 0.5
        assert path.stat().st_size < 300_000


def test_the_same_tables_give_the_same_bytes(drawn):
    folder, paths = drawn
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in plotting.draw(folder)] == first


def test_svg_is_reproducible_and_follows_the_configuration(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1)
    (folder / "config_used.yaml").write_text("plot_format: svg\n", encoding="utf-8")
    for table in ("analysis.csv", "dfr_results.json"):
        (folder / table).unlink()
    paths = plotting.draw(folder)
    assert paths and all(path.suffix == ".svg" for path in paths)
    first = [path.read_bytes() for path in paths]
    assert all(b"<svg" in content and b"<dc:date>" not in content for content in first)
    assert [path.read_bytes() for path in plotting.draw(folder, "svg")] == first


def test_history_alone_is_enough(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    training_history(group_counts(), 3).to_csv(folder / "training_history.csv", index=False)
    (folder / "analysis.csv").write_text("", encoding="utf-8")
    (folder / "dfr_results.json").write_text("", encoding="utf-8")
    names = [path.stem for path in plotting.draw(folder)]
    assert names == ["training_history", "group_curves", "misclassification"]


def test_tables_without_rows_draw_nothing(tmp_path):
    for table in ("training_history.csv", "analysis.csv"):
        header = write_run(tmp_path / table, epochs=0) / table
        first_line = header.read_text(encoding="utf-8").splitlines()[0]
        folder = tmp_path / f"bare_{table}"
        folder.mkdir()
        (folder / table).write_text(first_line + "\n", encoding="utf-8")
        assert plotting.draw(folder) == []


@pytest.mark.parametrize("epochs, every", [(0, 1), (5, 2)])
def test_empty_groups_and_divergence_draw_without_warnings(tmp_path, epochs, every):
    folder = write_run(tmp_path / "run", epochs, empty=(1, 2), every=every)
    history = pd.read_csv(folder / "training_history.csv")
    values = [name for name in history if name.endswith(("_loss", "_acc"))]
    history.loc[history.index[-2:-1], [name for name in values if "loss" in name]] = 1e30
    history.loc[history.index[-1:], values] = [
        [np.inf, np.nan, 1e300][i % 3] for i in range(len(values))
    ]
    history.loc[history.index[-1:], "train_avg_loss"] = np.inf
    history.to_csv(folder / "training_history.csv", index=False)
    table = pd.read_csv(folder / "analysis.csv")
    last = table.epoch == table.epoch.max()
    table.loc[last, "value"] = np.where(np.arange(last.sum()) % 2, np.inf, -1e38)
    table.to_csv(folder / "analysis.csv", index=False)
    assert [path.stem for path in plotting.draw(folder)] == FOUR_GROUPS
    run = plotting.read_run(folder)
    assert f"diverged at epoch {epochs}" in plotting.title(run, "Groups")


def labels_of(figure):
    """The texts of all legends of a figure."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_legends_name_the_groups_and_colours_are_fixed(drawn):
    run = plotting.read_run(drawn[0])
    for name in ("group_curves", "jacobian_norm", "model_output_expectation", "misclassification"):
        figure = plotting.FIGURES[name](run)
        assert set(NAMES) <= set(labels_of(figure)), name
        for ax in figure.axes:
            for line in ax.lines:
                if line.get_label() in NAMES:
                    style = plotting.group_style(NAMES.index(line.get_label()))
                    assert line.get_color() == style["color"]
                    assert line.get_marker() == style["marker"]
    assert labels_of(plotting.gaps(run)) == ["digit < 5: green − red", "digit ≥ 5: red − green"]
    assert "total under GroupDRO" in labels_of(plotting.gap_dynamics_factors(run))


def test_groups_are_told_apart_by_colour_line_and_marker():
    styles = [plotting.group_style(g) for g in range(4)]
    for key in ("color", "linestyle", "marker"):
        assert len({style[key] for style in styles}) == 4
    many = [tuple(plotting.group_style(g).values()) for g in range(20)]
    assert len(set(many)) == 20
    others = {to_rgb(style["color"]) for style in (*plotting.STYLES, *plotting.PAIR_STYLES)}
    assert not others & {to_rgb(style["color"]) for style in styles}


def test_groups_without_samples_are_named_and_not_drawn(tmp_path):
    run = plotting.read_run(write_run(tmp_path / "run", empty=(1, 2)))
    figure = plotting.group_curves(run)
    train, test = figure.axes[:2]
    assert [line.get_label() for line in train.lines] == [NAMES[0], NAMES[3]]
    assert "no samples" in train.get_title() and NAMES[1] in train.get_title()
    assert len(test.lines) == 4 and test.get_title() == "test"


def test_shares_of_errors_add_up_to_one(drawn):
    figure = plotting.misclassification(plotting.read_run(drawn[0]))
    for ax in figure.axes[2:]:
        heights = [patch.get_data().values for patch in ax.patches]
        assert len(heights) == 4
        np.testing.assert_allclose(heights[-1], 1)


def test_one_total_where_the_method_follows_the_average_loss(tmp_path):
    folder = write_run(tmp_path / "run", epochs=2)
    table = pd.read_csv(folder / "analysis.csv").set_index("quantity")
    table.loc["method_total", "value"] = table.loc["total", "value"].to_numpy()[: 3 * 3 * 2]
    table.loc[["total", "method_total"], "value"] = 0.5
    table.reset_index().to_csv(folder / "analysis.csv", index=False)
    labels = labels_of(plotting.gap_dynamics_factors(plotting.read_run(folder)))
    assert "total (gradient flow)" in labels and "total under GroupDRO" not in labels


def test_axes_say_when_they_are_not_linear():
    with rc_context(plotting.RC):
        _, axes = plotting.new_figure(2, ["train", "test"])
        style = plotting.STYLES[0]
        plotting.curve(axes[0, 0], range(4), [-1, 1e-3, 0, 5], style, "wide")
        plotting.curve(axes[1, 0], range(4), [1, 2, np.nan, 3], style, "narrow")
        plotting.rescale(axes[0], "term", signed=True)
        plotting.rescale(axes[1], "loss", signed=False)
    assert axes[0, 0].get_ylabel() == "term (symlog)"
    assert axes[0, 1].get_yscale() == "symlog"
    assert axes[1, 0].get_ylabel() == "loss" and axes[1, 0].get_yscale() == "linear"


def test_a_single_epoch_shows_markers(tmp_path):
    figure = plotting.group_curves(plotting.read_run(write_run(tmp_path / "run", epochs=0)))
    assert all(line.get_markevery() == [0] for ax in figure.axes for line in ax.lines)
    assert list(figure.axes[-1].get_xlim()) == [-0.5, 0.5]


def test_the_command_prints_the_paths(tmp_path, capsys):
    folder = write_run(tmp_path / "run", epochs=1)
    for table in ("analysis.csv", "training_history.csv"):
        (folder / table).unlink()
    assert plotting.main([str(folder), "--format", "svg"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        str(folder / "plots" / name) for name in ("dfr.svg", "samples.svg", "gradcam.svg")
    ]


def one_line(capsys):
    """The single line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert plotting.main([str(tmp_path / "missing")]) == 2
    assert "no such run folder" in one_line(capsys)
    assert plotting.main([str(tmp_path)]) == 2
    assert "training_history.csv" in one_line(capsys)
    assert plotting.main([]) == 2
    assert "folder" in one_line(capsys)
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "table, content",
    [
        ("training_history.csv", "a,b\n1,2\n"),
        ("analysis.csv", "epoch\n1,2,3\n1,2,3,4,5\n"),
        ("dfr_results.json", "{"),
        ("dfr_results.json", "[1]"),
        ("samples.npz", "not a zip file"),
        ("gradcam.npz", "not a zip file"),
        ("config_used.yaml", "a: [1"),
        ("config_used.yaml", "plot_format: pdf"),
    ],
)
def test_damaged_tables_are_named(tmp_path, capsys, table, content):
    folder = tmp_path / "run"
    folder.mkdir()
    training_history(group_counts(), 0).to_csv(folder / "training_history.csv", index=False)
    (folder / table).write_text(content, encoding="utf-8")
    assert plotting.main([str(folder)]) == 2
    assert ("plot_format" if "pdf" in content else table) in one_line(capsys)


def write_many(folder, classes=4, epochs=3, empty=()):
    """A run folder of classes × classes groups, without analyses; returns the folder."""
    folder.mkdir()
    cells = groups.class_cells(classes, classes)
    rows = [
        (split, g, y, a, f"class {y}, {a}", 0 if g in empty and split == "test" else 5 + g)
        for split in ("train", "val", "target", "test")
        for g, (y, a) in enumerate(cells)
    ]
    columns = ["split", "group", "y", "a", "name", "count"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "group_counts.csv", index=False)
    table, time = {"epoch": np.arange(epochs + 1)}, np.arange(epochs + 1)
    for split in ("train", "val", "target", "test"):
        for g in range(len(cells)):
            gone = np.nan if g in empty and split == "test" else 1.0
            table[f"{split}_group_{g}_acc"] = gone * (g + time) / (len(cells) + epochs)
            table[f"{split}_group_{g}_loss"] = gone * np.exp(-time)
        for number, name in enumerate(("avg", "worst", "adjusted", "minority", "majority")):
            table[f"{split}_{name}_acc"] = 0.1 + 0.1 * number + 0.02 * time
        for name in ("avg", "worst"):
            table[f"{split}_{name}_loss"] = np.exp(-time)
    pd.DataFrame(table).to_csv(folder / "training_history.csv", index=False)
    (folder / "config_used.yaml").write_text(CONFIG, encoding="utf-8")
    row = {f"group_{g}_acc": 0.5 for g in range(len(cells))}
    row |= {f"{name}_acc": 0.4 for name in ("avg", "worst", "adjusted", "minority", "majority")}
    tuning = [{"c": 0.1, "minority_acc": 0.3}, {"c": 1.0, "minority_acc": None}]
    result = {"split_strategy": "target", "reg": "l1", "c": 0.1, "tuning": tuning}
    result |= {"tuned_for": "minority_acc", "before": {"test": row}, "after": {"test": row}}
    (folder / "dfr_results.json").write_text(json.dumps(result), encoding="utf-8")
    y = np.repeat(np.arange(classes), 3)
    pictures = np.random.default_rng(0).random((len(y), 64, 32, 3), dtype=np.float32)
    np.savez(folder / "samples.npz", pictures=pictures, group=y * classes, y=y, a=0 * y)
    return folder


def test_many_groups(tmp_path, monkeypatch):
    folder = write_many(tmp_path / "run")
    names = [path.stem for path in plotting.draw(folder)]
    assert names == ["training_history", "group_curves", "group_accuracies", "dfr", "samples"]
    run = plotting.read_run(folder)
    assert run.codes[6] == "G(1,2)"
    figure = plotting.group_curves(run)
    assert labels_of(figure) == ["average", "majority", "minority", "worst group"]
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles == ["train", "validation", "target set", "test"]
    accuracies = dict(zip(labels_of(figure), figure.axes[7].lines))
    minority = pd.read_csv(folder / "training_history.csv")["test_minority_acc"]
    np.testing.assert_allclose(accuracies["minority"].get_ydata(), minority)
    figure = plotting.dfr(run)
    bars = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert bars == ["average", "adjusted", "worst\ngroup", "minority", "majority"]
    assert figure.axes[1].get_ylabel() == "validation\nminority accuracy"
    assert beside_the_samples(run) == [f"class {y},\n0" for y in range(4)]
    monkeypatch.setattr(plotting, "SAMPLE_ROWS", 3)  # too many groups for a row each
    assert beside_the_samples(run) == [f"class {y}" for y in range(4)]
    assert plotting.evaluation_sets(run) is None


def beside_the_samples(run):
    return [ax.get_ylabel() for ax in plotting.samples(run).axes if ax.get_ylabel()]


def test_further_evaluation_sets_beside_the_test_set(tmp_path):
    folder = write_many(tmp_path / "run")
    history = pd.read_csv(folder / "training_history.csv")
    more = {
        f"{name}_{kind}_acc": rate * history.epoch + start
        for name, start in (("opposite", 0.0), ("shortcut_only", 0.3))
        for kind, rate in (("avg", 0.1), ("worst", 0.05))
    }
    history = pd.concat([history, pd.DataFrame(more)], axis=1)
    history.to_csv(folder / "training_history.csv", index=False)
    assert folder / "plots" / "evaluation_sets.png" in plotting.draw(folder)
    worst, average = plotting.evaluation_sets(plotting.read_run(folder)).axes
    assert (worst.get_title(), average.get_title()) == ("worst group", "average")
    curves = dict(zip(worst.get_legend_handles_labels()[1], worst.lines))
    assert list(curves) == [
        "test, as trained", "test, opposite shortcuts", "test, main shortcut without digits"
    ]  # fmt: skip
    np.testing.assert_allclose(curves["test, as trained"].get_ydata(), history.test_worst_acc)
    np.testing.assert_allclose(average.lines[1].get_ydata(), history.opposite_avg_acc)


def test_the_map_of_groups_is_that_of_the_last_epoch(tmp_path):
    folder = write_many(tmp_path / "run", empty=(6, 9))
    run = plotting.read_run(folder)
    figure = plotting.group_accuracies(run)
    shown = figure.axes[0].images[0].get_array()
    last = pd.read_csv(folder / "training_history.csv").iloc[-1]
    for y in range(4):
        for a in range(4):
            if 4 * y + a in (6, 9):
                assert shown.mask[y, a]
            else:
                assert shown[y, a] == last[f"test_group_{4 * y + a}_acc"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][2] == "class 2"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][3] == "3"
    assert len(figure.axes[0].texts) == 14
    assert "at epoch 3 (grey: no samples)" in figure.get_suptitle()
    picture = plotting.draw(folder)
    assert any(path.stem == "group_accuracies" for path in picture)
    curves = plotting.group_curves(run)
    assert curves.axes[3].get_title() == "test\nno samples: 2 of 16 groups"
