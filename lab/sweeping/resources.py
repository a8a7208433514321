"""What a job on this machine may use: its share of the cores, of the memory, and one GPU."""

import os
import shutil
import subprocess

from lab.system import cores, memory

JOB_MEMORY = 2 * 2**30  # bytes that a job on this machine is given room for


def thread_variables(threads: int) -> dict[str, str | None]:
    """Variables that give a job its share of the cores; what the user has set stays."""
    shared = {name: str(threads) for name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT")}
    return {name: value for name, value in shared.items() if name not in os.environ}


def gpu_variable(gpus: list[str], slot: int) -> dict[str, str | None]:
    """What CUDA shows a job; submitit's local executor by itself would hide all GPUs."""
    usual = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)] if gpus else usual}


def at_once(gpus: int) -> int:
    """Jobs at once on this machine: one per GPU, or else one per core that has 2 GiB of memory."""
    usable = cores.available()
    free = memory.available() or JOB_MEMORY * usable
    return gpus or max(1, min(usable, int(free // JOB_MEMORY)))


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []
