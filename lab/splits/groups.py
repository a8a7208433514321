"""What a group is: the cells of label y and attribute a, their order, names, counts and moments.

Two classes: y, a are -1 or +1. The group index is 2*[y = +1] + [a = +1], so the order is (-1,-1),
(-1,+1), (+1,-1), (+1,+1) everywhere: tables, tensors, legends. More classes: y, a are indices from
0, and the group index is y*(number of attributes) + a. Moments are those of two classes.
"""

from typing import NamedTuple

GROUPS = ((-1, -1), (-1, +1), (+1, -1), (+1, +1))


class Moments(NamedTuple):
    """E[Y], E[A] and Cov(Y, A) of a split."""

    y_mean: float
    a_mean: float
    covariance: float


def class_cells(num_classes: int, num_attributes: int) -> tuple[tuple[int, int], ...]:
    """(y, a) of every group where labels and attributes are class indices."""
    return tuple((y, a) for y in range(num_classes) for a in range(num_attributes))


def signed_cells(num_attributes: int) -> tuple[tuple[int, int], ...]:
    """(y, a) of every group where the label is -1 or +1 and the attribute an index."""
    return tuple((y, a) for y in (-1, +1) for a in range(num_attributes))


def under_represented(counts, num_classes: int) -> tuple[bool, ...]:
    """Which groups have less than the share that independence of label and attribute gives.

    π(y,a) < π(y)·π(a), of groups in the order of classes and within them of attributes.
    """
    width, n = len(counts) // num_classes, sum(counts)
    of_label = [sum(counts[y * width : (y + 1) * width]) for y in range(num_classes)]
    of_attribute = [sum(counts[a::width]) for a in range(width)]
    return tuple(
        count * n < of_label[g // width] * of_attribute[g % width] for g, count in enumerate(counts)
    )


def index(y, a):
    """Group index of y and a in {-1, +1}: numbers, numpy arrays or tensors alike."""
    return 2 * (y > 0) + (a > 0)


def name(group: int) -> str:
    """Name of a group in tables, such as `G(-1,+1)`."""
    y, a = GROUPS[group]
    return f"G({y:+d},{a:+d})"


def pair_name(first: int, second: int) -> str:
    """Name of a pair of groups in tables, such as `G(-1,+1)_vs_G(-1,-1)`."""
    return f"{name(first)}_vs_{name(second)}"


def pair_indices(pair) -> tuple[int, int]:
    """Group indices of a pair written as in the configuration, `[[y, a], [y, a]]`."""
    first, second = pair
    return int(index(*first)), int(index(*second))


def shares(counts) -> list[float]:
    """Share π_g of every group, from their counts."""
    total = sum(counts)
    return [count / total for count in counts]


def moments(counts) -> Moments:
    """E[Y], E[A] and Cov(Y, A) = E[YA] - E[Y]E[A] of a split with these four group counts.

    Raises `ValueError` for another number of groups: class indices have no moments.
    """
    if len(counts) != len(GROUPS):
        raise ValueError(f"moments of {len(counts)} groups; allowed: {len(GROUPS)} groups")
    share = shares(counts)
    y_mean = sum(p * y for p, (y, a) in zip(share, GROUPS))
    a_mean = sum(p * a for p, (y, a) in zip(share, GROUPS))
    ya_mean = sum(p * y * a for p, (y, a) in zip(share, GROUPS))
    return Moments(y_mean, a_mean, ya_mean - y_mean * a_mean)


def probabilities(y_mean: float, a_mean: float, covariance: float) -> list[float]:
    """Group probabilities π(y,a) = (1 + y·ȳ + a·ā + y·a·(ρ + ȳ·ā)) / 4.

    The only distribution on the four cells with these moments; negative entries mean that no
    distribution has them.
    """
    ya_mean = covariance + y_mean * a_mean
    return [(1 + y * y_mean + a * a_mean + y * a * ya_mean) / 4 for y, a in GROUPS]


def split_counts(n: int, share) -> list[int]:
    """Whole counts that add up to n in these proportions, by largest remainders.

    Remainders that differ only by rounding errors count as equal; ties go to the earlier entry.
    """
    exact = [n * p for p in share]
    counts = [int(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: -round(exact[i] - counts[i], 9))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts
