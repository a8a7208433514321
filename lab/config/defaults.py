"""What `auto` and null stand for where that depends on other keys.

The values that the checks across keys read are resolved before them (`first`), the others after.
Configurations hold the resolved values, and the log says what was chosen (`notes`).
"""

import textwrap
from collections.abc import Callable
from typing import Any

from lab.config.registry import Loss

SIZES = ("num_train_samples", "num_val_samples", "num_test_samples")
WEIGHT_DECAY = {"SGD": 0.0, "Adam": 0.01}
ADAM_RATE = 0.001
DFR_RATIO = 0.2


def _loss(c) -> str:
    """The first loss whose outputs suit the labels."""
    classes, losses = c.data_set.class_indices, c.catalogue.of(Loss)
    return next(name for name, loss in losses.items() if loss.class_outputs == classes)


def _strategy(c) -> str:
    return "original" if c.data_set.official_validation else "split_from_train"


def _ratio(c) -> float:
    """Samples are set aside only where DFR needs them."""
    split_off = c.dfr_val_split_strategy == "split_from_train"
    return DFR_RATIO if c.use_dfr and split_off and not c.data_set.retrains_on_train else 0.0


def _size(split: int) -> Callable[[Any], int | None]:
    return lambda c: c.data_set.sizes(c)[split]


def _rate(c) -> float:
    return ADAM_RATE if c.optimizer == "Adam" else c.network.sgd_rate(c)


# Each key in the order in which they follow from each other, with what it stands for.
FIRST: dict[str, Callable[[Any], Any]] = {
    "loss_function": _loss,
    **{name: _size(split) for split, name in enumerate(SIZES)},
    "dfr_val_split_strategy": _strategy,
    "dfr_val_ratio": _ratio,
    "learning_rate": _rate,
}


def is_unset(name: str, value: Any) -> bool:
    """Whether the value of a key of `FIRST` says that it follows from others."""
    # Of sizes null means all.
    return value == "auto" if name in (*SIZES, "dfr_val_split_strategy") else value is None


def after(config) -> dict[str, Any]:
    """What null stands for in the keys that no check reads."""
    published = config.dfr_val_split_strategy != "target"
    return config.data_set.resolve(config) | {
        "experiment_name": config.data_set.experiment or config.dataset_name,
        "weight_decay": WEIGHT_DECAY[config.optimizer],
        "group_batches": "full" if config.network.full_batches else "mini",
        "dfr_balance": published,
        "dfr_standardize": published,
    }


def notes(chosen: dict[str, Any]) -> list[str]:
    """The lines of the log, 80 columns at most, on what was chosen: {key: value}."""
    if not chosen:
        return []
    shown = [f"{name}: {'null (all)' if v is None else v}" for name, v in chosen.items()]
    text = f"Chosen by the other settings: {', '.join(shown)}"
    return textwrap.wrap(text, 80, subsequent_indent="    ", break_on_hyphens=False)
