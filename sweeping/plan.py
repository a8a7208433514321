"""A sweep's manifest, and where its runs are."""

import json
from pathlib import Path

from errors import UserError


def read_manifest(folder: Path) -> dict:
    """What `manifest.json` of a sweep folder says. Raises `UserError`."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable, so this is no sweep ({error})") from None


def run_folder(sweep_folder: Path, job: dict) -> Path | None:
    """The newest run of a job, None if there is none yet."""
    runs = [path.parent for path in (Path(sweep_folder) / job["folder"]).glob("*/status.json")]
    return max(runs, key=lambda run: (run.stat().st_ctime_ns, run.name), default=None)


def override_text(value) -> str:
    """A value in one line, as `key=value` takes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
