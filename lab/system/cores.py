"""How many processor cores this process may use: the one count that everything parallel takes."""

import os


def available() -> int:
    """Cores for this process, at least 1.

    What its affinity mask, a container's CPU quota and `LOKY_MAX_CPU_COUNT` leave of the machine's,
    divided among the processes that `torchrun` started on it (`LOCAL_WORLD_SIZE`).
    """
    from joblib import cpu_count  # imports numpy

    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
