"""From a sweep file to its settings and jobs.

A sweep file is YAML: `config` (the base), `seeds`, and one of `grid`, `list`, `random`, `optuna`.
Everything in it is checked, with every job's whole configuration, before anything is written.
"""

import copy
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from lab.config import loading, messages, strict_yaml
from lab.config.strict_yaml import show
from lab.sweeping import grids
from lab.system.errors import ConfigError

KINDS = ("grid", "list", "random", "optuna")
# Keys of the section `slurm`: (type, what is allowed, submitit's name for it).
SLURM = {
    "partition": (str, "text", "slurm_partition"),
    "time": (int, "minutes, a whole number from 1", "timeout_min"),
    "gpus": (int, "a whole number from 1", "gpus_per_node"),
    "cpus": (int, "a whole number from 1", "cpus_per_task"),
    "mem": (float, "GB, a number above 0", "mem_gb"),
    "constraint": (str, "text", "slurm_constraint"),
    "array": (int, "jobs at once, a whole number from 1", "slurm_array_parallelism"),
    "account": (str, "text", "slurm_account"),
    "qos": (str, "text", "slurm_qos"),
}


@dataclass(frozen=True)
class Plan:
    """A checked sweep file: what is to be run.

    keys: those that differ between settings; settings: {key: value} each; overrides: `key=value`
    of the command line, for all jobs; results_dir: the folder of results.
    """

    name: str
    text: str
    base: Path
    overrides: list[str]
    keys: list[str]
    settings: list[dict]
    seeds: list[int]
    results_dir: str
    plugins: list[str] = field(default_factory=list)
    slurm: dict = field(default_factory=dict)
    optuna: dict | None = None

    def jobs(self) -> list[dict]:
        """Every setting with every seed, as the manifest has them."""
        pairs = itertools.product(range(len(self.settings)), self.seeds)
        return [
            {
                "job": job,
                "setting": setting,
                "seed": seed,
                "overrides": self.settings[setting] | {"seed": seed},
                "folder": f"jobs/{job:04d}",
            }
            for job, (setting, seed) in enumerate(pairs)
        ]


def read(path, overrides=()) -> Plan:
    """The plan in a sweep file. Raises `ConfigError` with every problem.

    overrides: `key=value` for all jobs, over the base.
    """
    path = Path(path)
    document = strict_yaml.read(path)
    problems = _unknown(document)
    kinds = [kind for kind in KINDS if kind in document]
    if len(kinds) != 1:
        given = f"given {' and '.join(kinds)}" if kinds else "nothing given"
        problems.append(f"{path}: {given}; allowed: one of {', '.join(KINDS)}")
    if not isinstance(document.get("config"), str):
        problems.append(
            f"config: given {show(document.get('config'))}; allowed: the file with the base "
            "configuration"
        )
    seeds = _seeds(document.get("seeds"), problems)
    slurm = check_slurm(document.get("slurm", {}), problems)
    if problems:
        raise ConfigError(*problems)
    kind, optuna = kinds[0], None
    if kind == "optuna":
        optuna, settings = document["optuna"], []
    else:
        make = {"grid": grids.product, "list": grids.listed, "random": grids.random_draws}[kind]
        settings = make(document[kind], problems)
    if settings and len(settings) * len(seeds) > grids.MOST_JOBS:
        problems.append(
            f"{kind}, seeds: {len(settings)} settings × {len(seeds)} seeds; "
            f"allowed: up to {grids.MOST_JOBS} jobs"
        )
    if problems:
        raise ConfigError(*problems)
    base, overrides = Path(document["config"]), list(overrides)
    results_dir, plugins = _check_jobs(path.stem, base, overrides, settings, seeds)
    return Plan(
        name=path.stem,
        text=path.read_text(encoding="utf-8"),
        base=base,
        overrides=overrides,
        keys=grids.varying(settings),
        settings=settings,
        seeds=seeds,
        results_dir=results_dir,
        plugins=plugins,
        slurm=slurm,
        optuna=optuna,
    )


