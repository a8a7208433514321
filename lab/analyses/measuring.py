"""What is measured at a checkpoint: which analyses are due, on which samples, and their rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lab.analyses.gram import GRADIENT, JACOBIAN, SIDES, gram_matrix
from lab.config.registry import Analysis
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import predictions
from lab.evaluation.losses import Loss
from lab.splits import groups
from lab.splits.splits import Split, Splits

KINDS = {"gradient": GRADIENT, "jacobian": JACOBIAN}


def capped(split: Split, samples: int | None, seed: int) -> Split:
    """A random subset with at most `samples` of each group; the split itself when that is all."""
    if samples is None or max(split.counts) <= samples:
        return split
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for part in split.slices:
        order = torch.randperm(part.stop - part.start, generator=generator)
        chosen.append(part.start + order[:samples].sort().values)
    index = torch.cat(chosen).to(split.y.device)
    counts = [len(indices) for indices in chosen]
    return split.subset(index, counts)


@dataclass
class Measurement:
    """What one checkpoint's passes over the data gave.

    K: Gram matrix on the samples of all analyses but the Jacobian norms, K_jacobian on those of
    the Jacobian norms (the same matrix when the samples are the same); outputs: f of the whole
    splits where a pass covered them; expectation_outputs: f on the samples of K.
    """

    epoch: int
    due: dict[str, Analysis]
    K: np.ndarray | None
    K_jacobian: np.ndarray | None
    outputs: dict
    expectation_outputs: dict


@dataclass
class View:
    """A checkpoint as one analysis sees it for one split of the table.

    split: the name in the table; gap_side, flow_side: of which split the gap's gradients are, and
    the flow's with its moments ("train" or "test"; the same but for `test_under_train`);
    K, K_jacobian: Gram matrices (16, 16), see `gram.labels`; outputs: f (N,) of `samples`, the
    samples of the gap's side, where the analysis needs outputs; counts: samples per group of the
    whole flow side; pairs: the analysis's configured pairs, as group indices;
    flow_weights: w_g of the flow Σ w_g ∇_g of the run's method.
    """

    epoch: int
    split: str
    gap_side: str
    flow_side: str
    K: np.ndarray
    K_jacobian: np.ndarray
    outputs: torch.Tensor
    samples: Split
    counts: list[int]
    pairs: list[tuple[int, int]]
    config: Config
    loss: Loss
    weights: Callable[[], list[float]]

    @cached_property
    def flow_weights(self) -> list[float]:
        return self.weights()


class Analyses:
    """The analyses of a run: which are due, on which samples, and their rows."""

    def __init__(self, config: Config, splits: Splits):
        self.config = config
        self.loss = config.loss.load()
        target = config.analysis_target
        self.sides = [side for side in SIDES if target in (side, "both")]
        self.splits = {side: getattr(splits, side) for side in self.sides}
        self.samples = self._capped(config.gradient_gram_num_samples)
        self.jacobian_samples = self.samples
        if config.jacobian_num_samples != config.gradient_gram_num_samples:
            self.jacobian_samples = self._capped(config.jacobian_num_samples)
        # Caps that exceed every group leave the splits as they are; then one pass serves all.
        self.one_pass = all(self.samples[s] is self.jacobian_samples[s] for s in self.sides)
        self.flows = [(side, side, side) for side in self.sides]
        if target == "both":
            self.flows.append(("test_under_train", "test", "train"))

    def _capped(self, samples):
        seed = self.config.seed
        return {
            side: capped(split, samples, derive_seed(seed, "analysis samples", side))
            for side, split in self.splits.items()
        }

    def due(self, epoch: int) -> dict[str, Analysis]:
        """The analyses to be made at this epoch, by name."""
        due = {}
        for name, record in self.config.catalogue.of(Analysis).items():
            epochs = getattr(self.config, record.epochs)
            if getattr(self.config, record.switch) and (epochs is None or epoch in epochs):
                due[name] = record
        return due

    def measure(self, model, epoch: int) -> Measurement:
        """One forward and one backward pass over the samples of the analyses that are due."""
        due = self.due(epoch)
        rows, jacobian_rows, wants_outputs = set(), set(), False
        for record in due.values():
            kinds = {KINDS[need] for need in record.needs if need in KINDS}
            # Jacobian norms have samples of their own.
            if record.own_samples:
                jacobian_rows |= kinds
            else:
                rows |= kinds
            wants_outputs |= "outputs" in record.needs
        if self.one_pass:
            rows |= jacobian_rows
            jacobian_rows = set()

        K, f = self._gram(model, self.samples, rows)
        K_jacobian, jacobian_f = self._gram(model, self.jacobian_samples, jacobian_rows)
        if wants_outputs and not f:
            size = self.config.eval_batch_size
            f = {
                side: predictions.outputs(model, split, size)
                for side, split in self.samples.items()
            }
        whole = {
            side: values
            for found, samples in ((f, self.samples), (jacobian_f, self.jacobian_samples))
            for side, values in found.items()
            if samples[side] is self.splits[side]
        }
        return Measurement(epoch, due, K, K if K_jacobian is None else K_jacobian, whole, f)

    def _gram(self, model, samples, rows):
        if not rows:
            return None, {}
        return gram_matrix(
            model,
            samples,
            self.loss,
            rows,
            self.config.eval_batch_size,
            self.config.analysis_memory_gb * 1e9,
        )

    def rows(self, measurement: Measurement, method, group_losses) -> list[dict]:
        """Rows of `analysis.csv` for one checkpoint: analyses of single splits, then of flows.

        method, group_losses: the training method and the mean losses R_g of the training split
        at this checkpoint, for the weights of the method's next step.
        """
        rows: list[dict] = []
        for of_flows, places in ((False, self.flows[: len(self.sides)]), (True, self.flows)):
            for place in places:
                for name, record in measurement.due.items():
                    if record.flows == of_flows:
                        view = self._view(measurement, record, place, method, group_losses)
                        rows += self._of_view(view, name, record)
        return rows

    def _view(self, measurement, record: Analysis, place, method, group_losses) -> "View":
        split, gap_side, flow_side = place
        counts = self.splits[flow_side].counts
        return View(
            epoch=measurement.epoch,
            split=split,
            gap_side=gap_side,
            flow_side=flow_side,
            K=measurement.K,
            K_jacobian=measurement.K_jacobian,
            outputs=measurement.expectation_outputs.get(gap_side),
            samples=self.samples[gap_side],
            counts=counts,
            pairs=self.pairs(record.name) if record.pairs else [],
            config=self.config,
            loss=self.loss,
            weights=lambda: method.flow_weights(group_losses, counts),
        )

    @staticmethod
    def _of_view(view: "View", name: str, record: Analysis) -> list[dict]:
        return [
            {
                "epoch": view.epoch,
                "split": view.split,
                "analysis": name,
                "pair": pair,
                "quantity": quantity,
                "value": value,
            }
            for pair, values in record.load()(view)
            for quantity, value in values.items()
        ]

    def pairs(self, analysis: str) -> list[tuple[int, int]]:
        """The configured pairs of an analysis, as group indices."""
        return [groups.pair_indices(pair) for pair in getattr(self.config, analysis).group_pairs]

    def measured_rows(self, epoch: int, change) -> list[dict]:
        """Rows `measured` of an epoch. change(side, g1, g2): the gap's change by learning rate."""
        if "gap_dynamics_factors" not in self.due(epoch):
            return []
        return [
            {
                "epoch": epoch,
                "split": name,
                "analysis": "gap_dynamics_factors",
                "pair": groups.pair_name(*pair),
                "quantity": "measured",
                "value": change(gap_side, *pair),
            }
            for name, gap_side, _ in self.flows
            for pair in self.pairs("gap_dynamics_factors")
        ]
