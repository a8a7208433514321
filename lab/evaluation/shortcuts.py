"""Which attributes a network takes for its label: δ of task × attribute pairs, and their structure.

The groups of a task with an attribute are (task, attribute) = 00, 01, 10, 11 with the accuracies
g0 … g3; δ = |g0 + g3 - g1 - g2| in percentage points is large where the network is right when the
attribute goes along with the label, and wrong when it does not. T is the matrix of δ, attribute ×
task. Neither torch nor scikit-learn is needed for δ itself.
"""

import numpy as np

Z = 1.959964  # standard normal quantile of a two-sided 95 % interval


def interval(correct, counts) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % Agresti-Coull interval of accuracies; NaN where there is no sample.

    Agresti & Coull, "Approximate is better than 'exact' for interval estimation of binomial
    proportions", 1998: p̃ ± z √(p̃(1-p̃)/ñ) with ñ = n + z² and p̃ = (x + z²/2)/ñ. The ends may lie
    outside of 0 to 1. correct: x, samples that are right; counts: n; arrays of any one shape.
    """
    correct, counts = np.asarray(correct, dtype=float), np.asarray(counts, dtype=float)
    n = np.where(counts > 0, counts, np.nan) + Z**2
    p = (correct + Z**2 / 2) / n
    half = Z * np.sqrt(p * (1 - p) / n)
    return p - half, p + half


def shrunk(correct, counts) -> np.ndarray:
    """Group accuracies (..., 4) shrunk towards the accuracy of their class.

    The class accuracy where it lies in the group's interval, else the interval's end nearer to it;
    the class accuracy for an empty group, NaN for an empty class. correct, counts: (..., 4) samples
    that are right, and all, of the groups 00, 01, 10, 11; the first two are one class, the last two
    the other.
    """
    correct, counts = np.asarray(correct, dtype=float), np.asarray(counts, dtype=float)
    x, n = (values.reshape(*values.shape[:-1], 2, 2).sum(-1) for values in (correct, counts))
    of_class = x / np.where(n > 0, n, np.nan)
    of_class = np.repeat(of_class, 2, axis=-1)
    return np.where(counts > 0, np.clip(of_class, *interval(correct, counts)), of_class)


def deltas(correct, counts) -> np.ndarray:
    """δ (...,) in percentage points of the shrunk accuracies; NaN where a class is empty.

    correct, counts: see `shrunk`.
    """
    return 100 * np.abs(shrunk(correct, counts) @ np.array([1, -1, -1, 1]))


def delta(correct, counts) -> float:
    """δ of one pair from its four numbers of right samples and its four group sizes."""
    return float(deltas(correct, counts))


def tallies(right, label, attributes) -> tuple[np.ndarray, np.ndarray]:
    """(right samples, samples) (K, 4) int64 in the groups of one task with each of K attributes.

    right: (N,) bool, whether the network is; label: (N,) and attributes: (N, K), of -1 and +1.
    """
    has = (np.asarray(attributes) > 0).astype(np.int64)
    weights = np.stack([np.asarray(right, dtype=np.int64), np.ones(len(has), dtype=np.int64)])
    columns = []
    for of_class in (np.asarray(label) <= 0, np.asarray(label) > 0):
        chosen = weights * of_class
        columns += [chosen @ (1 - has), chosen @ has]
    correct, counts = np.stack(columns, axis=-1)
    return correct, counts


def copies(counts) -> np.ndarray:
    """Whether each attribute is a copy (1) or the opposite (-1) of its task, (...,) int; else 0.

    Then no sample goes against the shortcut, and δ, which compares those that do, is 0. counts:
    (..., 4) samples of the groups 00, 01, 10, 11.
    """
    empty = np.asarray(counts) == 0
    return (empty[..., 1] & empty[..., 2]).astype(int) - (empty[..., 0] & empty[..., 3])


def pairs(T: np.ndarray, eps: float) -> list[tuple[int, int]]:
    """(task, attribute) of all pairs with δ above eps, the largest δ first."""
    found = [(int(task), int(attribute)) for attribute, task in np.argwhere(eps < T)]
    return sorted(found, key=lambda pair: (-T[pair[1], pair[0]], pair))


def standardised(T: np.ndarray) -> np.ndarray:
    """Each attribute's row with mean 0 and deviation 1, NaN first as 0; constant rows are 0."""
    T = np.nan_to_num(T)
    deviation = T.std(axis=1, keepdims=True)
    return (T - T.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1)


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its length, NaN first as 0; a zero row stays zero."""
    matrix = np.nan_to_num(matrix)
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(length > 0, length, 1)


def cosines(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Cosine similarities of the rows of A (n, d) with those of B (m, d), (n, m); 0 of zeros."""
    return unit_rows(A) @ unit_rows(B).T


def coclusters(matrix: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Cluster 0 … k-1 of every row and of every column, by spectral co-clustering.

    Dhillon, "Co-clustering documents and words using bipartite spectral graph partitioning", 2001.
    Edges of the graph cannot be negative, so that the smallest entry counts as 0; None where a row
    or a column has no edge then, as in a constant matrix.
    """
    from sklearn.cluster import SpectralCoclustering  # slow to import

    edges = matrix - matrix.min()
    if not (edges.any(axis=0).all() and edges.any(axis=1).all()):
        return None
    fitted = SpectralCoclustering(n_clusters=k, random_state=seed % 2**32).fit(edges)
    return fitted.row_labels_, fitted.column_labels_


def directions(T: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray, int]:
    """SVD of T with unit rows: left singular vectors (K, d), singular values σ, and d.

    d is the smallest number with Σ_{i≤d} σ_i² ≥ gamma · Σ σ_i²; 0 where T is 0.
    """
    U, sigma, _ = np.linalg.svd(unit_rows(T), full_matrices=False)
    total = np.cumsum(sigma**2)
    # The last shares are 1 but for rounding.
    d = int(np.argmax(total >= (gamma - 1e-12) * total[-1])) + 1 if total[-1] else 0
    return U[:, :d], sigma, d


def clusters(vectors: np.ndarray, k: int, seed: int) -> np.ndarray | None:
    """Cluster 0 … k-1 of every row (K,) by k-means; None of vectors without dimensions."""
    from sklearn.cluster import KMeans  # slow to import

    if not vectors.shape[1]:
        return None
    return KMeans(n_clusters=k, n_init=10, random_state=seed % 2**32).fit(vectors).labels_
