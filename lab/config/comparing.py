"""Which settings may change when a run is resumed."""

from lab.config.registry import Analysis
from lab.config.schema import Config
from lab.config.strict_yaml import show

# Keys that do not change what a run measures; `analyses` shows in the switches that follow from it.
FREE_TO_CHANGE = (
    "results_dir", "num_workers", "checkpoint_every", "dfr_num_workers", "plot_format",
    "tensorboard", "wandb", "plugins", "analyses",
)  # fmt: skip


def changes_results(old: Config, new: Config) -> list[str]:
    """One line for every key with a change that a resumed run cannot take.

    `epochs` may grow; `FREE_TO_CHANGE` may change.
    """
    lines = []
    before, after = old.resolved(), new.resolved()
    for name in after:
        if name not in before:  # of a plugin that the run did not have
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
