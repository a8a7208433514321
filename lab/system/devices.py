"""The device that torch computes on."""

import torch

from lab.system.errors import ConfigError


def choose_device(name: str) -> str:
    """The device for `device`; "auto" takes cuda or mps if available, else cpu.

    Raises `ConfigError` when the device is not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        usable = ", ".join(["auto", *(device for device in available if available[device])])
        raise ConfigError(f"device: given {name}, which torch cannot use here; allowed: {usable}")
    return name
