"""The command plotting.py: its list of figures, its output and its errors."""

import re

import pytest
from made_up import group_counts, training_history, write_run

import plotting
from lab.figures.drawing import FIGURES

pytestmark = pytest.mark.filterwarnings("error")


def test_the_overview_lists_every_figure():
    assert re.findall(r"^    (\w+): ", plotting.__doc__, re.M) == list(FIGURES)


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


def test_a_file_in_the_place_of_the_plots_is_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", epochs=0)
    (folder / "plots").touch()
    assert plotting.main([str(folder)]) == 2
    assert str(folder / "plots") in one_line(capsys)
