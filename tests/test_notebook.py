"""The notebook runs top to bottom, and is committed with its outputs."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "notebooks" / "sandbox.ipynb"


def test_the_notebook_runs(data_dir, tmp_path):
    notebook = nbformat.read(PATH, as_version=4)
    (settings,) = (cell for cell in notebook.cells if '"results_dir": "results"' in cell.source)
    for name, place in (("results", tmp_path), ("data", data_dir)):
        settings.source = settings.source.replace(f'_dir": "{name}"', f'_dir": "{place}"')
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=120, resources=folder).execute()
    (run,) = tmp_path.iterdir()
    assert (run / "gradcam.csv").exists()
    assert list((run / "dfr").glob("*/dfr_comparison.csv"))


def test_the_committed_outputs_are_there_and_small():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert PATH.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [kind for cell in code for out in cell.outputs for kind in out.get("data", {})]
    assert kinds.count("image/png") >= 3 and kinds.count("text/html") >= 3
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert not re.search(r"/(home|root|tmp|Users)/", PATH.read_text(encoding="utf-8"))
