"""The main memory that is available, and that training a network needs.

Every key has bounds of its own, but width² × depth can exceed the memory of any machine, and the
system kills such a process without a message.
"""

import os
from pathlib import Path


def training_bytes(parameters: int, optimizer: str, momentum: float) -> int:
    """Bytes of float32 parameters, their gradients and the optimiser's state."""
    kept = 2 if optimizer == "Adam" else int(momentum > 0)
    return 4 * parameters * (2 + kept)


def shown(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:,.1f} GB"


def available() -> float | None:
    """Bytes of main memory that this process may use at most; None where this is unknown.

    The machine's, or less where a control group (of a container, of a batch job) allows less.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return None
    for folder, name in _control_groups():
        for place in (folder, *folder.parents):
            try:
                limits.append(int((place / name).read_text()))
            except (OSError, ValueError):  # no such level, or "max"
                continue
    return min(limits)


def _control_groups(root=Path("/sys/fs/cgroup"), table=Path("/proc/self/cgroup")):
    """(folder, name of the file with the limit) of the control groups for memory."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield root / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
