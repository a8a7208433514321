"""The benchmarks' command lines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "benchmarks").glob("[!_]*.py") if p.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_help_is_shown_and_nothing_written(name, tmp_path):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT)!r}); "
    code += f"runpy.run_module('benchmarks.{name}', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert not list(tmp_path.iterdir())
