"""What a checkpoint holds: writing the state of training, and continuing from it.

A checkpoint holds the state after a whole step, and how long the tables were when the last whole
epoch was recorded; the Gram matrices are in `gram.npz`, since a run leaves them anyway.
"""

import logging
import zipfile
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lab.analyses import gram
from lab.config.schema import Config
from lab.evaluation.selection import rank, selection_metric
from lab.methods.erm import ERM
from lab.splits.splits import Splits
from lab.system import distributed, files
from lab.training import checkpoints
from lab.training.run import Run
from lab.training.state import Matrices, State, Summaries

log = logging.getLogger(f"spurious.{__name__}")


class Checkpointer:
    """Writes the checkpoints of a run, its weights and its Gram matrices; restores from them.

    one_pass: whether the Jacobian norms have no samples of their own, see `Analyses.one_pass`. Of
    several processes all restore, and only the one that leads writes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: ERM,
        splits: Splits,
        config: Config,
        run: Run,
        one_pass: bool,
    ):
        self.model, self.optimizer, self.method, self.run = model, optimizer, method, run
        self.one_pass = one_pass
        self.data = splits.fingerprint()
        self.selection_metric = selection_metric(splits, config) if splits.val else None
        self.folder = run.folder / "checkpoints"
        self.gram_path = run.folder / "gram.npz"

    def restore(self) -> State:
        """The state of the last checkpoint, given back to network, optimizer, method and tables.

        The state of a new training if there is none.
        """
        found = checkpoints.latest(self.folder, self.run)
        if found:
            checkpoints.check_data(found, self.data, self.run.folder)
        distributed.barrier()  # all have read before the first rank writes
        sizes, epoch = (found["table_sizes"], found["epoch"]) if found else ({}, -1)
        self.run.rewind(sizes, epoch)
        if found is None:
            return State()
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.method.load_state(found["method"])
        kept = ("epoch", "step", "summaries", "table_sizes", "lowest", "best")
        state = State(**{name: found[name] for name in kept})
        state.grams = self._read_grams(found["gram_epochs"])
        where = f"epoch {state.epoch}, step {state.step}" if state.step else f"epoch {state.epoch}"
        log.info("Continuing from %s", where)
        return state

    def write(self, state: State) -> None:
        """Write the state after the last whole step, unless nothing is recorded yet."""
        if state.epoch < 0 or not self.run.leads:
            return
        self.write_grams(state)
        self.run.sync()
        content = {
            "epoch": state.epoch,
            "step": state.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state(),
            "summaries": state.summaries,
            "best": state.best,
            "lowest": state.lowest,
            "table_sizes": state.table_sizes,
            "gram_epochs": list(state.grams),
            "data": self.data,
        }
        checkpoints.write(self.folder, content)

    def keep_best(self, epoch: int, summaries: Summaries, state: State) -> None:
        """Keep the network in `best.pt` when it is the best so far on validation data."""
        metric, best = self.selection_metric, state.best
        if metric is None:
            return
        old = rank(best["epoch"], best["summaries"]["val"], metric) if best else None
        if old is None or rank(epoch, summaries["val"], metric) > old:
            best = {"epoch": epoch, "score": summaries["val"][metric], "summaries": summaries}
            if self.run.leads:
                content = best | {"model": self.model.state_dict(), "data": self.data}
                checkpoints.write_best(self.folder, content)
            state.best = best

    def write_weights(self) -> None:
        """Write `model.pt`, the trained network."""
        if self.run.leads:
            weights = self.model.state_dict()
            files.save(self.run.folder / "model.pt", partial(torch.save, weights))

    def write_grams(self, state: State) -> None:
        """Write `gram.npz`: epochs (E,), labels (16,), K (E, 16, 16).

        With sample caps that differ, `K_jacobian` holds the matrices of the Jacobian norms.
        """
        if not state.grams or not self.run.leads:
            return
        unknown = np.full((2 * gram.ROWS, 2 * gram.ROWS), np.nan)

        def stacked(which: int) -> np.ndarray:
            found = [matrices[which] for matrices in state.grams.values()]
            return np.stack([unknown if K is None else K for K in found])

        arrays: dict[str, Any] = {
            "epochs": np.array(list(state.grams)),
            "labels": np.array(gram.labels()),
            "K": stacked(0),
        }
        if not self.one_pass:
            arrays["K_jacobian"] = stacked(1)
        files.save(self.gram_path, lambda file: np.savez(file, **arrays))

    def _read_grams(self, epochs: list[int]) -> dict[int, Matrices]:
        """The matrices of these epochs from what `write_grams` wrote."""
        if not epochs:
            return {}
        try:
            with np.load(self.gram_path, allow_pickle=False) as kept:
                K, K_jacobian = kept["K"], kept.get("K_jacobian", [None] * len(kept["K"]))
                found = dict(zip(kept["epochs"].tolist(), zip(K, K_jacobian)))
            return {epoch: found[epoch] for epoch in epochs}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise checkpoints.Unusable(
                f"{self.gram_path}: missing or damaged ({error}); to start over, remove "
                f"{self.folder}"
            ) from None
