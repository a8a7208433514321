"""Deep feature reweighting: retrain the last layer, or a linear layer on any layer's features.

Kirichenko et al., "Last Layer Re-Training is Sufficient for Robustness to Spurious Correlations",
2023: standardise the features with the training split's statistics; tune the penalty on a
group-balanced half of the data, scored by worst-group accuracy on the other half; then fit
several times on fresh group-balanced subsets of all the data and average the coefficients.

On a target set without shortcut: one fit on all of it, on the features as they are, with the
penalty that does best on the validation split's samples whose attribute is not their label.

    python dfr.py --run results/<run> [dfr_key=value ...]     once more, without training
"""

import json
import logging
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

import files
import logistic
import metrics
from config import Config, derive_seed
from errors import ConfigError, DataError
from model import target_layer
from splits import Split, Splits

log = logging.getLogger(f"spurious.{__name__}")

MOST_GROUPS = 8  # more are not listed in the text; the JSON file has all


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


def check(splits: Splits) -> None:
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
    plan = metrics.evaluation_plan(split, config.eval_batch_size, model)
    for _, _, x in metrics.batches(split, plan):
        yield model.hidden(x, layer).cpu().numpy()


def balanced(members: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random subset in which every non-empty group has as many rows as the smallest of them."""
    there = [rows for rows in members if len(rows)]
    smallest = min(map(len, there))
    chosen = np.concatenate([rng.permutation(rows)[:smallest] for rows in there])
    return np.sort(chosen)


def halves(split: Split, rng: np.random.Generator) -> tuple[list, list]:
    """Rows of each group for fitting (half, the larger one if odd) and for scoring."""
    members = [rng.permutation(np.arange(part.start, part.stop)) for part in split.slices]
    middles = [math.ceil(len(rows) / 2) for rows in members]
    fitting = [rows[:middle] for rows, middle in zip(members, middles)]
    return fitting, [rows[middle:] for rows, middle in zip(members, middles)]


def rows_to_fit(members: list[np.ndarray], rng: np.random.Generator, config: Config) -> np.ndarray:
    """A balanced subset of these rows of each group, or all of them."""
    return balanced(members, rng) if config.dfr_balance else np.sort(np.concatenate(members))


def tune(features, split: Split, config: Config) -> list[dict]:
    """Worst-group accuracy of every C option, [{"c", "worst_acc"}], in increasing C.

    One half, or a group-balanced subset of it, is for fitting, the other half scores; NaN when no
    group has a second sample to score with.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "tune"))
    fitting, scoring = halves(split, rng)
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
    tuning, c = [], None
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
    if config.loss_function == "cross_entropy" and coefficients.ndim == 1:
        # Two outputs with the difference f: their cross entropy is f's logistic loss.
        coefficients = np.stack([-coefficients / 2, coefficients / 2])
        intercept = np.array([-intercept / 2, intercept / 2])
    width = features.shape[1]
    head = Head(
        mean=scaler.mean_ if scaler else np.zeros(width),
        scale=scaler.scale_ if scaler else np.ones(width),
        coefficients=coefficients,
        intercept=intercept,
    )
    results = {
        "target_layer": config.dfr_target_layer,
        "split_strategy": config.dfr_val_split_strategy,
        "balanced": config.dfr_balance,
        "standardized": config.dfr_standardize,
        "reg": config.dfr_reg,
        "c": c,
        "num_retrains": len(tasks),
        "num_samples": len(tasks[0][0]),
        "samples_per_group": min(filter(None, source.counts)) if config.dfr_balance else None,
        "num_features": width,
        "num_coefficients": coefficients.size,
        "nonzero_coefficients": int(np.count_nonzero(coefficients)),
        "converged_fits": sum(found.converged for found in fits),
        "tuned_for": score if tuning else None,
        "tuning": tuning,
        "before": {},
        "after": {},
    }
    loss = metrics.LOSSES[config.loss_function]
    for name, split in splits.evaluated().items():
        f = metrics.outputs(model, split, config.eval_batch_size)
        results["before"][name] = metrics.summary(f, split, loss, splits.train.shares)
        parts = [head.outputs(h) for h in feature_batches(model, split, config)]
        on_cpu = replace(split, y=split.y.cpu(), a=split.a.cpu())
        results["after"][name] = metrics.summary(
            torch.cat(parts), on_cpu, loss, splits.train.shares
        )
    return head, results


