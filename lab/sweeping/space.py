"""The section `optuna` of a sweep file: search space, number of trials, sampler and pruner."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler

from lab.config import loading
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.config.strict_yaml import show
from lab.sweeping import grids, manifests
from lab.system.errors import ConfigError

DEFAULTS = {"sampler": "TPESampler", "pruner": "MedianPruner"}
KEYS = ("trials", "search_space", "sampler", "sampler_options", "pruner", "pruner_options")
# They end a search by themselves, which optuna allows within its own loop only.
EXHAUSTIVE = ("GridSampler", "BruteForceSampler")
DISTRIBUTIONS = {
    "uniform": lambda low, high: FloatDistribution(low, high),
    "log_uniform": lambda low, high: FloatDistribution(low, high, log=True),
    "int_uniform": lambda low, high: IntDistribution(low, high),
    "choice": lambda *values: CategoricalDistribution(values),
}


@dataclass(frozen=True)
class Section:
    """A checked section `optuna`. sampler: makes the one for the trial with this number."""

    trials: int
    space: dict
    sampler: Callable[[int], BaseSampler]
    pruner: optuna.pruners.BasePruner


def check(section, base, overrides, seeds: list[int]) -> Section:
    """The section as it is used. Raises `ConfigError` with every problem, before anything starts.

    base, overrides: file and `key=value` of the base configuration. The ends and the choices of
    every key must be valid beside the first values of the others, and there must be a validation
    split.
    """
    if not isinstance(section, dict):
        raise ConfigError(f"optuna: given {show(section)}; allowed: {', '.join(KEYS)}")
    problems = [
        f"optuna.{key}: no such key; allowed: {', '.join(KEYS)}"
        for key in section
        if key not in KEYS
    ]
    trials: Any = section.get("trials")
    if type(trials) is not int or not 1 <= trials <= grids.MOST_JOBS:
        allowed = f"a whole number from 1 to {grids.MOST_JOBS}"
        problems.append(f"optuna.trials: given {show(trials)}; allowed: {allowed}")
    space = _space(section.get("search_space"), problems)
    sampler = _named(optuna.samplers, "sampler", section, problems)
    pruner = _named(optuna.pruners, "pruner", section, problems)
    if not problems:
        problems += _problems_of_corners(section["search_space"], base, overrides, seeds)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return Section(trials, space, sampler, pruner(0))


def check_manifest(folder: Path, manifest: dict) -> Section:
    """See `check`."""
    base, overrides = Path(folder) / manifests.BASE, manifest["base_overrides"]
    return check(manifest["optuna"], base, overrides, manifest["seeds"])


def _space(given, problems: list[str]) -> dict:
    if not isinstance(given, dict) or not given:
        allowed = "a distribution for each key, such as learning_rate: {log_uniform: [1e-4, 1]}"
        problems.append(f"optuna.search_space: given {show(given)}; allowed: {allowed}")
        return {}
    space = {}
    for name, distribution in given.items():
        where = f"optuna.search_space.{name}"
        if name in grids.OWN:
            problems.append(f"{where}: the sweep sets it; allowed: {grids.OWN[name]}")
            continue
        checked = grids.distribution(where, distribution, problems)
        if checked is None:
            continue
        kind, values = checked
        plain = all(isinstance(value, (int, float, str, type(None))) for value in values)
        if not plain:
            problems.append(
                f"{where}.choice: given {show(values)}; allowed with optuna: numbers, texts, "
                "true, false, null"
            )
        else:
            space[name] = DISTRIBUTIONS[kind](*values)
    return space


def _named(module, kind: str, section: dict, problems: list[str]) -> Callable:
    """A function of the trial's number that makes the sampler or the pruner."""
    name = section.get(kind, DEFAULTS[kind])
    options = section.get(f"{kind}_options", {})
    known = [
        known
        for known in module.__all__
        if known.endswith(kind.capitalize())
        and not known.startswith("Base")
        and known not in EXHAUSTIVE
    ]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3) or known
        problems.append(f"optuna.{kind}: given {show(name)}; allowed: {', '.join(near)}")
        return lambda number: None
    if not isinstance(options, dict):
        problems.append(f"optuna.{kind}_options: given {show(options)}; allowed: a mapping")
        return lambda number: None

    def make(number: int):
        """Seeded by the number, so that workers draw different settings, and the same ones again
        when a study is resumed; a quasi-random sequence is one sequence, with one seed."""
        cls = getattr(module, name)
        own = dict(options)
        if "seed" in inspect.signature(cls).parameters:
            seed = own.get("seed", 0)
            shared = name == "QMCSampler"
            own["seed"] = derive_seed(seed, "optuna", *[number] * (not shared)) % 2**32
        return cls(**own)

    try:
        make(0)
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        problems.append(f"optuna.{kind}_options: given {show(options)}; {name} says: {reason}")
    return make


def _problems_of_corners(space: dict, base, overrides, seeds) -> list[str]:
    """What is wrong with the configurations at the ends of the search space."""
    ends = {key: next(iter(distribution.values())) for key, distribution in space.items()}
    first = {key: values[0] for key, values in ends.items()} | {"seed": seeds[0]}
    corners = [first, *(first | {key: v} for key, values in ends.items() for v in values[1:])]
    problems: list[str] = []
    for corner in corners:
        try:
            settings = [*overrides, *grids.override_texts(corner)]
            config = loading.load_config(base, settings, trust_plugins=True)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += _problems_of_validation(config)
    return problems


def _problems_of_validation(config: Config):
    size = config.data_set.validation_size
    if getattr(config, size) == 0:
        yield (
            f"{size}: given 0, but the search goes by validation accuracy, never by test; "
            "allowed with optuna: above 0"
        )
