"""Drawing all figures of a run: which are drawn, in which files, and that they never warn."""

import pkgutil
import subprocess
import sys

import made_up
import numpy as np
import pandas as pd
import pytest
from made_up import write_many, write_run
from matplotlib.image import imread

from lab import figures
from lab.figures import panels
from lab.figures.drawing import FIGURES, draw
from lab.folders import reading

pytestmark = pytest.mark.filterwarnings("error")

OF_MANY_GROUPS = ("group_accuracies", "evaluation_sets", "scale")
OF_FOUR_GROUPS = [name for name in FIGURES if name not in OF_MANY_GROUPS]


def test_no_figure_needs_torch():
    names = [module.name for module in pkgutil.walk_packages(figures.__path__, "lab.figures.")]
    assert "lab.figures.drawing" in names
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A whole run folder and the paths of its figures."""
    folder = write_run(tmp_path_factory.mktemp("whole") / "run")
    return folder, draw(folder)


def test_every_figure_is_a_readable_picture(drawn):
    folder, paths = drawn
    assert paths == [folder / "plots" / f"{name}.png" for name in OF_FOUR_GROUPS]
    assert sorted((folder / "plots").iterdir()) == sorted(paths)
    for path in paths:
        picture = imread(path)
        assert 300 < picture.shape[0] < 1600 and 600 < picture.shape[1] < 1600
        assert np.ptp(picture[..., :3]) > 0.5
        assert path.stat().st_size < 300_000


def test_the_same_tables_give_the_same_bytes(drawn):
    folder, paths = drawn
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw(folder)] == first


def test_svg_is_reproducible_and_follows_the_configuration(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1)
    (folder / "config_used.yaml").write_text("plot_format: svg\n", encoding="utf-8")
    for table in ("analysis.csv", "dfr_results.json"):
        (folder / table).unlink()
    paths = draw(folder)
    assert paths and all(path.suffix == ".svg" for path in paths)
    first = [path.read_bytes() for path in paths]
    assert all(b"<svg" in content and b"<dc:date>" not in content for content in first)
    assert [path.read_bytes() for path in draw(folder, "svg")] == first


def test_history_alone_is_enough(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    made_up.training_history(made_up.group_counts(), 3).to_csv(
        folder / "training_history.csv", index=False
    )
    (folder / "analysis.csv").write_text("", encoding="utf-8")
    (folder / "dfr_results.json").write_text("", encoding="utf-8")
    names = [path.stem for path in draw(folder)]
    assert names == ["training_history", "group_curves", "misclassification"]


def test_tables_without_rows_draw_nothing(tmp_path):
    for table in ("training_history.csv", "analysis.csv"):
        header = write_run(tmp_path / table, epochs=0) / table
        first_line = header.read_text(encoding="utf-8").splitlines()[0]
        folder = tmp_path / f"bare_{table}"
        folder.mkdir()
        (folder / table).write_text(first_line + "\n", encoding="utf-8")
        assert draw(folder) == []


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
    assert [path.stem for path in draw(folder)] == OF_FOUR_GROUPS
    run = reading.read_run(folder)
    assert f"diverged at epoch {epochs}" in panels.title(run, "Groups")


def test_many_groups_have_figures_of_their_own(tmp_path):
    names = [path.stem for path in draw(write_many(tmp_path / "run"))]
    assert names == ["training_history", "group_curves", "group_accuracies", "dfr", "samples"]
