"""Figures of the training history: the curves, their labels, and which groups are shown."""

import numpy as np
import pandas as pd
import pytest
from made_up import NAMES, labels_of, write_many, write_run

from lab.figures import analyses, history
from lab.figures.drawing import FIGURES, draw
from lab.figures.style import group_style
from lab.folders.reading import read_run

pytestmark = pytest.mark.filterwarnings("error")


def test_legends_name_the_groups_and_colours_are_fixed(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    for name in ("group_curves", "jacobian_norm", "model_output_expectation", "misclassification"):
        figure = FIGURES[name].load()(run)
        assert set(NAMES) <= set(labels_of(figure)), name
        for ax in figure.axes:
            for line in ax.lines:
                if line.get_label() in NAMES:
                    style = group_style(NAMES.index(line.get_label()))
                    assert line.get_color() == style["color"]
                    assert line.get_marker() == style["marker"]
    assert labels_of(history.gaps(run)) == ["digit < 5: green − red", "digit ≥ 5: red − green"]
    assert "total under GroupDRO" in labels_of(analyses.gap_dynamics_factors(run))


def test_groups_without_samples_are_named_and_not_drawn(tmp_path):
    run = read_run(write_run(tmp_path / "run", empty=(1, 2)))
    figure = history.group_curves(run)
    train, test = figure.axes[:2]
    assert [line.get_label() for line in train.lines] == [NAMES[0], NAMES[3]]
    assert "no samples" in train.get_title() and NAMES[1] in train.get_title()
    assert len(test.lines) == 4 and test.get_title() == "test"


def test_shares_of_errors_add_up_to_one(tmp_path):
    figure = history.misclassification(read_run(write_run(tmp_path / "run")))
    for ax in figure.axes[2:]:
        heights = [patch.get_data().values for patch in ax.patches]
        assert len(heights) == 4
        np.testing.assert_allclose(heights[-1], 1)


def test_a_single_epoch_shows_markers(tmp_path):
    figure = history.group_curves(read_run(write_run(tmp_path / "run", epochs=0)))
    assert all(line.get_markevery() == [0] for ax in figure.axes for line in ax.lines)
    assert list(figure.axes[-1].get_xlim()) == [-0.5, 0.5]


def test_of_many_groups_majority_and_minority_are_shown(tmp_path):
    folder = write_many(tmp_path / "run")
    run = read_run(folder)
    assert run.codes[6] == "G(1,2)"
    figure = history.group_curves(run)
    assert labels_of(figure) == ["average", "majority", "minority", "worst group"]
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles == ["train", "validation", "target set", "test"]
    accuracies = dict(zip(labels_of(figure), figure.axes[7].lines))
    minority = pd.read_csv(folder / "training_history.csv")["test_minority_acc"]
    np.testing.assert_allclose(accuracies["minority"].get_ydata(), minority)
    assert history.evaluation_sets(run) is None


def test_further_evaluation_sets_beside_the_test_set(tmp_path):
    folder = write_many(tmp_path / "run")
    table = pd.read_csv(folder / "training_history.csv")
    further = {
        f"{name}_{kind}_acc": rate * table.epoch + start
        for name, start in (("opposite", 0.0), ("shortcut_only", 0.3))
        for kind, rate in (("avg", 0.1), ("worst", 0.05))
    }
    table = pd.concat([table, pd.DataFrame(further)], axis=1)
    table.to_csv(folder / "training_history.csv", index=False)
    assert folder / "plots" / "evaluation_sets.png" in draw(folder)
    worst, average = history.evaluation_sets(read_run(folder)).axes
    assert (worst.get_title(), average.get_title()) == ("worst group", "average")
    curves = dict(zip(worst.get_legend_handles_labels()[1], worst.lines))
    assert list(curves) == [
        "test, as trained", "test, opposite shortcuts", "test, main shortcut without digits"
    ]  # fmt: skip
    np.testing.assert_allclose(curves["test, as trained"].get_ydata(), table.test_worst_acc)
    np.testing.assert_allclose(average.lines[1].get_ydata(), table.opposite_avg_acc)


def test_the_map_of_groups_is_that_of_the_last_epoch(tmp_path):
    folder = write_many(tmp_path / "run", empty=(6, 9))
    run = read_run(folder)
    figure = history.group_accuracies(run)
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
    picture = draw(folder)
    assert any(path.stem == "group_accuracies" for path in picture)
    curves = history.group_curves(run)
    assert curves.axes[3].get_title() == "test\nno samples: 2 of 16 groups"
