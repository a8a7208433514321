"""Grad-CAM of a run, from its folder: `python plotting.py results/<run> --gradcam`."""

import copy
from pathlib import Path
from typing import Any

import numpy as np

from lab.analyses import gradcam
from lab.config.registry import Network
from lab.retraining.head import load_head
from lab.runs import opening
from lab.system import files
from lab.system.errors import UserError


def explain(folder: Path) -> None:
    """Write `gradcam.csv` and `gradcam.npz` for a run, from its checkpoint and its data.

    csv: the shares of heat on the shortcut, by group, of the test split and of those further splits
    that have one drawn; npz: test pictures with their heat, for the figure. Both before DFR and,
    where the run has it, after. Raises `UserError` for networks without convolutions, and where
    the checkpoint is missing or the data have changed.
    """
    run = opening.open_run(folder, option="--gradcam")
    config = run.config
    if not config.network.gradcam_layer:
        networks_with = [
            name for name, record in config.catalogue.of(Network).items() if record.gradcam_layer
        ]
        raise UserError(
            f"--gradcam: the network of {folder} is an {config.model_name}, which has no "
            f"convolutions; allowed: {', '.join(networks_with)}"
        )
    network, splits = run.network(), run.splits
    networks = {"before_dfr": network}
    if config.use_dfr:
        networks["after_dfr"] = _retrained(network, folder, config)
    shown = {"test": splits.test}
    if splits.masks is not None:
        drawn = splits.masks.flatten(1).any(1)
        shown |= {
            name: split
            for name, split in splits.evaluation_sets.items()
            if drawn[split.group].any()
        }
    rows: list[dict] = []
    for when, net in networks.items():
        for name, split in shown.items():
            rows += [
                {"when": when, "split": name} | row
                for row in gradcam.rows(net, split, splits, config)
            ]
    files.write_csv(folder / "gradcam.csv", rows)
    examples: dict[str, Any] = gradcam.examples(networks, splits.test)
    files.save(folder / "gradcam.npz", lambda file: np.savez(file, **examples))


def _retrained(network, folder: Path, config):
    """The network with the layer that DFR has trained in place of its last one."""
    if config.dfr_target_layer != "last_hidden":
        raise UserError(
            f"--gradcam: DFR of {folder} reads {config.dfr_target_layer}, behind no convolution; "
            "allowed as dfr_target_layer: last_hidden"
        )
    retrained = copy.deepcopy(network)
    path = folder / "dfr_model.npz"
    layer = load_head(path).linear()
    if layer.weight.shape != network.classifier.weight.shape:
        raise UserError(f"{path}: is of another network, its shape is {tuple(layer.weight.shape)}")
    retrained.classifier = layer.to(next(network.parameters()).device)
    return retrained
