"""Trackers: they show the numbers of a run's tables elsewhere, and can never stop the run.

A tracker is any object with `log(epoch, values)`, `images(paths)` and `finish(summary, failed)`.
"""

import logging
import math
import os
from pathlib import Path

from config import Config

log = logging.getLogger(f"spurious.{__name__}")

WANDB_TIMEOUT = 5  # seconds; wandb's own without a network is over 90


class Wandb:
    """Shows a run on Weights & Biases, with the epoch as x-axis."""

    def __init__(self, run):
        self.run = run
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, values: dict) -> None:
        # NaN would end the axes of wandb's charts; the tables keep it.
        shown = {name: value for name, value in values.items() if _finite(value)}
        self.run.log(shown | {"epoch": epoch})

    def images(self, paths) -> None:
        import wandb

        if any(path.suffix != ".png" for path in paths):
            log.warning("wandb: shows no SVG; plot_format: png has the plots there, too")
        else:
            self.run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})

    def finish(self, summary: dict, failed: bool) -> None:
        self.run.summary.update({k: v for k, v in summary.items() if _finite(v)})
        self.run.finish(exit_code=int(failed))


def _finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def start_wandb(config: Config, folder: Path, run_id: str) -> Wandb | None:
    """A wandb run as the configuration asks for, or None with one warning.

    run_id: the same when the run is resumed, so that wandb goes on with it. Never waits longer
    than a few seconds: without a key it goes offline at once, without a network after
    `WANDB_TIMEOUT`.
    """
    if not config.wandb.enable:
        return None
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE", "auto")
        mode = config.wandb.mode if config.wandb.mode != "auto" else mode
        if mode in ("auto", "online") and not _logged_in(wandb):
            if mode == "online":
                log.warning("wandb: not logged in (`wandb login`), so this run is kept offline")
            mode = "offline"
        mode = "online" if mode == "auto" else mode
        try:
            run = _init_wandb(wandb, config, folder, run_id, mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            log.warning("wandb: no connection, so this run is kept offline (%s)", error)
            mode, run = "offline", _init_wandb(wandb, config, folder, run_id, "offline")
        if mode == "offline":
            log.info("wandb: offline; to upload: wandb sync %s", Path(run.dir).parent)
        elif mode == "online":
            log.info("wandb: %s", run.url)
        return Wandb(run)
    except Exception as error:  # a tracker must never stop a run
        log.warning("wandb: not used, %s", error)
        return None


def _logged_in(wandb) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # a key that cannot be one
        log.warning("wandb: the key is not usable (%s)", error)
        return False


def _init_wandb(wandb, config: Config, folder: Path, run_id: str, mode: str):
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        group=config.wandb.group,
        name=folder.name,
        id=run_id,
        resume="allow",
        config=config.resolved(),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True, console="off"),
    )
