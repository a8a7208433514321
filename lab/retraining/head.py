"""A last layer as DFR leaves it: on standardised features, with its file `dfr_model.npz`."""

import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from lab.system import files
from lab.system.errors import UserError


@dataclass
class Head:
    """f = ((h - mean) / scale) · coefficients + intercept, on features h (N, d).

    Scalar outputs: coefficients (d,) and a number; outputs of C classes: (C, d) and (C,).
    """

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: float | np.ndarray

    def outputs(self, h: np.ndarray) -> torch.Tensor:
        """Outputs f, (N,) or (N, C), float64."""
        f = ((h - self.mean) / self.scale) @ self.coefficients.T + self.intercept
        return torch.from_numpy(np.asarray(f, dtype=np.float64))

    def linear(self) -> torch.nn.Linear:
        """The same as one layer (N, d) → (N, C), float32; C = 1 for scalar outputs."""
        weight = np.atleast_2d(self.coefficients / self.scale)
        bias = np.atleast_1d(self.intercept) - weight @ self.mean
        layer = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], weight.shape[0])
        parameters = {"weight": weight, "bias": bias}
        layer.load_state_dict({k: torch.from_numpy(v).float() for k, v in parameters.items()})
        return layer


def save_head(path: Path, head: Head) -> None:
    """Write the head to a `dfr_model.npz`."""
    files.save(path, lambda file: np.savez(file, **vars(head)))


def load_head(path: Path) -> Head:
    """The head in a `dfr_model.npz`. Raises `UserError` if it is missing or not readable."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = Head(**{f.name: arrays[f.name].astype(np.float64) for f in fields(Head)})
        outputs, width = head.coefficients.shape[:-1], head.coefficients.shape[-1:]
        shapes = (head.mean.shape, head.scale.shape, np.shape(head.intercept))
        if len(outputs) > 1 or shapes != (width, width, outputs):
            raise ValueError(f"the shapes {head.coefficients.shape}, {shapes} do not fit")
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable, {error}") from None
    return head
