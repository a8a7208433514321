"""The README says what the code does."""

import re
from pathlib import Path

from lab.config import document
from lab.config.records import BUILT_IN
from lab.config.registry import Method
from lab.runs import run as tracking

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_keys_is_the_generated_one():
    assert document.markdown_table() in README, "replace it by what `python config.py` prints"


def test_the_two_commands_are_on_the_first_screen():
    first = "\n".join(README.splitlines()[:40])
    for command in ("make run", "make test", "pip install -r requirements.txt && python main.py"):
        assert command in first


def test_pictures_exist_and_methods_and_files_are_named():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
        assert (ROOT / path).stat().st_size < 1_000_000
    for name in BUILT_IN.of(Method):
        assert f"`{name}`" in README
    for name in ("training_history.csv", "analysis.csv", "group_counts.csv", "timings.csv"):
        assert f"`{name}`" in README
    assert f"`{', '.join(tracking.ANALYSIS_COLUMNS)}`" in README


def test_the_rooms_import_only_rooms_above_them():
    """The order of the rooms in the README is the order of imports."""
    order = re.findall(r"`([a-z_]+(?:\.py|/))`", README.partition("## The rooms")[2])
    order = [name.removesuffix(".py").removesuffix("/") for name in order]
    files = {p.stem: [p] for p in ROOT.glob("*.py")}
    rooms = ("sources", "data_sets", "methods", "sweeping")
    files |= {room: list((ROOT / room).glob("*.py")) for room in rooms}
    assert set(files) <= set(order)
    for room, paths in files.items():
        for path in paths:
            for line in path.read_text(encoding="utf-8").splitlines():
                found = re.match(r"(?:from|import) ([a-z_]+)", line)
                if found and found[1] in files and found[1] != room:
                    assert order.index(found[1]) < order.index(room), f"{room} imports {found[1]}"
