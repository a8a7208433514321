"""The laboratory: one package per room, from the ground (`lab.system`) up (`lab.sweeping`).

`lab.open_run(folder)` opens a finished run. It is imported when first used (PEP 562), so that
`import lab` takes neither torch nor pandas.
"""

import importlib
from typing import Any

_NAMES = {"open_run": "lab.runs.opening"}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
