"""Starting a run, in a new results folder."""

import secrets
import shutil
from pathlib import Path

from lab.config.schema import Config
from lab.folders.creating import CONFIG, config_yaml, now, rename_to_unique, temporary_folder
from lab.folders.status import PHASES, write_status
from lab.runs.environment import environment, write_environment
from lab.runs.run import Run
from lab.system import files
from lab.system.errors import UserError


def start(config: Config, device: str, command: list[str], facts: dict) -> Run:
    """A new results folder `<experiment_name>_<time>`, never an existing one.

    It appears by a rename with `config_used.yaml`, `environment.json` and `status.json` inside.
    facts: added to `environment.json`. Raises `UserError` when it cannot be made.
    """
    results = Path(config.results_dir)
    fresh = None
    try:
        results.mkdir(parents=True, exist_ok=True)
        fresh = temporary_folder(results)
        files.write_text(fresh / CONFIG, config_yaml(config))
        write_environment(fresh, environment(config, device, command) | facts)
        write_status(fresh, "running", PHASES[0], secrets.token_hex(4), {})
        folder = rename_to_unique(fresh, results / f"{config.experiment_name}_{now()}")
    except OSError as error:
        raise UserError(f"results_dir: {results} cannot be written, {error.strerror}") from None
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)
    return Run(folder, config)
