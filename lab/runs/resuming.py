"""Resuming an interrupted run, or extending a finished one, from its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab.config import comparing, loading
from lab.config.schema import Config
from lab.folders import status
from lab.folders.creating import CONFIG, config_yaml
from lab.folders.status import PHASES, read_status
from lab.runs.environment import add_resumed, environment
from lab.runs.run import Run
from lab.system import files
from lab.system.errors import ConfigError, UserError


class Resumption(NamedTuple):
    """A run to resume: with which configuration, and from which phase on.

    seen: the bytes of the files that this follows from, before the run is locked.
    """

    folder: Path
    config: Config
    phase: str
    seen: list[bytes]


def load_to_resume(folder: Path, config_file: str | None, overrides: Sequence[str]) -> Resumption:
    """How to resume a run; its phase is "done" if there is nothing left to do.

    config_file: None = the run's own `config_used.yaml`. Raises `ConfigError` for every key with a
    change that would change the results.
    """
    used = folder / CONFIG
    if not used.is_file():
        raise ConfigError(f"--resume: given {folder}, but there is no {used}")
    seen = _position(folder)
    # Whoever resumes a run runs its plugins again.
    old = loading.load_config(used, trust_plugins=True)
    new = loading.load_config(config_file or used, overrides, trust_plugins=True)
    problems = comparing.changes_results(old, new)
    if problems:
        raise ConfigError(*problems)
    phase = read_status(folder)["phase"]
    if new.epochs > old.epochs:
        phase = PHASES[0]
    elif phase == "done" and new.plot_format != old.plot_format:
        phase = "plots"
    return Resumption(folder, new, phase, seen)


def resume(resumption: Resumption, device: str, command: list[str]) -> Run:
    """The run, opened again. Raises `UserError` if another process has it or has changed it."""
    folder, config, phase, seen = resumption
    run = Run(folder, config)
    try:
        if _position(folder) != seen:
            raise UserError(f"{folder}: another process has just resumed this run")
        _remove_partial_files(folder)
        # Before anything changes: from here on the run is not done, whatever happens.
        run.summary = {} if phase == PHASES[0] else run.summary
        run.enter(phase)
        if phase == PHASES[0]:
            remove_results(folder)
        files.write_text(folder / CONFIG, config_yaml(config))
        add_resumed(folder, environment(config, device, command))
    except BaseException:
        run.close()
        raise
    return run


def remove_results(folder: Path) -> None:
    """Remove what follows from the trained network, which is going to be another."""
    for pattern in ("model.pt", "dfr_*", "gradcam.*", "plots/dfr.*", "plots/gradcam*"):
        for path in folder.glob(pattern):
            path.unlink()


def _position(folder: Path) -> list[bytes]:
    """The files that say how far a run is; missing ones are empty."""
    paths = [folder / CONFIG, folder / status.FILE]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def _remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left half-written, but for the tables that training rewinds."""
    first = folder / "identification"  # of JTT
    for place in (folder, folder / "plots", folder / "checkpoints", first, first / "checkpoints"):
        files.remove_temporaries(place)
    for timings in (folder / "timings.csv", first / "timings.csv"):
        if timings.exists():
            files.cut_torn_line(timings)
