"""Documents made from the settings and the records: help, `config.yaml`, tables of the docs.

`make docs` writes `config.yaml` and the marked parts of the pages; a test compares them.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.config import records, strict_yaml
from lab.config.keys import Section
from lab.config.messages import field_allowed
from lab.config.registry import (
    Analysis,
    Backbone,
    Catalogue,
    DataSet,
    Figure,
    Loss,
    Method,
    Network,
)
from lab.config.schema import SECTIONS, fields, layout, schema

SELECTING = (DataSet, Network, Loss, Method)
WIDTH = 44  # of `key: value` before a comment
TABLES = {
    "data_sets": DataSet, "networks": Network, "methods": Method, "losses": Loss,
    "analyses": Analysis, "figures": Figure, "backbones": Backbone,
}  # fmt: skip


def default(value) -> str:
    """A default as YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(catalogue: Catalogue = records.BUILT_IN) -> str:
    """Every key with default, allowed values and meaning, 80 columns wide."""
    choices = {kind.selected_by: catalogue.of(kind) for kind in SELECTING}
    lines: list[str] = []
    for name, field, value in fields(catalogue):
        if title := SECTIONS.get(name):
            lines += ["", f"{title}:"]
        lines += textwrap.wrap(f"  {name} = {default(value)}", 78, subsequent_indent="      ")
        indent: Any = {"initial_indent": "      ", "subsequent_indent": "      "}
        text = f"{field.description} [{field_allowed(field)}]"
        lines += textwrap.wrap(text, 78, **indent)
        for record in choices.get(name, {}).values():
            text = f"{record.name}: {record.meaning}"
            lines += textwrap.wrap(
                text, 78, initial_indent="      - ", subsequent_indent="        "
            )
    return "\n".join(lines).strip()


def config_yaml() -> str:
    """`config.yaml`: every key at its default, with its meaning as a comment."""
    lines = [
        "# Every key at its default; `python main.py --help` shows the allowed values.",
        "# Override on the command line: python main.py epochs=5 debias_method=GroupDRO "
        "wandb.enable=false",
    ]
    model = schema(records.BUILT_IN)
    for name in layout(records.BUILT_IN):
        if title := SECTIONS.get(name):
            lines += ["", f"# {title}"]
        field = model.model_fields[name]
        if isinstance(field.default, Section):
            lines.append(f"{name}:")
            for inner, item in type(field.default).model_fields.items():
                lines += _commented(f"  {inner}", item.default, item.description)
        else:
            lines += _commented(name, field.default, field.description)
    return "\n".join(lines) + "\n"


def _commented(name: str, value, meaning: str | None) -> Iterator[str]:
    """`key: value  # meaning`, on two lines where one would be too long."""
    line = f"{name}: {_inline(value)}"
    whole = f"{line:<{WIDTH}} # {meaning}"
    if len(whole) <= 120:
        return iter([whole])
    indent = name[: len(name) - len(name.lstrip())]
    return iter([f"{indent}# {meaning}", line])


def _inline(value) -> str:
    """A value in one line of YAML."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return strict_yaml.dump(value).removesuffix("...\n").strip()


def keys_table() -> str:
    """The table of keys as Markdown, one table a section."""
    lines: list[str] = []
    for name, field, value in fields():
        if title := SECTIONS.get(name):
            heading = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
            lines += ["", f"## {title}", "", *heading]
        lines.append(
            _row(f"`{name}`", f"`{default(value)}`", field_allowed(field), field.description)
        )
    return "\n".join(lines).strip()


def _row(*cells) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(content) -> str:
    """Text for a cell: `|` would end it, and `<name>` outside code would be a tag of HTML."""
    text = str(content).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "\\<")


def records_table(kind) -> str:
    """The records of a kind as a Markdown table: name, meaning, own keys, where the code is."""
    has_keys = kind not in (Figure, Backbone)
    has_code = kind is not Backbone
    head = ["name", "meaning", *["own keys"] * has_keys, *["code"] * has_code]
    lines = [_row(*head), _row(*("---" for _ in head))]
    for record in records.BUILT_IN.of(kind).values():
        cells = [f"`{record.name}`", record.meaning]
        if has_keys:
            cells.append(", ".join(f"`{name}`" for name in record.own_keys()))
        if has_code:
            module, _, name = str(record.code).partition(":")
            cells.append(f"`{module.replace('.', '/')}.py`: `{name}`")
        lines.append(_row(*cells))
    return "\n".join(lines)


def parts() -> dict[str, str]:
    """{name of a marked part of the docs: its text}."""
    tables = {name: records_table(kind) for name, kind in TABLES.items()}
    return {"keys": keys_table(), **tables}


def filled(page: str) -> str:
    """A page with its parts between `<!-- begin: name -->` and `<!-- end: name -->` filled.

    Raises `KeyError` for a part that does not exist.
    """
    found = parts()

    def part(match: re.Match) -> str:
        name = match[1]
        return f"<!-- begin: {name} -->\n\n{found[name]}\n\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", part, page, flags=re.S)


def documents(root: Path) -> dict[Path, str]:
    """{file: what it has to hold} of `config.yaml` and of all pages."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = {page: filled(page.read_text(encoding="utf-8")) for page in pages}
    return {root / "config.yaml": config_yaml(), **found}


if __name__ == "__main__":
    for file, text in documents(Path(__file__).parents[2]).items():
        file.write_text(text, encoding="utf-8")
