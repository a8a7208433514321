"""README and pages: short, true to the code, with links that resolve."""

import re
from pathlib import Path

import pytest

from lab.config import document
from lab.config.records import BUILT_IN
from lab.config.registry import Method
from lab.config.schema import fields
from lab.runs import tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[ROOT / "README.md"]


def test_generated_documents_are_up_to_date():
    for path, text in document.documents(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make docs"


def test_the_readme_is_short_and_has_the_commands_on_its_first_screen():
    assert len(README.splitlines()) <= 220
    first = "\n".join(README.splitlines()[:40])
    for command in ("make run", "make test", "pip install -r requirements.txt && python main.py"):
        assert command in first


def anchors(text):
    """Anchors of the headings, as GitHub makes them."""
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", re.sub(r"[`*$]", "", title).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}"
        if path.suffix == ".png":
            assert path.stat().st_size < 1_000_000


def test_methods_and_files_are_described():
    for name in BUILT_IN.of(Method):
        assert f"`{name}`" in TEXTS[ROOT / "docs" / "methods.md"]
    results = TEXTS[ROOT / "docs" / "results.md"]
    for name in ("training_history.csv", "analysis.csv", "group_counts.csv", "timings.csv"):
        assert f"`{name}`" in results
    assert f"`{', '.join(tables.ANALYSIS_COLUMNS)}`" in results


def test_overrides_in_commands_name_keys_that_exist():
    known = {name.partition(".")[0] for name, _, _ in fields()} | {"plugins"}
    examples = {"analyze_flow_alignment"}
    for page, text in TEXTS.items():
        for line in re.findall(r"^.*python main\.py .*$", text, re.M):
            command = line.partition("python main.py ")[2].partition("#")[0].partition("`")[0]
            for name in re.findall(r"(?:^| )([a-z_]+)(?:\.[a-z_]+)?=", command):
                assert name in known | examples, f"{page.name}: {line}"


def test_every_preset_is_listed():
    presets = TEXTS[ROOT / "docs" / "presets.md"]
    for folder in ("configs", "sweeps"):
        for file in (ROOT / folder).glob("*.yaml"):
            assert f"](../{folder}/{file.name})" in presets, file.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_are_read_alike_on_github_and_on_the_site(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[page], flags=re.S)
    for formula in re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", text, re.S):
        assert not re.search(r"\\[^\w\s]", formula), f"{formula}: a backslash before punctuation"
        assert not re.search(r"[^\w\s]_", formula), f"{formula}: an underscore after punctuation"
