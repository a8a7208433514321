"""Deep feature reweighting: retrain the last layer, or a linear layer on any layer's features.

Kirichenko et al., "Last Layer Re-Training is Sufficient for Robustness to Spurious Correlations",
2023: standardise the features with the training split's statistics; tune the penalty on a
group-balanced half of the data, scored by worst-group accuracy on the other half; then fit
several times on fresh group-balanced subsets of all the data and average the coefficients.

On a target set without shortcut: one fit on all of it, on the features as they are, with the
penalty that does best on the validation split's samples whose attribute is not their label.

With `dfr_solver: sgd` the last layer is trained anew by gradient descent instead (`last_layer`).

    python dfr.py --run results/<run> [dfr_key=value ...]     once more, without training
    python dfr.py --run results/<run> --compare               with both solvers, in one table
"""

import json
import logging
import math
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics, predictions
from lab.networks.building import fresh_classifier
from lab.networks.mlp import ScaledLinear
from lab.retraining import descent as last_layer
from lab.retraining import logistic
from lab.splits.splits import Split, Splits
from lab.system import files
from lab.system.errors import DataError, UserError

log = logging.getLogger(f"spurious.{__name__}")

MOST_GROUPS = 8  # more are not listed in the text; the JSON file has all
SOLVERS = ("sklearn", "sgd")
HELD_OUT = 5  # every fifth sample decides when gradient descent stops
QUANTITIES = {
    "avg_acc": "average accuracy",
    "adjusted_acc": "adjusted accuracy",
    "worst_acc": "worst-group accuracy",
}


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


