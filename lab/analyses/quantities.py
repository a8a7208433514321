"""The quantities of the analyses, all bilinear in V: sums over entries of the Gram matrix K.

Each analysis is a function of K, and `<…>_rows(view)`, which gives its rows of `analysis.csv` for
one split of one checkpoint (see `lab.analyses.measuring.View`). Combinations of the rows of V are
coefficients u (16,) in the order of `gram.labels()`.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from lab.analyses.gram import GRADIENT, JACOBIAN, ROWS, SIDES
from lab.analyses.measuring import View
from lab.evaluation import metrics
from lab.evaluation.losses import Loss
from lab.splits import groups
from lab.splits.splits import Split

Y = np.array([y for y, _ in groups.GROUPS], dtype=float)
A = np.array([a for _, a in groups.GROUPS], dtype=float)
Rows = Iterator[tuple[str, dict[str, float]]]  # (pair, or "", {quantity: value})


def _rows(side: str, kind: int, weights) -> np.ndarray:
    """Coefficients (16,) of Σ_g weights_g ∇_g (or m_g) of a side."""
    u = np.zeros(2 * ROWS)
    start = ROWS * SIDES.index(side) + 4 * kind
    u[start : start + 4] = weights
    return u


def product(K: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """⟨Σ u_i V_i, Σ v_j V_j⟩ = uᵀ K v over the rows that have a weight.

    Rows without a weight do not count even where K is NaN (empty groups). A weight on such a row,
    or a weight that is NaN itself, makes the product NaN, even with a combination that is zero.
    """
    i, j = np.flatnonzero(u), np.flatnonzero(v)
    undefined = np.isnan([*u, *v, *K.diagonal()[i], *K.diagonal()[j]]).any()
    if undefined:
        return math.nan
    return float(u[i] @ K[np.ix_(i, j)] @ v[j])


def norm_squared(K: np.ndarray, u: np.ndarray) -> float:
    """‖Σ u_i V_i‖², clipped to 0 where rounding makes it negative."""
    return float(np.maximum(product(K, u, u), 0.0))


def norm(K: np.ndarray, u: np.ndarray) -> float:
    """‖Σ u_i V_i‖."""
    return math.sqrt(norm_squared(K, u))


def cosine(K: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """Cosine of two combinations of rows; NaN when one has norm 0."""
    norms = norm(K, u) * norm(K, v)
    return float(np.clip(product(K, u, v) / norms, -1, 1)) if norms != 0 else math.nan


def _unit(g: int) -> np.ndarray:
    return np.eye(4)[g]


def _basis(side: str, kind: int, counts) -> dict[str, np.ndarray]:
    """Walsh-Hadamard combinations ¼Σ, ¼Σy, ¼Σa, ¼Σya of a side; NaN when a group is empty."""
    scale = 0.25 if min(counts) > 0 else math.nan
    signs = {"inv": np.ones(4), "Y": Y, "A": A, "AY": A * Y}
    return {name: _rows(side, kind, sign * scale) for name, sign in signs.items()}


def gradient_basis(K: np.ndarray, side: str, counts) -> dict[str, float]:
    """Norms and cosines of v_inv, v_Y, v_A, v_AY: ¼Σ∇_g, ¼Σy∇_g, ¼Σa∇_g, ¼Σya∇_g.

    They are the Walsh-Hadamard transform of the group gradients, in which
    ∇R = v_inv + ȳ v_Y + ā v_A + (ρ + ȳā) v_AY.
    """
    basis = _basis(side, GRADIENT, counts)
    names = list(basis)
    result = {f"norm_{name}": norm(K, basis[name]) for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            result[f"cosine_{first}_{second}"] = cosine(K, basis[first], basis[second])
    return result


def gap_dynamics_factors(
    K: np.ndarray, pair, gap_side: str, flow_side: str, counts, flow_weights
) -> dict[str, float]:
    """Split of d/dt (R_g1 - R_g2) = ⟨∇_g2 - ∇_g1, ∇R⟩ = ⟨Δ, ∇R⟩ for a pair (g1, g2).

    term1 = ⟨Δ, v_inv⟩: what is left without any bias; term2 = ⟨Δ, ȳ v_Y + ā v_A + ȳā v_AY⟩:
    marginal imbalance; term3 = ⟨Δ, ρ v_AY⟩: the spurious correlation. They add up to `total`.
    `method_total` = ⟨Δ, Σ w_g ∇_g⟩ for the flow weights of the run's own method.

    Δ comes from `gap_side`, ∇R and the moments (from `counts`) from `flow_side`.
    """
    g1, g2 = pair
    delta = _rows(gap_side, GRADIENT, _unit(g2) - _unit(g1))
    basis = _basis(flow_side, GRADIENT, counts)
    y_mean, a_mean, covariance = groups.moments(counts)
    marginal = y_mean * basis["Y"] + a_mean * basis["A"] + y_mean * a_mean * basis["AY"]
    return {
        "term1": product(K, delta, basis["inv"]),
        "term2": product(K, delta, marginal),
        "term3": product(K, delta, covariance * basis["AY"]),
        "total": product(K, delta, _rows(flow_side, GRADIENT, groups.shares(counts))),
        "method_total": product(K, delta, _rows(flow_side, GRADIENT, flow_weights)),
    }


def static_dynamic_decomposition(
    K: np.ndarray, pair, gap_side: str, flow_side: str, counts, loss: Loss
) -> dict[str, float]:
    """Static and dynamic parts of ⟨Δ, ∇R⟩ for a pair (minority, majority), Δ = ∇_maj - ∇_min.

    Every ∇_g = static c₀(y)·m_g + dynamic rest, with c₀(y) = ∂ℓ/∂f at f = 0. TermA =
    ⟨Δ_static, ∇R_static⟩, TermB the two mixed products, TermC = ⟨Δ_dynamic, ∇R_dynamic⟩.
    """
    at_zero = loss.at_zero(Y)

    def parts(side, weights):
        whole = _rows(side, GRADIENT, weights)
        static = _rows(side, JACOBIAN, weights * at_zero)
        return whole, static, whole - static

    minority, majority = pair
    delta, delta_static, delta_dynamic = parts(gap_side, _unit(majority) - _unit(minority))
    flow, flow_static, flow_dynamic = parts(flow_side, np.array(groups.shares(counts)))
    return {
        "TermA": product(K, delta_static, flow_static),
        "TermB": product(K, delta_static, flow_dynamic) + product(K, delta_dynamic, flow_static),
        "TermC": product(K, delta_dynamic, flow_dynamic),
        "total": product(K, delta, flow),
    }


def jacobian_norm(K: np.ndarray, side: str, counts) -> dict[str, float]:
    """Norms and angles of the mean Jacobians m_g and of their contrasts.

    Δ_S = ½Σ a·m_g (attribute) and Δ_L = ½Σ y·m_g (label); m_A = Δ_S/2, m_Y = Δ_L/2.
    """
    single = [_rows(side, JACOBIAN, _unit(g)) for g in range(4)]
    basis = _basis(side, JACOBIAN, counts)
    m_A, m_Y = basis["A"], basis["Y"]
    delta_S, delta_L = 2 * m_A, 2 * m_Y
    result = {f"norm_sq_{groups.name(g)}": norm_squared(K, single[g]) for g in range(4)}
    for i in range(4):
        for j in range(i + 1, 4):
            name = groups.pair_name(i, j)
            result[f"dot_{name}"] = product(K, single[i], single[j])
            result[f"cosine_{name}"] = cosine(K, single[i], single[j])
            result[f"dist_sq_{name}"] = norm_squared(K, single[i] - single[j])
    norm_S, norm_L = norm(K, delta_S), norm(K, delta_L)
    return result | {
        "norm_Delta_S": norm_S,
        "norm_Delta_L": norm_L,
        "ratio_Delta_S_L": norm_S / norm_L if norm_L != 0 else math.nan,
        "dot_Delta_S_Delta_L": product(K, delta_S, delta_L),
        "cosine_Delta_S_Delta_L": cosine(K, delta_S, delta_L),
        "norm_sq_m_A": norm_squared(K, m_A),
        "norm_sq_m_Y": norm_squared(K, m_Y),
        "dot_m_A_m_Y": product(K, m_A, m_Y),
    }


def model_output_expectation(f: torch.Tensor, split: Split) -> dict[str, float]:
    """Mean and standard deviation (n - 1) of the output f (N,) in each group."""
    f = metrics.float64(f)
    result = {}
    for g, part in enumerate(split.slices):
        values = f[part]
        result[f"mean_{groups.name(g)}"] = values.mean().item() if len(values) else math.nan
        result[f"std_{groups.name(g)}"] = values.std().item() if len(values) > 1 else math.nan
    return result


def gradient_basis_rows(view: View) -> Rows:
    """Of one split: norms and cosines."""
    yield "", gradient_basis(view.K, view.gap_side, view.counts)


def jacobian_rows(view: View) -> Rows:
    """Of one split: norms, products and angles."""
    yield "", jacobian_norm(view.K_jacobian, view.gap_side, view.counts)


def output_rows(view: View) -> Rows:
    """Of one split: means and standard deviations."""
    yield "", model_output_expectation(view.outputs, view.samples)


def gap_dynamics_rows(view: View) -> Rows:
    """Of one flow, for each pair of groups: the terms and totals."""
    for pair in view.pairs:
        yield (
            groups.pair_name(*pair),
            gap_dynamics_factors(
                view.K, pair, view.gap_side, view.flow_side, view.counts, view.flow_weights
            ),
        )


def decomposition_rows(view: View) -> Rows:
    """Of one flow, for each pair of groups: TermA, TermB, TermC and their total."""
    for pair in view.pairs:
        yield (
            groups.pair_name(*pair),
            static_dynamic_decomposition(
                view.K, pair, view.gap_side, view.flow_side, view.counts, view.loss
            ),
        )
