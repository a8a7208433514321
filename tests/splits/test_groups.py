"""The order of the groups, their counts and moments."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab.splits import groups


def test_the_index_is_2_y_plus_a_everywhere():
    for g, (y, a) in enumerate(groups.GROUPS):
        assert groups.index(y, a) == g
        assert groups.index(np.array([y]), np.array([a])) == g
        assert groups.index(torch.tensor([float(y)]), torch.tensor([float(a)])).item() == g
    assert groups.name(1) == "G(-1,+1)"
    assert groups.pair_indices([[1, -1], [1, 1]]) == (2, 3)


counts = st.lists(st.integers(0, 500), min_size=4, max_size=4).filter(sum)


@given(counts)
def test_moments_and_probabilities_are_inverse(counts):
    found = groups.moments(counts)
    y = np.repeat([-1, -1, 1, 1], counts)
    a = np.repeat([-1, 1, -1, 1], counts)
    expected = (y.mean(), a.mean(), (y * a).mean() - y.mean() * a.mean())
    assert found == pytest.approx(expected, abs=1e-12)
    assert groups.probabilities(*found) == pytest.approx(groups.shares(counts), abs=1e-12)


@given(st.integers(0, 10_000), counts)
def test_largest_remainders(n, weights):
    share = groups.shares(weights)
    found = groups.split_counts(n, share)
    assert sum(found) == n
    assert all(abs(count - n * p) < 1 + 1e-6 for count, p in zip(found, share))
    # No entry with a smaller remainder was rounded up instead of one with a larger.
    up = [n * p % 1 for count, p in zip(found, share) if count > n * p + 1e-6]
    down = [n * p % 1 for count, p in zip(found, share) if count < n * p - 1e-6]
    if up and down:
        assert min(up) >= max(down) - 1e-6


def test_exact_shares_are_exact():
    assert groups.split_counts(3000, groups.probabilities(0, 0, 0.8)) == [1350, 150, 150, 1350]
    assert groups.split_counts(7, [0.25] * 4) == [2, 2, 2, 1]
