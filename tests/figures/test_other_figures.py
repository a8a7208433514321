"""Figures of the analyses, of retraining and of pictures: what they show."""

import pandas as pd
import pytest
from made_up import labels_of, write_many, write_run

from lab.figures import analyses, pictures, retraining
from lab.folders.reading import read_run

pytestmark = pytest.mark.filterwarnings("error")


def test_one_total_where_the_method_follows_the_average_loss(tmp_path):
    folder = write_run(tmp_path / "run", epochs=2)
    table = pd.read_csv(folder / "analysis.csv").set_index("quantity")
    table.loc["method_total", "value"] = table.loc["total", "value"].to_numpy()[: 3 * 3 * 2]
    table.loc[["total", "method_total"], "value"] = 0.5
    table.reset_index().to_csv(folder / "analysis.csv", index=False)
    labels = labels_of(analyses.gap_dynamics_factors(read_run(folder)))
    assert "total (gradient flow)" in labels and "total under GroupDRO" not in labels


def test_retraining_of_many_groups_shows_minority_and_majority(tmp_path):
    figure = retraining.dfr(read_run(write_many(tmp_path / "run")))
    bars = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert bars == ["average", "adjusted", "worst\ngroup", "minority", "majority"]
    assert figure.axes[1].get_ylabel() == "validation\nminority accuracy"


def test_samples_are_in_rows_of_groups_or_of_classes(tmp_path, monkeypatch):
    run = read_run(write_many(tmp_path / "run"))
    assert beside_the_samples(run) == [f"class {y},\n0" for y in range(4)]
    monkeypatch.setattr(pictures, "SAMPLE_ROWS", 3)  # too many groups for a row each
    assert beside_the_samples(run) == [f"class {y}" for y in range(4)]


def beside_the_samples(run):
    return [ax.get_ylabel() for ax in pictures.samples(run).axes if ax.get_ylabel()]
