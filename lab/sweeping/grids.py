"""The settings of a sweep: grids, lists and random draws, and their names."""

import itertools
import json
import math
import random
from collections.abc import Callable

from lab.config import seeds, strict_yaml
from lab.config.strict_yaml import show
from lab.system.errors import ConfigError

MOST_JOBS = 10_000
TRIES = 100  # for every draw that has to differ from those before
DIGITS = 4  # of a drawn number
# What a sweep sets for every job itself, and what to use instead.
OWN = {
    "seed": "seeds in the sweep file",
    "results_dir": "results_dir=… on the command line, for the folder of all sweeps",
    "wandb.group": "none, it is the sweep's name",
    "plugins": "plugins in the base configuration, or plugins=[…] on the command line",
}
DISTRIBUTIONS = ("uniform", "log_uniform", "int_uniform", "choice")


def product(grid, problems: list[str]) -> list[dict]:
    """The product of lists of values, the last key fastest."""
    if not isinstance(grid, dict) or not grid:
        problems.append(f"grid: given {show(grid)}; allowed: a list of values for each key")
        return []
    _names(grid, "grid", problems)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid.{name}: given {show(values)}; allowed: a list of values")
        elif again := _repeated(values):
            problems.append(f"grid.{name}: {show(again[0])} given twice; allowed: once each")
    if problems:
        return []
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_JOBS:
        problems.append(f"grid: {count:,} settings; allowed: up to {MOST_JOBS:,}")
        return []
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def listed(entries, problems: list[str]) -> list[dict]:
    """The settings of `list`, as written."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(f"list: given {show(entries)}; allowed: a list of `key: value` mappings")
        return []
    if not entries:
        problems.append("list: given []; allowed: one setting or more")
    for entry in entries:
        _names(entry, "list", problems)
    if again := _repeated(entries):
        problems.append(f"list: {show(again[0])} given twice; allowed: once each")
    return entries


def random_draws(section, problems: list[str]) -> list[dict]:
    """Different settings from distributions; each number derives from (seed, key, draw) alone."""
    allowed = "{seed: 0, draws: N, keys: {key: {distribution: …}, …}}"
    if not isinstance(section, dict) or not {"draws", "keys"} <= set(section) <= {
        "seed", "draws", "keys",
    }:  # fmt: skip
        problems.append(f"random: given {show(section)}; allowed: {allowed}")
        return []
    seed, draws, keys = section.get("seed", 0), section["draws"], section["keys"]
    if type(seed) is not int or seed < 0:
        problems.append(f"random.seed: given {show(seed)}; allowed: a whole number from 0")
    if type(draws) is not int or not 1 <= draws <= MOST_JOBS:
        problems.append(
            f"random.draws: given {show(draws)}; allowed: a whole number from 1 to {MOST_JOBS}"
        )
    if not isinstance(keys, dict) or not keys:
        problems.append(f"random.keys: given {show(keys)}; allowed: a distribution for each key")
        return []
    _names(keys, "random.keys", problems)
    drawn = {name: _sampler(name, given, problems) for name, given in keys.items()}
    if problems:
        return []
    settings: dict[str, dict] = {}
    for draw in range(draws * TRIES):
        setting = {
            name: value(random.Random(seeds.derive_seed(seed, "sweep", name, draw)))
            for name, value in drawn.items()
        }
        settings.setdefault(override_text(setting), setting)
        if len(settings) == draws:
            return list(settings.values())
    problems.append(
        f"random.draws: given {draws}, but only {len(settings)} different settings came up in "
        f"{draws * TRIES} draws; allowed: fewer draws, or wider distributions"
    )
    return []


def _names(names, where: str, problems: list[str]) -> None:
    for name in names:
        if name in OWN:
            problems.append(f"{where}.{name}: the sweep sets it; allowed: {OWN[name]}")
        elif "=" in name:
            problems.append(f"{where}.{strict_yaml.shorten(name)}: no such key")


def _sampler(name: str, given, problems: list[str]) -> Callable:
    """A function of a `random.Random` that draws one value (of None, with a problem)."""
    checked = distribution(f"random.keys.{name}", given, problems)
    if checked is None:
        return lambda generator: None
    kind, values = checked
    if kind == "choice":
        return lambda generator: generator.choice(values)
    low, high = values
    if kind == "int_uniform":
        return lambda generator: generator.randint(low, high)
    if kind == "uniform":
        return lambda generator: _rounded(generator.uniform(low, high), low, high)
    return lambda generator: _rounded(
        math.exp(generator.uniform(math.log(low), math.log(high))), low, high
    )


def distribution(where: str, given, problems: list[str]) -> tuple[str, list] | None:
    """(kind, values) of a distribution such as `{log_uniform: [1e-4, 1]}`; None with a problem."""
    allowed = f"{{{'|'.join(DISTRIBUTIONS)}: […]}}"
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in DISTRIBUTIONS:
        problems.append(f"{where}: given {show(given)}; allowed: {allowed}")
        return None
    ((kind, values),) = given.items()
    if kind == "choice":
        if not isinstance(values, list) or not values or _repeated(values):
            problems.append(f"{where}.choice: given {show(values)}; allowed: different values")
            return None
        return kind, values
    types = (int,) if kind == "int_uniform" else (int, float)
    lowest = 0 if kind == "log_uniform" else -math.inf
    fine = isinstance(values, list) and len(values) == 2
    fine = fine and all(type(value) in types for value in values)
    if not fine or not lowest < values[0] < values[1] < math.inf:
        noun = "whole numbers" if kind == "int_uniform" else "numbers"
        above = " above 0" if kind == "log_uniform" else ""
        problems.append(
            f"{where}.{kind}: given {show(values)}; allowed: [low, high], {noun}{above}"
        )
        return None
    return kind, values


def _rounded(value: float, low: float, high: float) -> float:
    """Few enough digits for names and tables."""
    return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))


def _repeated(values: list) -> list:
    """Values that occur again."""
    seen, again = set(), []
    for value in values:
        text = override_text(value)
        if text in seen:
            again.append(value)
        seen.add(text)
    return again


def varying(settings: list[dict]) -> list[str]:
    """The keys whose values differ between settings, in their order."""
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    return [
        name
        for name in names
        if len({override_text(s[name]) if name in s else None for s in settings}) > 1
    ]


def setting_name(setting: dict, keys: list[str]) -> str:
    """`key=value, …` of the keys that differ between settings."""
    shown = [f"{key}={override_text(setting[key])}" for key in keys if key in setting]
    return ", ".join(shown) or "base"


def override_text(value) -> str:
    """A value in one line, as `key=value` takes it on the command line."""
    if isinstance(value, str):
        try:
            if strict_yaml.parse(value, "value") == value:
                return value
        except ConfigError:
            pass  # text that YAML would not take as it is
    return json.dumps(value, ensure_ascii=False)


def override_texts(overrides: dict) -> list[str]:
    """`key=value` for every key."""
    return [f"{name}={override_text(value)}" for name, value in overrides.items()]