def check(splits: Splits, solver: str = "sklearn") -> None:
    """Raises `DataError` before training when DFR will have nothing to work with."""
    if splits.dfr is None:
        raise DataError(
            "dfr_val_ratio: too small, no sample is set aside for DFR; raise it or "
            "num_train_samples, or set use_dfr: false"
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


def balanced(members: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random subset in which every non-empty group has as many rows as the smallest of them."""
    there = [rows for rows in members if len(rows)]
    smallest = min(map(len, there))
    chosen = np.concatenate([rng.permutation(rows)[:smallest] for rows in there])
    return np.sort(chosen)


def fitting_and_scoring(split: Split, rng: np.random.Generator, counts) -> tuple[list, list]:
    """Rows of each group for fitting, and for scoring; counts: how many of each are for scoring."""
    members = [rng.permutation(rows) for rows in _members(split)]
    ends = [len(rows) - count for rows, count in zip(members, counts)]
    fitting = [rows[:end] for rows, end in zip(members, ends)]
    return fitting, [rows[end:] for rows, end in zip(members, ends)]


def fifths(counts: list[int]) -> list[int]:
    """How many samples of each group are every fifth of all, counted through the groups.

    So small groups have their part, too; of a group of one sample it can be all.
    """
    ends = np.cumsum(counts)
    return (ends // HELD_OUT - (ends - counts) // HELD_OUT).tolist()


def rows_to_fit(members: list[np.ndarray], rng: np.random.Generator, config: Config) -> np.ndarray:
    """A balanced subset of these rows of each group, or all of them."""
    return balanced(members, rng) if config.dfr_balance else np.sort(np.concatenate(members))


def tune(features, split: Split, config: Config) -> list[dict]:
    """Worst-group accuracy of every C option, [{"c", "worst_acc"}], in increasing C.

    One half, or a group-balanced subset of it, is for fitting, the other half scores; NaN when no
    group has a second sample to score with.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "tune"))
    halves = [count // 2 for count in split.counts]
    fitting, scoring = fitting_and_scoring(split, rng, halves)
    table = []
    for c, found in _fit_options(features, split, rows_to_fit(fitting, rng, config), config):
        right = _right(found, features, split)
        accuracies = [right[held].mean() for held in scoring if len(held)]
        table.append({"c": c, "worst_acc": float(min(accuracies, default=math.nan))})
    return table


def tune_on_validation(features, split: Split, val_features, val: Split, config: Config):
    """Validation minority accuracy of every C option, [{"c", "minority_acc"}], in increasing C.

    Fitted on the whole split, or a group-balanced subset of it.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "tune"))
    rows = rows_to_fit(_members(split), rng, config)
    minority = val.in_minority.cpu().numpy()
    table = []
    for c, found in _fit_options(features, split, rows, config):
        right = _right(found, val_features, val)[minority]
        table.append({"c": c, "minority_acc": float(right.mean()) if len(right) else math.nan})
    return table


def _members(split: Split) -> list[np.ndarray]:
    return [np.arange(part.start, part.stop) for part in split.slices]


def _fit_options(features, split: Split, rows, config: Config):
    """(C, fit on these rows) for every C option, in increasing C."""
    seed = derive_seed(config.seed, "dfr", "solver") % 2**31
    options = sorted(set(config.dfr_c_options))
    return zip(options, _fit_all(features, split, [(rows, c, seed) for c in options], config))


def _right(found: logistic.Fit, features, split: Split) -> np.ndarray:
    """Which samples a fit gets right, (N,) bool."""
    f = features @ found.coefficients.T + found.intercept
    return metrics.correct(torch.from_numpy(f), split.y.cpu()).numpy()


def _fit_all(features, split: Split, tasks, config: Config):
    labels = split.y.cpu().numpy()
    fits = logistic.fit_all(features, labels, tasks, config.dfr_reg, config.dfr_num_workers)
    failed = sum(not found.converged for found in fits)
    if failed:
        log.warning(
            "DFR: %d of %d fits did not converge in %d iterations; smaller values in "
            "dfr_c_options converge faster",
            failed,
            len(fits),
            logistic.MAX_ITERATIONS,
        )
    return fits


def retrain(model, splits: Splits, config: Config) -> tuple[Head, dict]:
    """Retrain on `splits.dfr`; returns the head and what `dfr_results.json` says.

    The results hold, before and after, the very metrics of the network on every split.
    """
    source, scaler = splits.dfr, None
    if config.dfr_standardize:
        scaler = StandardScaler()
        for h in feature_batches(model, splits.train, config):
            scaler.partial_fit(h)

    def features_of(split):
        batches = feature_batches(model, split, config)
        return np.concatenate([scaler.transform(h) if scaler else h for h in batches])

    features = features_of(source)
    if config.dfr_solver == "sgd":
        coefficients, intercept, facts = _by_gradient_descent(model, features, source, config)
    else:
        coefficients, intercept, facts = _by_regressions(features_of, features, splits, config)
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


def _by_regressions(features_of, features, splits: Splits, config: Config):
    """(coefficients, intercept, facts) of logistic regressions on these features of `splits.dfr`.

    features_of: a split → its features, for the validation split where that chooses the penalty.
    """
    source, tuning, c = splits.dfr, [], None
    on_target = config.dfr_val_split_strategy == "target"
    score = "minority_acc" if on_target else "worst_acc"
    if config.dfr_reg != "none":
        if on_target:
            val_features = features_of(splits.val)
            tuning = tune_on_validation(features, source, val_features, splits.val, config)
        else:
            tuning = tune(features, source, config)
        # Ties go to the smaller C: the options are in increasing order.
        best = max((row[score] for row in tuning), default=math.nan)
        c = next((row["c"] for row in tuning if row[score] == best), tuning[0]["c"])

    tasks = []
    for i in range(config.dfr_num_retrains if config.dfr_balance else 1):
        rng = np.random.default_rng(derive_seed(config.seed, "dfr", "retrain", i))
        seed = derive_seed(config.seed, "dfr", "solver", i) % 2**31
        tasks.append((rows_to_fit(_members(source), rng, config), c, seed))
    fits = _fit_all(features, source, tasks, config)
    coefficients = np.mean([found.coefficients for found in fits], axis=0)
    intercept = np.mean([found.intercept for found in fits], axis=0)
    if config.loss.class_outputs and coefficients.ndim == 1:
        # Two outputs with the difference f: their cross entropy is f's logistic loss.
        coefficients = np.stack([-coefficients / 2, coefficients / 2])
        intercept = np.array([-intercept / 2, intercept / 2])
    facts = {
        "reg": config.dfr_reg,
        "c": c,
        "num_retrains": len(tasks),
        "num_samples": len(tasks[0][0]),
        "samples_per_group": min(filter(None, source.counts)) if config.dfr_balance else None,
        "converged_fits": sum(found.converged for found in fits),
        "tuned_for": score if tuning else None,
        "tuning": tuning,
    }
    return coefficients, intercept, facts


def _by_gradient_descent(model, features, source: Split, config: Config):
    """(coefficients, intercept, facts) of a fresh last layer trained on these features."""
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "sgd", "split"))
    fitting, held_out = fitting_and_scoring(source, rng, fifths(source.counts))
    device = source.y.device
    layer = fresh_classifier(model, config, "dfr", "sgd", "classifier").to(device)
    history = last_layer.train(
        layer,
        replace(source, inputs=torch.from_numpy(features).to(device)),
        lambda rng: rows_to_fit(fitting, rng, config),
        held_out,
        config,
    )
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, ScaledLinear):
        weight, bias = layer.effective()
    coefficients, intercept = (p.detach().cpu().double().numpy() for p in (weight, bias))
    if not config.loss.class_outputs:
        coefficients, intercept = coefficients[0], float(intercept[0])
    counts = [len(rows) for rows in fitting]
    smallest = min(filter(None, counts)) if config.dfr_balance else None
    facts = {
        "num_samples": smallest * sum(map(bool, counts)) if smallest else sum(counts),
        "samples_per_group": smallest,
        "best_epoch": min(history, key=lambda row: row["val_loss"])["epoch"],
        "epochs": history,
    }
    return coefficients, intercept, facts


def save(folder, head: Head, results: dict, group_names: list[str]) -> None:
    """Write `dfr_model.npz`, `dfr_results.json` (NaN as null) and `dfr_results.txt`."""
    files.save(folder / "dfr_model.npz", lambda file: np.savez(file, **vars(head)))
    files.write_text(folder / "dfr_results.txt", text(results, group_names))
    strict = json.dumps(_without_nan(results), indent=2, allow_nan=False)
    files.write_text(folder / "dfr_results.json", strict + "\n")


def load_head(path: Path) -> Head:
    """The head in a `dfr_model.npz`. Raises `UserError` when it is not there or not readable."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = Head(**{f.name: arrays[f.name].astype(np.float64) for f in fields(Head)})
        outputs, width = head.coefficients.shape[:-1], head.coefficients.shape[-1:]
        shapes = (head.mean.shape, head.scale.shape, head.intercept.shape)
        if len(outputs) > 1 or shapes != (width, width, outputs):
            raise ValueError(f"the shapes {head.coefficients.shape}, {shapes} do not fit")
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable, {error}") from None
    return head


def _without_nan(value):
    """The same data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(results: dict, group_names: list[str]) -> str:
    """A table for reading: every metric before and after, side by side."""
    names = dict(QUANTITIES)
    if len(group_names) <= MOST_GROUPS:
        names |= {f"group_{g}_acc": f"  {name}" for g, name in enumerate(group_names)}
    names |= {"minority_acc": "minority accuracy", "majority_acc": "majority accuracy"}
    names |= {"avg_loss": "average loss", "worst_loss": "worst-group loss"}
    fitted = f"{results['num_samples']} samples"
    if results["balanced"]:
        fitted = f"{results['samples_per_group']} of each group"
    if results["solver"] == "sgd":
        how = f"gradient descent on {fitted} an epoch, {results['best_epoch']} epochs"
    else:
        fits = f"{results['num_retrains']} fits" if results["balanced"] else "one fit"
        c = results["c"]
        penalty = "no penalty" if c is None else f"{results['reg']} penalty, C = {c:g}"
        how = f"{penalty}, {fits} on {fitted}"
    lines = [
        f"DFR on {results['target_layer']}: {how}, {results['nonzero_coefficients']} of "
        f"{results['num_coefficients']} coefficients in use"
    ]
    for split in results["after"]:
        lines += ["", f"{split:<24}{'before':>10}{'after':>10}"]
        for quantity, name in names.items():
            before, after = (results[when][split][quantity] for when in ("before", "after"))
            lines.append(f"{name:<24}{before:>10.4f}{after:>10.4f}")
    return "\n".join(lines) + "\n"


def comparison(results: dict[str, dict]) -> list[dict]:
    """Average and worst-group accuracy of every split before DFR and after it with each solver.

    results: of `retrain`, by solver. Rows {"split", "quantity", "before", <solver>, …}.
    """
    before = next(iter(results.values()))["before"]
    return [
        {"split": split, "quantity": quantity, "before": before[split][quantity]}
        | {solver: found["after"][split][quantity] for solver, found in results.items()}
        for split in before
        for quantity in ("avg_acc", "worst_acc")
    ]


def comparison_text(rows: list[dict]) -> str:
    """The same table for reading."""
    lines = []
    for row in rows:
        split, quantity, *values = row.values()
        if quantity == "avg_acc":
            lines += ["", f"{split:<24}" + "".join(f"{name:>10}" for name in list(row)[2:])]
        lines.append(f"{QUANTITIES[quantity]:<24}" + "".join(f"{v:>10.4f}" for v in values))
    return "\n".join(lines[1:]) + "\n"
