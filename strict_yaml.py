"""YAML for settings: safe, without surprises, with errors that name file and line.

Numbers such as 1e-4 are numbers, dates and octals stay text; aliases, merge keys, repeated keys and
large files are refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from errors import ConfigError

MAX_BYTES = 256_000


class Loader(yaml.SafeLoader):
    """Safe YAML with numbers such as 1e-4, and without aliases, merges and repeated keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if name is None or key_node.tag == "tag:yaml.org,2002:merge":
                problem = "a key must be a plain name (no merge keys, lists or mappings)"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if name in seen:
                problem = f"the key {name!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(name)
        # Keys as they are written: `3` or `true` is as unknown a name as any other.
        return {key.value: self.construct_object(value, deep) for key, value in node.value}


# Only what a setting can be: dates, octal and sexagesimal numbers stay text.
Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE|yes|Yes|no|No|on|On|off|Off)", "tTfFyYnNoO"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark and where.endswith((".yaml", ".yml")) else ""
        raise ConfigError(f"{where}{line}: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        # PyYAML lets Python's own errors out for hostile or malformed documents.
        nested = isinstance(error, RecursionError)
        reason = "nested too deeply" if nested else " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML ({reason})") from None


def read(path) -> dict:
    """The mapping in a YAML file; `ConfigError` names the file and the line."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes; allowed: up to {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = " (give another one with --config FILE)" if not path.exists() else ""
        raise ConfigError(f"{path}: cannot be read, {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    document = parse(text, str(path))
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: given {show(document)}; allowed: lines of `key: value`")
    return document


def show(value) -> str:
    """A given value as YAML would write it, with its kind where that explains the error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return f"{shown!r} (text)"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
