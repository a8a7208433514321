"""Folders of results: their names, and the configuration in them."""

import os
import tempfile
from datetime import datetime
from pathlib import Path

from lab.config import strict_yaml
from lab.config.schema import Config
from lab.system.errors import UserError

CONFIG = "config_used.yaml"


def config_yaml(config: Config) -> str:
    """Every key with its value; reads back as the same configuration."""
    return strict_yaml.dump(config.resolved())


def now() -> str:
    """The time in the names of folders."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def temporary_folder(parent: Path) -> Path:
    """A new folder in `parent` with a name that starts with a dot, to be filled and renamed."""
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    fresh.chmod(0o755)
    return fresh


def rename_to_unique(folder: Path, wanted: Path) -> Path:
    """Renames to `wanted`, or to `wanted_2`, …: whoever comes second gets the next name."""
    for attempt in range(1, 10_000):
        target = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}_{attempt}")
        try:
            os.rename(folder, target)  # fails on a folder that is not empty
            return target
        except OSError:
            if not target.exists():
                raise
    raise UserError(f"results_dir: too many folders named {wanted}")


def new_folder(parent: Path) -> Path:
    """A new folder in `parent` with the time as its name, never an existing one."""
    parent.mkdir(exist_ok=True)
    return rename_to_unique(temporary_folder(parent), parent / now())
