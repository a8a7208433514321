"""What a run was made with, in its `environment.json`: versions, commit, device, command."""

import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.config import plugins
from lab.config.schema import Config
from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")

FILE = "environment.json"
PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pandas", "matplotlib",
    "scikit-learn", "wandb", "tensorboard",
)  # fmt: skip


def environment(config: Config, device: str, command: list[str]) -> dict[str, Any]:
    """Versions, commit, device, seed, plugins and command of a run."""
    import torch

    cuda = device.startswith("cuda")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        "device_name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "plugins": plugins.facts(config.plugins, config.catalogue.records),
        "command": command,
    }


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Write `environment.json`."""
    files.write_text(folder / FILE, json.dumps(facts, indent=2) + "\n")


LITTLE = "in the last digits"


def add_resumed(folder: Path, now: dict[str, Any]) -> None:
    """Add the environment in which a run is resumed; warn of what has changed since it started."""
    path = folder / FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        changes = list(_differences(facts.get("resumed", [facts])[-1], now))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: not readable (%s), so changes since then are unknown", path, error)
        facts, changes = {}, []
    for change in changes:
        log.warning("%s: was %s, is %s; the results may differ %s", *change)
    facts.setdefault("resumed", []).append(now)
    write_environment(folder, facts)


def _differences(
    before: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any, str]]:
    """(what, before, now, how far the results may differ) of everything that has changed."""
    for name in ("git_commit", "device", "device_name", "threads"):
        if before[name] != now[name]:
            yield name, before[name], now[name], LITTLE
    hashes = {plugin["file"]: plugin["sha256"] for plugin in before.get("plugins", [])}
    for plugin in now.get("plugins", []):
        if (was := hashes.get(plugin["file"])) != plugin["sha256"]:
            short = was and was[:12]
            yield f"plugin {plugin['file']}", short, plugin["sha256"][:12], "from now on"
    for package in ("torch", "numpy", "scikit-learn"):
        if before["versions"][package] != now["versions"][package]:
            yield package, before["versions"][package], now["versions"][package], LITTLE


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent.parent.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
