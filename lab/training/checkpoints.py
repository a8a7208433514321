"""The files of checkpoints: writing, keeping the last ones, reading them with distrust.

Files in `<run>/checkpoints/`: `epoch_<e>_step_<s>.pt`, the state s steps after epoch e was
recorded, and `best.pt`, the network of the best validation epoch. Nothing in them is unpickled but
tensors and plain data.
"""

import logging
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lab.system import files
from lab.system.errors import DataError, UserError
from lab.training.run import Run

log = logging.getLogger(f"spurious.{__name__}")

KEPT = 2
STATE = {
    "epoch", "step", "model", "optimizer", "method", "summaries", "best", "lowest", "table_sizes",
    "gram_epochs", "data",
}  # fmt: skip
BEST = {"epoch", "score", "summaries", "model", "data"}


class Unusable(UserError):
    """No checkpoint can be continued from."""

    final = True  # resuming again would only repeat it


def write(folder: Path, state: dict) -> None:
    """Write the state of training and remove all but the last ones."""
    folder.mkdir(exist_ok=True)
    # Names sort by age: a step is written while its epoch is not yet over.
    name = f"epoch_{state['epoch']:07d}_step_{state['step']:09d}.pt"
    files.save(folder / name, partial(torch.save, state))
    for old in sorted(folder.glob("epoch_*.pt"))[:-KEPT]:
        old.unlink()


def write_best(folder: Path, state: dict) -> None:
    """Write the network of the best epoch."""
    folder.mkdir(exist_ok=True)
    files.save(folder / "best.pt", partial(torch.save, state))


def check_data(state: dict, fingerprint: str, folder: Path) -> None:
    """Raises `DataError` if a checkpoint is of other splits than those of this fingerprint."""
    if state["data"] != fingerprint:
        raise DataError(
            f"{folder}: the data are not those of this run any more (data_dir, or files in it, "
            "have changed), so that what was training data could now be test data"
        )


def latest(folder: Path, run: Run) -> dict | None:
    """The newest checkpoint that is readable and covered by the tables; None without checkpoints.

    Raises `Unusable` when there are checkpoints, but none that can be used.
    """
    paths = sorted(folder.glob("epoch_*.pt"), reverse=True)
    for path in paths:
        try:
            state = read(path, STATE)
        except Exception as error:  # damaged bytes raise anything in torch
            log.warning("%s: not readable (%s)", path, str(error).partition("\n")[0])
            continue
        if run.holds(state["table_sizes"]):
            return state
        log.warning("%s: not used, the tables are shorter than when it was written", path)
    if paths:
        raise Unusable(f"{folder}: no usable checkpoint; to start over, remove this folder")
    return None


def read(path: Path, keys: set[str]) -> dict:
    """The mapping with these keys that `torch.save` wrote; damage raises errors of any kind."""
    with zipfile.ZipFile(path) as archive:  # torch's older formats are pickles as a whole
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed, which torch.save never does")
        damaged = archive.testzip()  # torch does not look at the checksums
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError(f"not a mapping of {', '.join(sorted(keys))}")
    return state


def load_network(model: nn.Module, folder: Path, which: str, fingerprint: str) -> None:
    """Give the network the weights of a run's "last" checkpoint or of its "best" epoch.

    fingerprint: of the splits. Raises `UserError` without a usable checkpoint, `DataError` for one
    of other splits.
    """
    places = folder / "checkpoints"
    paths = [places / "best.pt"] if which == "best" else sorted(places.glob("epoch_*.pt"))[-1:]
    if not all(path.exists() for path in paths) or not paths:
        raise UserError(f"{places}: no {which} checkpoint")
    try:
        state = read(paths[0], BEST if which == "best" else STATE)
    except Exception as error:  # damaged bytes raise anything in torch
        raise UserError(f"{paths[0]}: not readable, {error}") from None
    check_data(state, fingerprint, folder)
    model.load_state_dict(state["model"])
