"""Sample weights under which the classes of every task are equally likely, and nothing else counts.

Of all weights w ≥ 0, Σw = 1, with Σ_i w_i·y_it = 0 for every task t those of maximal entropy
-Σ w log w. Samples with the same labels (a pattern p of -1 and +1) get the same weight, so that
with n_p samples of a pattern w_p ∝ exp(λ·p), where λ minimises the dual log Σ_p n_p·exp(λ·p), one
variable a task (Boyd & Vandenberghe, "Convex Optimization", 2004, section 5.1.6).
"""

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from lab.system.errors import DataError

NEWTON_STEPS = 200
TOLERANCE = 1e-12


def pattern_weights(patterns: np.ndarray, counts: np.ndarray, names: list[str]) -> np.ndarray:
    """Weight of each sample of a pattern, (P,), with Σ counts·weights = 1.

    patterns: (P, T) of -1 and +1, all different; counts: (P,) samples of each. Patterns that no
    feasible weights can use get 0. Raises `DataError` naming a minimal set of tasks that cannot be
    balanced together, when there are no feasible weights.
    """
    usable = _usable(patterns)
    if not usable.any():
        raise DataError(
            "debias_method: no weights make the classes of "
            + " and ".join(names[t] for t in _conflict(patterns))
            + " equally likely together; leave one of these tasks out, or take another method"
        )
    weights = np.zeros(len(patterns))
    weights[usable] = _dual(patterns[usable].astype(float), counts[usable].astype(float))
    return weights


def _usable(patterns: np.ndarray) -> np.ndarray:
    """Which patterns some feasible weights use, (P,) bool; none if there are no feasible weights.

    The feasible weights are a cone's: maximise Σ s over s ≤ q, s ≤ 1, q ≥ 0, Σ_p q_p·p = 0. Sums of
    feasible q are feasible, so every pattern that can be used has s = 1.
    """
    size, tasks = patterns.shape
    one = sparse.identity(size, format="csr")  # there can be as many patterns as samples
    balance = sparse.hstack([sparse.csr_array(patterns.T), sparse.csr_array((tasks, size))])
    found = linprog(
        np.concatenate([np.zeros(size), -np.ones(size)]),  # variables: q, then s
        A_ub=sparse.hstack([-one, one]),
        b_ub=np.zeros(size),
        A_eq=balance,
        b_eq=np.zeros(tasks),
        bounds=[(0, None)] * size + [(0, 1)] * size,
        method="highs",
    )
    if found.status != 0:
        raise RuntimeError(f"the linear program over {size} patterns failed: {found.message}")
    return found.x[size:] > 0.5


def _conflict(patterns: np.ndarray) -> list[int]:
    """Tasks that cannot be balanced together, but without any one of them can."""
    tasks = list(range(patterns.shape[1]))
    for t in tuple(tasks):
        rest = [other for other in tasks if other != t]
        if rest and not _usable(np.unique(patterns[:, rest], axis=0)).any():
            tasks = rest
    return tasks


def _dual(patterns: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weights (P,) from Newton's method with backtracking on the dual, which is convex."""
    multipliers = np.zeros(patterns.shape[1])

    def shares(at):
        logits = patterns @ at + np.log(counts)
        top = logits.max()
        raised = np.exp(logits - top)
        return raised / raised.sum(), top + np.log(raised.sum())

    for _ in range(NEWTON_STEPS):
        share, value = shares(multipliers)
        gradient = patterns.T @ share
        if np.abs(gradient).max() < TOLERANCE:
            break
        hessian = (patterns * share[:, None]).T @ patterns - np.outer(gradient, gradient)
        # Tasks whose labels determine each other make it singular.
        step = -np.linalg.lstsq(hessian, gradient, rcond=1e-12)[0]
        length = 1.0
        while shares(multipliers + length * step)[1] > value + 1e-4 * length * gradient @ step:
            length /= 2
            if length < 1e-10:
                break
        multipliers = multipliers + length * step
    share, _ = shares(multipliers)
    gradient = np.abs(patterns.T @ share).max()
    if gradient > 1e-6:
        raise RuntimeError(f"weights of maximal entropy not found: a mean label is {gradient:.3g}")
    return share / counts
