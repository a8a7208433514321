"""The house: rooms import only rooms above them in docs/development.md, never a door."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")


LISTS = re.findall(r"```text\n(.*?)```", PAGE, re.S)
ROOMS = [line.split()[0] for line in LISTS[0].splitlines()]
DOORS = LISTS[1].split()


def imports(path):
    """Dotted names of what a file imports, indented imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_list_names_every_room_and_door():
    assert sorted(ROOMS) == sorted(
        p.name for p in (ROOT / "lab").iterdir() if p.is_dir() and p.name[0] != "_"
    )
    assert sorted(DOORS) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it_and_no_door(room):
    above = ROOMS[: ROOMS.index(room) + 1]
    for path in (ROOT / "lab" / room).rglob("*.py"):
        for name in imports(path):
            first, _, rest = name.partition(".")
            assert first not in DOORS, f"{path} imports the door {first}"
            if first == "lab" and rest:
                assert rest.split(".")[0] in above, f"{path} imports {name}"


def test_a_door_imports_only_doors_before_it():
    for door in DOORS:
        before = DOORS[: DOORS.index(door)]
        for name in imports(ROOT / f"{door}.py"):
            first = name.partition(".")[0]
            assert first not in DOORS or first in before, f"{door} imports {first}"


def test_figures_never_import_torch():
    modules = [f"lab.figures.{path.stem}" for path in (ROOT / "lab" / "figures").glob("[!_]*.py")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_only_its_own_file_compares_the_name_of_a_data_set():
    keys = "dataset_name|model_name|debias_method|loss_function"
    compared = re.compile(rf"({keys})\"?\]? *(==|!=|in|not in) *[\"'\[(A-Z]")
    for path in (ROOT / "lab").rglob("*.py"):
        found = compared.findall(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"
