"""A sweep's folder: the manifest that keeps its settings and jobs, and the jobs' runs."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lab.folders import creating
from lab.folders import status as run_status
from lab.sweeping import grids
from lab.sweeping.plan import Plan
from lab.system import files
from lab.system.errors import UserError

MANIFEST = "manifest.json"
BASE = "config.yaml"  # the base configuration as it was when the sweep began


def create(plan: Plan, command: list[str], cluster: dict) -> Path:
    """A new sweep folder with its manifest, in `<results_dir>/sweeps/`.

    It appears by a rename, whole. cluster: how the jobs are to be run. Raises `UserError`.
    """
    manifest: dict[str, Any] = {
        "name": plan.name,
        "created": creating.now(),
        "sweep_file": plan.text,
        "command": command,
        "config": str(plan.base),
        "base_overrides": plan.overrides,
        "plugins": plan.plugins,
        "keys": plan.keys,
        "seeds": plan.seeds,
        "settings": [
            {"setting": n, "name": grids.setting_name(setting, plan.keys), "overrides": setting}
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
        return creating.rename_to_unique(fresh, sweeps / f"{plan.name}_{manifest['created']}")
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


def is_done(sweep_folder: Path, job: dict) -> bool:
    """Whether the newest run of a job is done."""
    run = run_folder(sweep_folder, job)
    try:
        return run is not None and run_status.read_status(run)["state"] == "done"
    except UserError:  # a damaged one, which the next attempt reports
        return False


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
    return ["--config", str(base), *overrides, *grids.override_texts(job["overrides"] | own)]


def shown(arguments: list[str]) -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["python", "main.py", *arguments])


def submitit_folder(folder: Path) -> Path:
    """A new folder for submitit, which names files by process ids: older ones may have the same."""
    return creating.new_folder(folder / "submitit")


def add_advice(error: BaseException, folder: Path) -> None:
    """Note on an error how the sweep is resumed."""
    error.add_note("To resume:")
    error.add_note(f"python sweep.py --resume {shlex.quote(str(folder))}")
