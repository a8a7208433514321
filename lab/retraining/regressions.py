"""DFR by logistic regressions: the penalty is tuned, then several fits are averaged."""

import logging
import math

import numpy as np
import torch

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics
from lab.retraining import logistic
from lab.retraining.subsets import fitting_and_scoring, members, rows_to_fit
from lab.splits.splits import Split

log = logging.getLogger(f"spurious.{__name__}")


def by_regressions(features_of, features, source: Split, val: Split | None, config: Config):
    """(coefficients, intercept, facts) of logistic regressions on these features of `source`.

    features_of: a split → its features, for the validation split where that chooses the penalty.
    """
    tuning: list[dict] = []
    c = None
    on_target = config.dfr_val_split_strategy == "target"
    score = "minority_acc" if on_target else "worst_acc"
    if config.dfr_reg != "none":
        if on_target:
            assert val is not None  # data sets with a target set have one
            tuning = tune_on_validation(features, source, features_of(val), val, config)
        else:
            tuning = tune(features, source, config)
        c = best_option(tuning, score)

    tasks = []
    for i in range(config.dfr_num_retrains if config.dfr_balance else 1):
        rng = np.random.default_rng(derive_seed(config.seed, "dfr", "retrain", i))
        seed = derive_seed(config.seed, "dfr", "solver", i) % 2**31
        tasks.append((rows_to_fit(members(source), rng, config), c, seed))
    fits = _fit_all(features, source, tasks, config)
    coefficients = np.mean([found.coefficients for found in fits], axis=0)
    if not coefficients.any():
        log.warning(
            "DFR: all coefficients are 0, so that the layer predicts one class for every sample; "
            "raise dfr_c_options or take dfr_reg: none"
        )
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


def best_option(tuning: list[dict], score: str) -> float:
    """The C with the highest score; ties go to the higher mean of the group accuracies.

    Then to the option that is listed first, as in the published code. NaN is lower than any number.
    """

    def key(row: dict) -> tuple[float, float]:
        values = (row[score], row["mean_group_acc"])
        first, second = (-math.inf if math.isnan(value) else value for value in values)
        return first, second

    return max(tuning, key=key)["c"]


def tune(features, split: Split, config: Config) -> list[dict]:
    """Accuracies of every C option, [{"c", "worst_acc", "mean_group_acc"}], as they are listed.

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
        worst = float(min(accuracies, default=math.nan))
        table.append({"c": c, "worst_acc": worst, "mean_group_acc": _mean(accuracies)})
    return table


def tune_on_validation(features, split: Split, val_features, val: Split, config: Config):
    """Accuracies on validation data of every C option, as they are listed.

    [{"c", "minority_acc", "mean_group_acc"}]. Fitted on the whole split, or a group-balanced subset
    of it.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "tune"))
    rows = rows_to_fit(members(split), rng, config)
    minority = val.in_minority.cpu().numpy()
    table = []
    for c, found in _fit_options(features, split, rows, config):
        right = _right(found, val_features, val)
        of_groups = [right[rows].mean() for rows in members(val) if len(rows)]
        row = {"c": c, "minority_acc": _mean(right[minority])}
        table.append(row | {"mean_group_acc": _mean(of_groups)})
    return table


def _mean(values) -> float:
    """The mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def _fit_options(features, split: Split, rows, config: Config):
    """(C, fit on these rows) for every C option, as they are listed."""
    seed = derive_seed(config.seed, "dfr", "solver") % 2**31
    options = list(dict.fromkeys(config.dfr_c_options))
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
