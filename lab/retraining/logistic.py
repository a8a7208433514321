"""The logistic regressions of DFR, by scikit-learn, in parallel processes.

A module of its own, so that the worker processes import no torch. Processes
and not threads: liblinear draws its random numbers from one generator a process, and threads
would make the result depend on their timing.
"""

import warnings
from typing import NamedTuple

import numpy as np
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lab.system import cores

MAX_ITERATIONS = 1000


class Fit(NamedTuple):
    """coefficients (d,), intercept, and whether the solver converged.

    Of several regressions, one against the rest for each class: (C, d), (C,), and whether all did.
    """

    coefficients: np.ndarray
    intercept: float | np.ndarray
    converged: bool


def estimator(penalty: str, c: float, seed: int) -> LogisticRegression:
    """The solvers as published: liblinear for "l1" and "l2", lbfgs with C = ∞ for "none"."""
    if penalty == "none":
        return LogisticRegression(C=np.inf, solver="lbfgs", max_iter=MAX_ITERATIONS)
    return LogisticRegression(
        l1_ratio=float(penalty == "l1"),
        C=c,
        solver="liblinear",
        max_iter=MAX_ITERATIONS,
        random_state=seed,
    )


def fit(features, labels, rows, penalty: str, c: float, seed: int) -> Fit:
    """Fit on these rows of features (N, d), labels (N,) in {-1, +1}."""
    with warnings.catch_warnings():
        # Told by `converged`, and reported once for all fits.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = estimator(penalty, c, seed).fit(features[rows], labels[rows])
    converged = int(model.n_iter_.max()) < MAX_ITERATIONS
    return Fit(model.coef_[0], float(model.intercept_[0]), converged)


def fit_all(features, labels, tasks, penalty: str, workers: int | None) -> list[Fit]:
    """Fits for tasks (rows, c, seed), in their order; `workers` None: one per available core.

    labels (N,): float -1 and +1, or class indices, of which each is fitted against the rest.
    """
    several = np.issubdtype(labels.dtype, np.integer)
    targets = [labels]
    if several:
        targets = [np.where(labels == k, 1.0, -1.0) for k in range(labels.max() + 1)]
    workers = min(workers or cores.available(), len(tasks) * len(targets))
    fits = Parallel(n_jobs=workers)(
        delayed(fit)(features, target, rows, penalty, c, seed)
        for rows, c, seed in tasks
        for target in targets
    )
    if not several:
        return fits
    return [_stacked(fits[i : i + len(targets)]) for i in range(0, len(fits), len(targets))]


def _stacked(fits: list[Fit]) -> Fit:
    coefficients, intercepts, converged = zip(*fits)
    return Fit(np.stack(coefficients), np.array(intercepts), all(converged))
