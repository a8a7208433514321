"""Deep feature reweighting: retrain the last layer, or a linear layer on any layer's features.

Kirichenko et al., "Last Layer Re-Training is Sufficient for Robustness to Spurious Correlations",
2023: standardise the features with the training split's statistics; tune the penalty on a
group-balanced half of the data, scored by worst-group accuracy on the other half; then fit
several times on fresh group-balanced subsets of all the data and average the coefficients.

On a target set without shortcut: one fit on all of it, on the features as they are, with the
penalty that does best on the validation split's samples whose attribute is not their label.

With `dfr_solver: sgd` the last layer is trained anew by gradient descent instead (`descent`).
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from lab.config.schema import Config
from lab.evaluation import metrics, predictions
from lab.retraining import report
from lab.retraining.descent import by_gradient_descent
from lab.retraining.head import Head, save_head
from lab.retraining.regressions import by_regressions
from lab.retraining.subsets import HELD_OUT
from lab.splits.splits import Split, Splits
from lab.system import files
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

SOLVERS = ("sklearn", "sgd")


def check(splits: Splits, solver: str = "sklearn") -> None:
    """Raises `DataError` before training when DFR will have nothing to work with."""
    if splits.dfr is None:
        raise DataError(
            "use_dfr: no sample is set aside for DFR; raise dfr_val_ratio or num_train_samples, or "
            "set use_dfr: false (a data set of a plugin gives the split dfr itself)"
        )
    labels = len(splits.dfr.y.unique())
    if labels < splits.num_classes:
        found = "one label" if labels == 1 else f"{labels} of {splits.num_classes} labels"
        raise DataError(
            f"use_dfr: the data set aside for DFR hold {found} only; raise dfr_val_ratio or "
            "num_train_samples, or set use_dfr: false"
        )
    if solver == "sgd" and len(splits.dfr) < HELD_OUT:
        raise DataError(
            f"dfr_solver: sgd holds out a fifth of the data set aside for DFR, for which these "
            f"{len(splits.dfr)} samples are too few; raise dfr_val_ratio or num_train_samples, or "
            "take sklearn"
        )
    empty = [splits.group_names[g] for g, count in enumerate(splits.dfr.counts) if not count]
    if len(empty) > 4:
        empty = [f"{len(empty)} of {len(splits.group_names)} groups"]
    if empty:
        log.warning("DFR has no samples of %s to retrain on", " and ".join(empty))


@torch.no_grad()
def feature_batches(model, split: Split, config: Config):
    """Yields the features (B, d) of the configured layer as numpy, in the split's order."""
    model.eval()
    layer = target_layer(config)
    plan = predictions.evaluation_plan(split, config.eval_batch_size, model)
    for _, _, x in predictions.batches(split, plan):
        yield model.hidden(x, layer).cpu().numpy()


def target_layer(config: Config) -> int | None:
    """`dfr_target_layer` as the argument of a network's `hidden`."""
    name = config.dfr_target_layer
    return None if name == "last_hidden" else int(name.removeprefix("layer_"))


def retrain(model, splits: Splits, config: Config) -> tuple[Head, dict]:
    """Retrain on `splits.dfr`; returns the head and what `dfr_results.json` says.

    The results hold, before and after, the very metrics of the network on every split.
    """
    source, scaler = splits.dfr, None
    assert source is not None  # see `check`
    if config.dfr_standardize:
        scaler = StandardScaler()
        for h in feature_batches(model, splits.train, config):
            scaler.partial_fit(h)

    def features_of(split):
        batches = feature_batches(model, split, config)
        return np.concatenate([scaler.transform(h) if scaler else h for h in batches])

    features = features_of(source)
    if config.dfr_solver == "sgd":
        coefficients, intercept, facts = by_gradient_descent(model, features, source, config)
    else:
        coefficients, intercept, facts = by_regressions(
            features_of, features, source, splits.val, config
        )
    width = features.shape[1]
    head = Head(
        mean=scaler.mean_ if scaler else np.zeros(width),
        scale=scaler.scale_ if scaler else np.ones(width),
        coefficients=coefficients,
        intercept=intercept,
    )
    results = {
        "solver": config.dfr_solver,
        "target_layer": config.dfr_target_layer,
        "split_strategy": config.dfr_val_split_strategy,
        "fitted_on": {"original": "val", "target": "target"}.get(config.dfr_val_split_strategy),
        "balanced": config.dfr_balance,
        "standardized": config.dfr_standardize,
        **facts,
        "num_features": width,
        "num_coefficients": coefficients.size,
        "nonzero_coefficients": int(np.count_nonzero(coefficients)),
        "before": {},
        "after": {},
    }
    loss = config.loss.load()
    for name, split in splits.evaluated().items():
        f = predictions.outputs(model, split, config.eval_batch_size)
        results["before"][name] = metrics.summary(f, split, loss, splits.train.shares)
        parts = [head.outputs(h) for h in feature_batches(model, split, config)]
        on_cpu = replace(split, y=split.y.cpu(), a=split.a.cpu())
        results["after"][name] = metrics.summary(
            torch.cat(parts), on_cpu, loss, splits.train.shares
        )
    return head, results


def save(folder: Path, head: Head, results: dict, group_names: list[str]) -> None:
    """Write `dfr_model.npz`, `dfr_results.json` (NaN as null) and `dfr_results.txt`."""
    save_head(folder / "dfr_model.npz", head)
    files.write_text(folder / "dfr_results.txt", report.text(results, group_names))
    files.write_text(folder / "dfr_results.json", report.strict_json(results))
