"""How far a run is, in its `status.json`.

- state: running, stopped (by a signal), failed, done. A run that was killed says running.
- phase: what is being done, one of `PHASES`; error: the last one's first line;
- id: of the run on wandb; summary: the final metrics so far.
"""

import json
import math
from pathlib import Path
from typing import Any

from lab.system import files
from lab.system.errors import UserError

PHASES = ("training", "DFR", "plots", "done")
FILE = "status.json"


def write_status(
    folder: Path,
    state: str,
    phase: str,
    run_id: str,
    summary: dict[str, float],
    error: str | None = None,
) -> None:
    """Write `status.json`; numbers that are not finite become null."""
    shown = {name: value if math.isfinite(value) else None for name, value in summary.items()}
    status = {"state": state, "phase": phase, "error": error, "id": run_id, "summary": shown}
    files.write_text(folder / FILE, json.dumps(status, indent=2, allow_nan=False) + "\n")


def _number(value: Any) -> float:
    """A metric as it was written: null is NaN, a whole number, such as an epoch, stays one."""
    if value is None:
        return math.nan
    return value if type(value) is int else float(value)


def read_status(folder: Path) -> dict[str, Any]:
    """The content of `status.json`. Raises `UserError` if it is missing or not readable."""
    path = Path(folder) / FILE
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        summary = {k: _number(v) for k, v in status["summary"].items()}
        known = status["phase"] in PHASES and isinstance(status["id"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not readable, so this is no run to resume ({error})") from None
    if not known:
        raise UserError(f"{path}: the phase is none of {', '.join(PHASES)}")
    return status | {"summary": summary}
