"""What is asked for: the options of the command, and the configuration of every task's network.

A task is an attribute that serves as the label. All tasks share the settings of one configuration;
`groupings` and the keys of `OWN` are what the run of a task has instead.
"""

import json
from pathlib import Path
from typing import Any

from lab.config import loading
from lab.config.registry import DataSet
from lab.config.schema import Config
from lab.config.strict_yaml import show
from lab.system.errors import ConfigError, DataError, UserError

OPTIONS: dict[str, int | float] = {"eps": 33.0, "k": 10, "gamma": 0.9}
OPTIONS_FILE = "options.json"
# Nothing is set aside for DFR: what would be differs from task to task.
OWN = {"use_dfr": False, "dfr_val_split_strategy": "original"}


def wrong_options(options: dict[str, Any], count: int | None = None) -> list[str]:
    """Problems of `--eps`, `--k`, `--gamma`; count: of attributes, if known."""
    eps, k, gamma = (options.get(name, default) for name, default in OPTIONS.items())
    problems = []
    if not 0 <= eps <= 200:
        problems.append(f"--eps: given {eps:g}; allowed: 0 to 200")
    if not 0 < gamma <= 1:
        problems.append(f"--gamma: given {gamma:g}; allowed: above 0, up to 1")
    if k < 2 or (count is not None and k > count):
        problems.append(f"--k: given {k}; allowed: 2 to {count or 'the number of attributes'}")
    return problems


def read_options(folder: Path) -> dict[str, Any]:
    """The options with which a matrix was started. Raises `UserError`."""
    path = folder / OPTIONS_FILE
    try:
        return {name: type(OPTIONS[name])(v) for name, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not readable, so this is no matrix to resume ({error})") from None


def check(config: Config) -> None:
    """Raises `ConfigError` for settings with which the networks would not be comparable.

    On features all of them are trained at once, which rules out a few settings more.
    """
    problems = []
    if not config.data_set.any_task:
        known = [n for n, record in config.catalogue.of(DataSet).items() if record.any_task]
        problems.append(
            f"dataset_name: given {config.dataset_name}; allowed here: {', '.join(known)}"
        )
    problems += [
        f"{name}: given {getattr(config, name)}; allowed here: {allowed}"
        for name, allowed in (("debias_method", "None"), ("celeba_splits", "official"))
        if getattr(config, name) != allowed
    ]
    if config.remove_minority_groups_train:
        problems.append("remove_minority_groups_train: given true; allowed here: false")
    if config.num_val_samples == 0:
        problems.append("num_val_samples: given 0, but δ is of validation; allowed here: above 0")
    if config.use_feature_extractor:
        problems += [
            f"{name}: given {show(getattr(config, name))}; allowed for all tasks at once: {allowed}"
            for name, refused, allowed in (
                ("train_batch_size", config.train_batch_size is None, "a whole number"),
                ("early_stopping_patience", config.early_stopping_patience is not None, "null"),
                ("loss_function", config.loss.class_outputs, "logistic, mse"),
            )
            if refused
        ]
    if problems:
        raise ConfigError(*problems)


def source(config: Config):
    """The faces and their attributes. Raises `DataError` if they are too few for pairs."""
    from lab.data_sets.sources import celeba  # with torch, slow to import

    faces = celeba.load(config.data_dir, config.target_resolution)
    if len(faces.attribute_names) < 2:
        raise DataError(f"{faces.metadata}: one attribute; pairs need two")
    return faces


def grouping(names: list[str], label: str) -> str:
    """The grouping of a task's run: its label, and as the shortcut the next attribute, cyclically.

    It only fixes the order in which samples are stored; δ is measured with every attribute.
    """
    return f"{label}:{names[(names.index(label) + 1) % len(names)]}"


def task_config(config: Config, text: str, **changes) -> Config:
    """The configuration of the run of one task. text: its `grouping`."""
    return loading.validate(config.resolved() | OWN | {"groupings": [text]} | changes)


def task_arguments(file: str, overrides: list[str], task: str) -> list[str]:
    """The command line of main.py that trains the network of one task. Raises `UserError`."""
    config = loading.load_config(file, overrides)
    check(config)
    faces = source(config)
    faces.attribute(task)
    own: dict[str, Any] = {**OWN, "groupings": [grouping(faces.attribute_names, task)]}
    kept = [o for o in overrides if o.partition("=")[0].strip() not in own]
    return ["--config", file, *kept, *(f"{key}={json.dumps(own[key])}" for key in own)]
