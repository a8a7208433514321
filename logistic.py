"""The logistic regressions of DFR, by scikit-learn, in parallel processes.

A module of its own, so that the worker processes import neither torch nor the project. Processes
and not threads: liblinear draws its random numbers from one generator a process, and threads
would make the result depend on their timing.
"""

import warnings
from typing import NamedTuple

import numpy as np
from joblib import Parallel, cpu_count, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

MAX_ITERATIONS = 1000


class Fit(NamedTuple):
    """coefficients (d,), intercept, and whether the solver converged."""

    coefficients: np.ndarray
    intercept: float
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
    """Fits for tasks (rows, c, seed), in their order; `workers` None = one a core."""
    workers = min(workers or cpu_count(), len(tasks))
    jobs = (delayed(fit)(features, labels, rows, penalty, c, seed) for rows, c, seed in tasks)
    return Parallel(n_jobs=workers)(jobs)
