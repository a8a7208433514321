"""Plugins: Python files with further records, named by the key `plugins`.

Importing one runs its code, so it happens only for files that the user names in a configuration
of their own or on the command line: a results folder never makes anything run.
"""

import hashlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from lab.config.keys import Key, own
from lab.config.registry import KINDS, Record
from lab.config.strict_yaml import shorten
from lab.system.errors import ConfigError

KEY_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
MAX_BYTES = 10 * 2**20
FACTS = "environment.json"
RUN_FILES = ("config_used.yaml", "status.json", "manifest.json")  # of a run's or sweep's folder
_imported: dict[tuple[str, str], ModuleType] = {}  # by file and content


def named(document: dict) -> list[Path]:
    """The files that the document names; [] where the key does not hold names, which the schema
    reports."""
    given = document.get("plugins")
    if not isinstance(given, list) or not all(isinstance(n, str) and n for n in given):
        return []
    return list(map(Path, given))


def resolve(document: dict, folder: Path) -> None:
    """Make the names of the document's plugins absolute; relative ones start at `folder`."""
    if files := named(document):
        document["plugins"] = [str((folder / file.expanduser()).resolve()) for file in files]


def digest(file: Path) -> str:
    """SHA-256 of a plugin's content. Raises `ConfigError` when it cannot be read."""
    return hashlib.sha256(_content(file)).hexdigest()


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise ConfigError(f"plugins: {file}: no such file")
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"plugins: {file}: cannot be read, {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"plugins: {file}: too large; allowed: up to {MAX_BYTES} bytes")
    return content


def imported(files: list[Path]) -> list[Record]:
    """The records of these files, which are imported. Raises `ConfigError` for one that is not a
    plugin or does not import, with file and line."""
    found = []
    for number, file in enumerate(files):
        if file in files[:number]:
            raise ConfigError(f"plugins: {file}: named twice; allowed: once")
        for folder in file.parents:
            if any((folder / name).exists() for name in RUN_FILES):
                raise ConfigError(
                    f"plugins: {file}: lies in a results folder, {folder}, from which nothing is "
                    "imported; put it beside your configuration"
                )
        found += _records(file, _module(file))
    return found


def _module(file: Path) -> ModuleType:
    """The imported module of a file; the same one as long as its content is the same."""
    key = (str(file), digest(file))
    if key not in _imported:
        name = f"lab_plugin_{file.stem}_{key[1][:12]}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"plugins: {file}: not a Python file, its name does not end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            del sys.modules[name]
            raise ConfigError(_why(file, error)) from None
        _imported[key] = module
    return _imported[key]


def _why(file: Path, error: BaseException) -> str:
    """One line on a plugin that did not import: the file, the line in it, the error."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines = [error.lineno]
    where = f", line {lines[-1]}" if lines else ""
    what = error.problems[0] if isinstance(error, ConfigError) else " ".join(str(error).split())
    return f"plugins: {file}{where}: {type(error).__name__}: {shorten(what, 200)}"


def _records(file: Path, module: ModuleType) -> list[Record]:
    """The list `RECORDS` of a plugin, whose records say where they come from."""
    given = getattr(module, "RECORDS", None)
    if not isinstance(given, list | tuple) or not all(isinstance(item, KINDS) for item in given):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ConfigError(
            f"plugins: {file}: has no list RECORDS of records ({kinds} of lab.config.registry)"
        )
    for record in given:
        object.__setattr__(record, "plugin", str(file))  # frozen for everybody else
        for name, item in record.own_keys().items():
            try:
                TypeAdapter(item.type, config=KEY_CONFIG).validate_python(item.field.default)
            except (ValidationError, PydanticUserError):
                raise ConfigError(
                    f"plugins: {file}: the default {item.field.default!r} of the key {name} is not "
                    "of its type, or not within its bounds"
                ) from None
    return list(given)


def facts(files: list[str], records) -> list[dict]:
    """What a run's folder keeps of its plugins: the file, its hash, the facts of its records."""
    return [
        {
            "file": file,
            "sha256": digest(Path(file)),
            "records": [record.facts() for record in records if record.plugin == file],
        }
        for file in files
    ]


def stored(folder: Path, files: list[Path]) -> list[Record]:
    """Records without code, from the facts that a run's folder keeps of its plugins.

    Raises `ConfigError` where there are none.
    """
    override = f"plugins=[{','.join(map(str, files))}]"
    repeat = f"repeat {override} on the command line to import them"
    try:
        with open(folder / FACTS, "rb") as file:
            kept = json.loads(file.read(MAX_BYTES))["plugins"]
        kinds = {kind.__name__: kind for kind in KINDS}
        found = []
        for plugin in kept:
            for fact in plugin["records"]:
                fact = dict(fact)
                kind: Any = kinds[fact.pop("kind")]
                keys = fact.pop("keys")
                plain = {k: tuple(v) if isinstance(v, list) else v for k, v in fact.items()}
                plain |= {"plugin": str(plugin["file"]), "repeat": override}
                known = kind(**plain).own_keys()
                extra = {name: _free(key) for name, key in keys.items() if name not in known}
                found.append(kind(**plain, keys=extra))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"plugins: given {', '.join(map(str, files))}, which are not imported here; {repeat}"
        ) from None
    return found


def _free(key: dict) -> Key:
    """A key of a plugin that is not imported: with any value."""
    return own(Any, key["default"], str(key["meaning"]))
