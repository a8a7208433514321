"""Which settings may change when a run is resumed."""

from lab.config.registry import Analysis
from lab.config.schema import Config
from lab.config.strict_yaml import show

# Keys that do not change what a run measures; `analyses` shows in the switches that follow from it.
FREE_TO_CHANGE = (
    "results_dir", "num_workers", "checkpoint_every", "dfr_num_workers", "plot_format",
    "tensorboard", "wandb", "plugins", "analyses",
)  # fmt: skip


def _belongs_to_others(config: Config, name: str) -> bool:
    """Whether only other data sets, networks, … than the configured ones use a key."""
    kind, users = config.catalogue.users.get(name, (None, {}))
    if kind is None or kind is Analysis or not kind.selected_by:
        return False
    return getattr(config, kind.selected_by) not in users


def changes_results(old: Config, new: Config) -> list[str]:
    """One line for every key with a change that a resumed run cannot take.

    `epochs` may grow; `FREE_TO_CHANGE` may change, and so may keys that only others than the
    configured data set, network, method and loss use.
    """
    lines = []
    before, after = old.resolved(), new.resolved()
    for name in after:
        if name not in before:  # of a plugin that the run did not have
            continue
        if _belongs_to_others(old, name) and _belongs_to_others(new, name):
            continue
        was, given = before[name], after[name]
        # A schedule over the epochs is another one over more of them.
        longer = name == "epochs" and given > was and old.scheduler == "none"
        if was != given and not longer and name not in FREE_TO_CHANGE:
            more = " or more" if name == "epochs" and old.scheduler == "none" else ""
            lines.append(
                f"{name}: given {show(given)}, but the run to resume has {show(was)}; allowed: "
                f"{show(was)}{more}"
            )
    for name, record in new.catalogue.of(Analysis).items():
        if record.switch not in before and getattr(new, record.switch):
            lines.append(f"analyses: given {name}, which the run to resume does not make")
    return lines
