"""From a sweep file to its settings and jobs, and the manifest that keeps them.

A sweep file is YAML: `config` (the base), `seeds`, and one of `grid`, `list`, `random`, `optuna`.
Everything in it is checked, with every job's whole configuration, before anything is written.
"""

import copy
import itertools
import json
import math
import random
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.config import loading, messages, seeds, strict_yaml
from lab.config.strict_yaml import show
from lab.runs import folders
from lab.runs import status as run_status
from lab.system import files
from lab.system.errors import ConfigError, UserError

MANIFEST = "manifest.json"
BASE = "config.yaml"  # the base configuration as it was when the sweep began
KINDS = ("grid", "list", "random", "optuna")
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
        settings = {"grid": _grid, "list": _list, "random": _random}[kind](document[kind], problems)
    if settings and len(settings) * len(seeds) > MOST_JOBS:
        problems.append(
            f"{kind}, seeds: {len(settings)} settings × {len(seeds)} seeds; "
            f"allowed: up to {MOST_JOBS} jobs"
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
        keys=varying(settings),
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
        given = list(range(min(given, MOST_JOBS + 1)))
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


def _names(names, where: str, problems: list[str]) -> None:
    for name in names:
        if name in OWN:
            problems.append(f"{where}.{name}: the sweep sets it; allowed: {OWN[name]}")
        elif "=" in name:
            problems.append(f"{where}.{strict_yaml.shorten(name)}: there is no such key")


def _grid(grid, problems: list[str]) -> list[dict]:
    """The product of lists of values, the last key fastest."""
    if not isinstance(grid, dict) or not grid:
        problems.append(f"grid: given {show(grid)}; allowed: a list of values for each key")
        return []
    _names(grid, "grid", problems)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid.{name}: given {show(values)}; allowed: a list of values")
        elif twice := _twice(values):
            problems.append(f"grid.{name}: {show(twice[0])} is there twice; allowed: once each")
    if problems:
        return []
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_JOBS:
        problems.append(f"grid: {count:,} settings; allowed: up to {MOST_JOBS:,}")
        return []
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _list(entries, problems: list[str]) -> list[dict]:
    """Settings as they are written."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(f"list: given {show(entries)}; allowed: a list of `key: value` mappings")
        return []
    if not entries:
        problems.append("list: given []; allowed: one setting or more")
    for entry in entries:
        _names(entry, "list", problems)
    if twice := _twice(entries):
        problems.append(f"list: {show(twice[0])} is there twice; allowed: once each")
    return entries


def _twice(values: list) -> list:
    """Values that occur again."""
    seen, again = set(), []
    for value in values:
        text = override_text(value)
        if text in seen:
            again.append(value)
        seen.add(text)
    return again


def _random(section, problems: list[str]) -> list[dict]:
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
    drawn = {name: _distribution(name, given, problems) for name, given in keys.items()}
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


DISTRIBUTIONS = ("uniform", "log_uniform", "int_uniform", "choice")


def _distribution(name: str, given, problems: list[str]) -> Callable | None:
    """A function of a `random.Random` that draws one value."""
    checked = distribution(f"random.keys.{name}", given, problems)
    if checked is None:
        return None
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
        if not isinstance(values, list) or not values or _twice(values):
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


def _check_jobs(
    name: str, base: Path, overrides, settings: list[dict], seeds: list[int]
) -> tuple[str, list[str]]:
    """Validates every job's configuration; returns the folder of results and the plugins.

    Raises `ConfigError`; a problem of many settings is told once, with the first of them.
    """
    document, wrong_overrides = loading.read(base, overrides)
    given = [override.partition("=")[0].strip() for override in overrides]
    swept = list(dict.fromkeys(name for setting in settings for name in setting))
    problems = [
        f"{key}: the sweep sets it; allowed: {OWN[key]}"
        for key in given
        if key in OWN and key not in ("results_dir", "plugins")
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
    keys, found = varying(settings), {}
    for number, setting in enumerate(settings):
        for seed in seeds:
            job = copy.deepcopy(document)
            whole = setting | {"seed": seed, "wandb.group": name}
            wrong = loading.apply_overrides(job, override_texts(whole))
            try:
                config = loading.validate(job, wrong, records)
            except ConfigError as error:
                for problem in error.problems:
                    found.setdefault(problem, {})[number] = None
    for problem, numbers in found.items():
        first = next(iter(numbers))
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        where = f"setting {first} ({setting_name(settings[first], keys)}){more}"
        if len(numbers) == len(settings) > 1:
            where = "every setting"
        problems.append(f"{where}: {problem}")
    if problems:
        untold = problems[messages.PROBLEMS :]
        rest = [f"… and {len(untold)} more"] if untold else []
        raise ConfigError(*problems[: messages.PROBLEMS], *rest)
    return config.results_dir, config.plugins


def create(plan: Plan, command: list[str], cluster: dict) -> Path:
    """A new sweep folder with its manifest, in `<results_dir>/sweeps/`.

    It appears by a rename, whole. cluster: how the jobs are to be run. Raises `UserError`.
    """
    manifest = {
        "name": plan.name,
        "created": folders.now(),
        "sweep_file": plan.text,
        "command": command,
        "config": str(plan.base),
        "base_overrides": plan.overrides,
        "plugins": plan.plugins,
        "keys": plan.keys,
        "seeds": plan.seeds,
        "settings": [
            {"setting": n, "name": setting_name(setting, plan.keys), "overrides": setting}
            for n, setting in enumerate(plan.settings)
        ],
        "jobs": plan.jobs(),
        "cluster": cluster,
        "optuna": plan.optuna,
    }
    sweeps, fresh = Path(plan.results_dir) / "sweeps", None
    try:
        sweeps.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=sweeps))
        fresh.chmod(0o755)
        for job in manifest["jobs"]:
            (fresh / job["folder"]).mkdir(parents=True)
        files.write(fresh / BASE, plan.base.read_bytes())
        write_manifest(fresh, manifest)
        return folders.rename_to_unique(fresh, sweeps / f"{plan.name}_{manifest['created']}")
    except OSError as error:
        raise UserError(f"results_dir: {sweeps} cannot be written, {error.strerror}") from None
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest.json`, whole."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(Path(folder) / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> dict:
    """What `manifest.json` of a sweep folder says. Raises `UserError`."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["jobs"], manifest["settings"], manifest["base_overrides"]
        whole = all(isinstance(part, list) for part in known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not readable, so this is no sweep ({reason})") from None
    if not whole:
        raise UserError(f"{path}: not the manifest of a sweep")
    return manifest


def run_folder(sweep_folder: Path, job: dict) -> Path | None:
    """The newest run of a job, None if there is none yet."""
    runs = [path.parent for path in (Path(sweep_folder) / job["folder"]).glob("[!.]*/status.json")]
    return max(runs, key=lambda run: (run / "status.json").stat().st_mtime_ns, default=None)


def arguments(base: Path, manifest: dict, job: dict, folder: Path) -> list[str]:
    """The command line of `main.py` for a job of the sweep in this folder, begun anew.

    base: the file of the base configuration.
    """
    own = {"results_dir": str(folder / job["folder"]), "wandb.group": folder.name}
    if manifest.get("plugins"):  # absolute: the copy of the base is in another folder
        own["plugins"] = manifest["plugins"]
    overrides = [
        override
        for override in manifest["base_overrides"]
        if override.partition("=")[0].strip() not in ("results_dir", "plugins")
    ]
    return ["--config", str(base), *overrides, *override_texts(job["overrides"] | own)]


def shown(arguments: list[str]) -> str:
    """The command as one types it."""
    return shlex.join(["python", "main.py", *arguments])


def is_done(sweep_folder: Path, job: dict) -> bool:
    """Whether the newest run of a job is done."""
    run = run_folder(sweep_folder, job)
    try:
        return run is not None and run_status.read_status(run)["state"] == "done"
    except UserError:  # a damaged one, of which the next attempt tells
        return False


def selection_metric(names) -> str:
    """What a run is judged by, see `selection.selection_metric`; names: of its final metrics."""
    groups = [name for name in names if re.fullmatch(r"test_group_\d+_acc", name)]
    return "worst_acc" if len(groups) <= 4 else "minority_acc"