def save(folder, head: Head, results: dict, group_names: list[str]) -> None:
    """Write `dfr_model.npz`, `dfr_results.json` (NaN as null) and `dfr_results.txt`."""
    files.save(folder / "dfr_model.npz", lambda file: np.savez(file, **vars(head)))
    files.write_text(folder / "dfr_results.txt", text(results, group_names))
    strict = json.dumps(_without_nan(results), indent=2, allow_nan=False)
    files.write_text(folder / "dfr_results.json", strict + "\n")


def _without_nan(value):
    """The same data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(results: dict, group_names: list[str]) -> str:
    """A table for reading: every metric before and after, side by side."""
    names = {"avg_acc": "average accuracy", "adjusted_acc": "adjusted accuracy"}
    names |= {"worst_acc": "worst-group accuracy"}
    if len(group_names) <= MOST_GROUPS:
        names |= {f"group_{g}_acc": f"  {name}" for g, name in enumerate(group_names)}
    names |= {"minority_acc": "minority accuracy", "majority_acc": "majority accuracy"}
    names |= {"avg_loss": "average loss", "worst_loss": "worst-group loss"}
    c = "no penalty" if results["c"] is None else f"{results['reg']} penalty, C = {results['c']:g}"
    fits = f"one fit on {results['num_samples']} samples"
    if results["balanced"]:
        fits = f"{results['num_retrains']} fits on {results['samples_per_group']} of each group"
    lines = [
        f"DFR on {results['target_layer']}: {c}, {fits}, {results['nonzero_coefficients']} of "
        f"{results['num_coefficients']} coefficients in use"
    ]
    for split in results["after"]:
        lines += ["", f"{split:<24}{'before':>10}{'after':>10}"]
        for quantity, name in names.items():
            before, after = (results[when][split][quantity] for when in ("before", "after"))
            lines.append(f"{name:<24}{before:>10.4f}{after:>10.4f}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """`python dfr.py --run results/<run>`: retrain a trained run again; returns the exit code."""
    from command import Parser, console_log, exit_code

    parser = Parser(
        prog="python dfr.py",
        description="Deep feature reweighting of a trained run, without training it again.",
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="results/<run>")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dfr_key=value",
        help="settings of DFR that replace the run's",
    )

    def again() -> None:
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        with console_log():
            print(f"Results: {retrain_run(Path(arguments.run), arguments.overrides)}")

    return exit_code(again)


# What of DFR decides about the training data, and so about the network.
SPLITTING = (
    "dfr_val_split_strategy", "dfr_val_ratio", "dfr_reuse_train", "dfr_spurious_features",
)  # fmt: skip


def retrain_run(folder: Path, overrides) -> Path:
    """Retrain the network of a run's last (or best) checkpoint with other settings of DFR.

    Writes `config_used.yaml` and what `save` writes into a new folder `<run>/dfr/<time>`, and
    returns that. Raises `ConfigError` for overrides that are not of DFR, `DataError` when the data
    are not the run's: test or training data must never be what DFR retrains on.
    """
    import checkpoints
    import config as configuration
    import data_loader
    import model
    import tracking

    used = folder / "config_used.yaml"
    if not used.is_file():
        raise ConfigError(f"--run: given {folder}, but there is no {used}")
    wrong = [
        given for given in overrides
        if not given.startswith("dfr_") or given.partition("=")[0] in SPLITTING
    ]  # fmt: skip
    if wrong:
        raise ConfigError(
            *(f"{given}: allowed: keys of DFR, but not {', '.join(SPLITTING)}" for given in wrong)
        )
    config = configuration.load_config(used, [*overrides, "use_dfr=true"])
    device = model.choose_device(config.device)
    splits = data_loader.load(config)
    if config.use_feature_extractor:
        import feature_extractor

        splits = feature_extractor.Extractor(config, device).extract(splits)
    check(splits)
    network = model.build_for(config, splits)
    checkpoints.load_network(network, folder, config.dfr_network, splits.fingerprint())
    head, results = retrain(network.to(device), splits.to(device), config)
    place = tracking.new_folder(folder / "dfr")
    files.write_text(place / "config_used.yaml", tracking.config_yaml(config))
    save(place, head, results, splits.group_names)
    log.info("%s", text(results, splits.group_names))
    return place


if __name__ == "__main__":
    sys.exit(main())
