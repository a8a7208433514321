"""From a YAML file and overrides to a `Config`, or to one error with every problem at once."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lab.config import checks, defaults, effects, plugins, records, strict_yaml
from lab.config.messages import PROBLEMS, of_error
from lab.config.registry import Analysis, Catalogue
from lab.config.schema import Config, schema
from lab.config.strict_yaml import shorten
from lab.system.errors import ConfigError

PATHS = (
    "results_dir", "data_dir", "features_cache_dir", "feature_extractor_weights",
    "pretrained_weights", "jtt_error_set",
)  # fmt: skip
OVERRIDES = 32_000  # characters in all


def load_config(path, overrides: Sequence[str] = (), trust_plugins: bool = False) -> Config:
    """Read a YAML file and `key=value` overrides (dotted names for nested keys).

    trust_plugins: whether the plugins that the file names are imported, which runs their code;
    those that an override names always are. A file in a run's folder, of which no plugin is
    imported, has the facts of their records beside it. Raises `ConfigError` with one line a
    problem: key, what was given, what is allowed.
    """
    document, problems = read(path, overrides)
    return validate(document, problems, catalogue(document, path, overrides, trust_plugins))


def read(path, overrides: Sequence[str] = ()) -> tuple[dict, list[str]]:
    """(the document with the overrides and absolute names of plugins, problems of overrides)."""
    document = strict_yaml.read(path, hint="give another one with --config FILE")
    plugins.resolve(document, Path(path).parent)
    given = dict.fromkeys(["plugins"], document.get("plugins"))
    problems = apply_overrides(document, overrides)
    if document.get("plugins") is not given["plugins"]:
        plugins.resolve(document, Path.cwd())
    return document, problems


def catalogue(document: dict, path, overrides: Sequence[str], trust_plugins: bool) -> Catalogue:
    """The records with those of the document's plugins, see `load_config`."""
    files = plugins.named(document)
    if not files:
        return records.BUILT_IN
    on_command_line = any(text.partition("=")[0].strip() == "plugins" for text in overrides)
    if trust_plugins or on_command_line:
        return records.BUILT_IN.with_plugins(plugins.imported(files))
    return records.BUILT_IN.with_plugins(plugins.stored(Path(path).parent, files))


def apply_overrides(document: dict, overrides: Sequence[str]) -> list[str]:
    """Write `key=value` overrides (YAML values, dotted names) into the document.

    Returns the problems, one line each.
    """
    size = sum(map(len, overrides))
    if size > OVERRIDES:
        return [f"command line: overrides of {size} characters; allowed: up to {OVERRIDES} in all"]
    problems: list[str] = []
    seen = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name or not name.isprintable():
            problems.append(
                f"{shorten(override)}: not an override; allowed: key=value, such as epochs=5"
            )
            continue
        if name in seen:
            problems.append(f"{shorten(name)}: given twice on the command line")
            continue
        seen.add(name)
        try:
            value = strict_yaml.parse(text, shorten(name))
        except ConfigError as error:
            problems += error.problems
            continue
        *parents, last = name.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                problems.append(f"{shorten(name)}: {shorten(parent)} has no keys of its own")
                break
        else:
            place[last] = value
    return problems


def validate(
    document: dict, problems: Iterable[str] = (), catalogue: Catalogue = records.BUILT_IN
) -> Config:
    """A `Config` from plain data, or a `ConfigError` with every problem (the first 50 of many).

    catalogue: the records whose names and keys are allowed.
    """
    problems, document, model = list(problems), dict(document), schema(catalogue)
    if "debias_method" in document and document["debias_method"] is None:
        document["debias_method"] = "None"
    for name in ("spurious_features", "opposite_spurious_features", "dfr_spurious_features"):
        if isinstance(document.get(name), dict):  # labels may be numbers
            document[name] = {str(label): feature for label, feature in document[name].items()}
    for name in PATHS:  # once, on reading: not every library knows ~
        if isinstance(document.get(name), str) and document[name].startswith("~"):
            document[name] = os.path.expanduser(document[name])
    wrong: set[str] = set()
    left_out = 0
    try:
        config = model.model_validate(document)
        values = {name: getattr(config, name) for name in model.model_fields}
    except ValidationError as error:
        lines, wrong, left_out = of_error(error, document, model)
        problems += lines
        good = {k: v for k, v in document.items() if k in model.model_fields and k not in wrong}
        # Each field stands alone, so the rest is valid and the combinations can be checked.
        values = dict(model.model_validate(good))
    right = {name: value for name, value in values.items() if name not in wrong}
    chosen = checks.chosen_first(right, catalogue)
    problems += checks.problems(checks.Values(right | chosen, catalogue))
    if problems:
        left_out += max(0, len(problems) - PROBLEMS)
        rest = [f"… and {left_out} more"] if left_out else []
        raise ConfigError(*problems[:PROBLEMS], *rest)
    return _resolved(config.model_copy(update=chosen), document, chosen)


def _resolved(config: Config, document: dict, chosen: dict[str, Any]) -> Config:
    """With a value in place of every null that stands for one, and what the log says of it."""
    derived = defaults.after(config)
    unset = {name: value for name, value in derived.items() if getattr(config, name) is None}
    switches, notes = _analyses(config)
    config = config.model_copy(update=unset | switches)
    derived |= {name: value(config) for name, value in defaults.FIRST.items()}
    # A key at its default, as in a file that lists all keys, says nothing.
    given = {name for name in document if _changed(config, name, derived | switches)}
    config._ignored = tuple(effects.without_effect(config, given))
    used = {name: value for name, value in chosen.items() if effects.has_effect(config, name)}
    config._notes = (*defaults.notes(used), *notes)
    return config


def _analyses(config: Config) -> tuple[dict[str, bool], list[str]]:
    """({switch: whether the analysis is made}, lines on those that do not apply)."""
    switches: dict[str, bool] = {}
    left_out: dict[str, list[str]] = {}
    for name, record in config.catalogue.of(Analysis).items():
        explicit, reason = getattr(config, record.switch), record.applies(config)
        wanted = checks.wanted(config, record) if explicit is None else explicit
        switches[record.switch] = wanted and not reason
        if wanted and reason:
            left_out.setdefault(reason, []).append(name)
    notes = [
        f"Analyses that do not apply with {reason}: {', '.join(names)}"
        for reason, names in left_out.items()
    ]
    return switches, notes


def _changed(config: Config, name: str, derived: dict[str, Any]) -> bool:
    default = type(config).model_fields[name].default
    return getattr(config, name) != derived.get(name, default)
