"""YAML for settings: safe, without surprises, with errors that name file and line.

Numbers such as 1e-4 are numbers, dates and octals stay text; aliases, merge keys, tags, repeated
keys and large files are refused. What `dump` writes reads back as it was.
"""

import os
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from lab.system.errors import ConfigError

MAX_BYTES = 256_000
MAX_VALUES = 10_000  # PyYAML reads 45,000 a second, which no limit on bytes alone makes short
SHOWN = 60  # characters of what was given that an error repeats


class Loader(yaml.SafeLoader):
    """Safe YAML with numbers such as 1e-4, and without aliases, merges, tags and repeated keys."""

    def __init__(self, text: str):
        super().__init__(text)
        self.values = 0

    def compose_node(self, parent, index):
        event, problem = self.peek_event(), None
        self.values += 1
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not read"
        elif event.tag is not None:
            problem = "tags (!name) are not read"
        elif self.values > MAX_VALUES:
            problem = f"more than {MAX_VALUES} keys and values"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            problem = None
            if name is None or key_node.tag == "tag:yaml.org,2002:merge":
                problem = "a key must be a plain name (no merge keys, lists or mappings)"
            elif not name.isprintable():
                problem = f"the key {shorten(name)!r} has characters that cannot be shown"
            elif name in seen:
                problem = f"the key {shorten(name)!r} is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(name)
        # Keys as they are written: `3` or `true` is as unknown a name as any other.
        return {key.value: self.construct_object(value, deep) for key, value in node.value}


# Only what a setting can be: dates, octal, sexagesimal and endless whole numbers stay text.
Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE|yes|Yes|no|No|on|On|off|Off)", "tTfFyYnNoO"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,99})", "-+0123456789"),
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


class Dumper(yaml.SafeDumper):
    """Puts in quotes what either `Loader` or any other YAML would not take for text."""

    yaml_implicit_resolvers = {  # noqa: RUF012, the name and form are PyYAML's
        first: Loader.yaml_implicit_resolvers.get(first, [])
        + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        for first in {**Loader.yaml_implicit_resolvers, **yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data) -> bool:
        return True


def dump(data) -> str:
    """The data as YAML that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str, where: str) -> Any:
    """The data in a YAML text; `ConfigError` names `where` and, in a file, the line."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: {len(text)} characters; allowed: up to {MAX_BYTES}")
    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark and where.endswith((".yaml", ".yml")) else ""
        raise ConfigError(f"{where}{line}: {_reason(error.problem or error)}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        # PyYAML lets Python's own errors out for hostile or malformed documents.
        nested = isinstance(error, RecursionError)
        reason = "nested too deeply" if nested else _reason(error)
        raise ConfigError(f"{where}: not readable as YAML ({reason})") from None


def _reason(error) -> str:
    return shorten(" ".join(str(error).split()), 200)


def read(path, hint: str = "") -> dict:
    """The mapping in a YAML file; `ConfigError` names the file and the line.

    `hint` tells what to do where there is no such file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device has no size, and no end
    except (OSError, ValueError) as error:
        hint = f" ({hint})" if hint and not os.path.exists(path) else ""
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read, {reason}{hint}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: too large; allowed: up to {MAX_BYTES} bytes")
    try:
        document = parse(data.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: given {show(document)}; allowed: lines of `key: value`")
    return document


def shorten(text: str, length: int = SHOWN) -> str:
    """The text, its beginning where it is longer."""
    return text if len(text) <= length else text[: length - 3] + "..."


# Python's own repr has no end for long lists and fails for deep ones.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = SHOWN
_repr.maxstring = _repr.maxlong = _repr.maxother = 3 * SHOWN  # what is longer is cut in the middle


def show(value) -> str:
    """A given value as YAML would write it, with its kind where that explains the error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{shorten(value)!r} (text)"
    return shorten(_repr.repr(value))