def _unknown(document: dict) -> list[str]:
    known = ("config", "seeds", "slurm", *KINDS)
    return [
        f"{strict_yaml.shorten(name)}: no such key in a sweep file; allowed: {', '.join(known)}"
        for name in document
        if name not in known
    ]


def _seeds(given, problems: list[str]) -> list[int]:
    """`seeds: 5` means 0 to 4, a list means itself."""
    whole = [given] if not isinstance(given, list) else given
    fine = whole and all(type(seed) is int and seed >= 0 for seed in whole)
    if not fine or given == 0:
        problems.append(
            f"seeds: given {show(given)}; allowed: a whole number from 1, or a list of seeds"
        )
        return []
    if isinstance(given, int):
        given = list(range(min(given, grids.MOST_JOBS + 1)))
    if len(set(given)) < len(given):
        problems.append(f"seeds: given {show(given)}, with one twice; allowed: different seeds")
    return given


def check_slurm(given, problems: list[str]) -> dict:
    """The section `slurm`, or the flags of the same names."""
    if not isinstance(given, dict):
        problems.append(f"slurm: given {show(given)}; allowed: a mapping of {', '.join(SLURM)}")
        return {}
    for name, value in given.items():
        if name not in SLURM:
            problems.append(
                f"slurm.{strict_yaml.shorten(name)}: no such key; allowed: {', '.join(SLURM)}"
            )
            continue
        kind, allowed, _ = SLURM[name]
        fine = type(value) is kind or (kind is float and type(value) is int)
        if not fine or (kind is not str and not 0 < value < math.inf) or value == "":
            problems.append(f"slurm.{name}: given {show(value)}; allowed: {allowed}")
    return given


def _check_jobs(
    name: str, base: Path, overrides, settings: list[dict], seeds: list[int]
) -> tuple[str, list[str]]:
    """Validates every job's configuration; returns the folder of results and the plugins.

    Raises `ConfigError`; a problem of many settings is reported once, with the first of them.
    """
    document, wrong_overrides = loading.read(base, overrides)
    given = [override.partition("=")[0].strip() for override in overrides]
    swept = list(dict.fromkeys(name for setting in settings for name in setting))
    problems = [
        f"{key}: the sweep sets it; allowed: {grids.OWN[key]}"
        for key in given
        if key in grids.OWN and key not in ("results_dir", "plugins")
    ]
    for key in given:
        for other in swept:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                problems.append(f"{key}: given on the command line, but the sweep sets {other}")
    problems += wrong_overrides
    if problems:
        raise ConfigError(*problems)
    records = loading.catalogue(document, base, overrides, trust_plugins=True)
    if not settings:
        config = loading.validate(document, catalogue=records)
        return config.results_dir, config.plugins
    keys = grids.varying(settings)
    found: dict[str, dict[int, None]] = {}  # problem -> the settings that have it, in order
    for number, setting in enumerate(settings):
        for seed in seeds:
            job = copy.deepcopy(document)
            whole = setting | {"seed": seed, "wandb.group": name}
            wrong = loading.apply_overrides(job, grids.override_texts(whole))
            try:
                config = loading.validate(job, wrong, records)
            except ConfigError as error:
                for problem in error.problems:
                    found.setdefault(problem, {})[number] = None
    for problem, numbers in found.items():
        first = next(iter(numbers))
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        where = f"setting {first} ({grids.setting_name(settings[first], keys)}){more}"
        if len(numbers) == len(settings) > 1:
            where = "every setting"
        problems.append(f"{where}: {problem}")
    if problems:
        others = len(problems) - messages.PROBLEMS
        rest = [f"… and {others} more"] if others > 0 else []
        raise ConfigError(*problems[: messages.PROBLEMS], *rest)
    return config.results_dir, config.plugins
