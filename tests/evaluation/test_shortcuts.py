"""δ of task × attribute pairs and what is made of it, against what is obviously right."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lab.evaluation import shortcuts


def slow_delta(correct, counts) -> float:
    """The definition, one group after the other."""
    shrunk = []
    for group in range(4):
        partner = group ^ 1  # the class's other group
        if not counts[group] + counts[partner]:
            return math.nan
        of_class = (correct[group] + correct[partner]) / (counts[group] + counts[partner])
        if not counts[group]:
            shrunk.append(of_class)
            continue
        z = stats.norm.ppf(0.975)
        n = counts[group] + z**2
        p = (correct[group] + z**2 / 2) / n
        low, high = (p + sign * z * math.sqrt(p * (1 - p) / n) for sign in (-1, 1))
        if low <= of_class <= high:
            shrunk.append(of_class)
        else:
            shrunk.append(low if abs(low - of_class) < abs(high - of_class) else high)
    return 100 * abs(shrunk[0] + shrunk[3] - shrunk[1] - shrunk[2])


group = st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(st.lists(group, min_size=4, max_size=4))
def test_delta_is_its_definition(tallies):
    correct, counts = zip(*tallies)
    found = shortcuts.delta(correct, counts)
    assert found == pytest.approx(slow_delta(correct, counts), abs=1e-4, nan_ok=True)


@given(st.lists(group, min_size=4, max_size=4))
def test_a_shrunk_accuracy_is_between_the_group_s_and_the_class_s(tallies):
    correct, counts = np.array(tallies).T
    found = shortcuts.shrunk(correct, counts)
    for g in range(4):
        pair = [g, g ^ 1]
        if not counts[pair].sum():
            assert math.isnan(found[g])
            continue
        own = correct[g] / counts[g] if counts[g] else found[g]
        ends = sorted([own, correct[pair].sum() / counts[pair].sum()])
        assert ends[0] - 1e-12 <= found[g] <= ends[1] + 1e-12


def test_delta_by_hand():
    # Large groups keep their accuracies but for the interval: 1, 0, 0, 1 of many is nearly 200.
    assert shortcuts.delta([10**6, 0, 0, 10**6], [10**6] * 4) == pytest.approx(200, abs=1e-2)
    # All as good as their class.
    assert shortcuts.delta([90, 9, 40, 4], [100, 10, 50, 5]) == 0
    # One sample says nothing: its interval holds any class accuracy from 0.21 on.
    assert shortcuts.delta([95, 0, 50, 50], [100, 1, 100, 100]) > 0
    assert shortcuts.delta([95, 1, 50, 50], [100, 1, 100, 100]) == 0
    # No sample says no more than one: δ does not jump where a group becomes empty.
    assert shortcuts.delta([95, 0, 50, 80], [100, 0, 100, 100]) == pytest.approx(
        shortcuts.delta([95, 1, 50, 80], [100, 1, 100, 100]), abs=0.1
    )
    assert shortcuts.delta([95, 0, 50, 80], [100, 0, 100, 100]) > 5
    assert math.isnan(shortcuts.delta([0, 0, 9, 9], [0, 0, 10, 10]))


def test_the_interval_is_the_published_one():
    """0 of 10 and 5 of 10: computed by hand from the formula with z² = 3.841459."""
    low, high = shortcuts.interval([0, 5], [10, 10])
    n = 13.841459
    p = 1.9207295 / n
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    assert (low[0], high[0]) == (pytest.approx(p - half), pytest.approx(p + half))
    assert low[1] + high[1] == pytest.approx(1)
    assert high[1] == pytest.approx(0.5 + 1.959964 * 0.5 / math.sqrt(n))


def test_tallies_against_a_loop():
    rng = np.random.default_rng(0)
    attributes = np.where(rng.random((200, 5)) < 0.3, 1, -1).astype(np.int8)
    right, label = rng.random(200) < 0.7, attributes[:, 2]
    correct, counts = shortcuts.tallies(right, label, attributes)
    for k in range(5):
        for g, (y, a) in enumerate([(-1, -1), (-1, 1), (1, -1), (1, 1)]):
            members = (label == y) & (attributes[:, k] == a)
            assert counts[k, g] == members.sum()
            assert correct[k, g] == right[members].sum()
    assert counts[2, 1] == counts[2, 2] == 0  # a task with itself
    assert shortcuts.deltas(correct, counts)[2] == 0


T = np.array([[np.nan, 50.0, 1.0], [40.0, np.nan, 50.0], [0.0, 33.0, np.nan]])


def test_pairs_above_a_threshold():
    assert shortcuts.pairs(T, 33) == [(1, 0), (2, 1), (0, 1)]  # (task, attribute), ties by task
    assert shortcuts.pairs(T, 100) == []


def test_rows_are_standardised_and_cosines_are_those():
    Z = shortcuts.standardised(T)
    assert Z.mean(axis=1) == pytest.approx(np.zeros(3), abs=1e-12)
    assert Z.std(axis=1) == pytest.approx(np.ones(3))
    assert not shortcuts.standardised(np.full((2, 2), 7.0)).any()
    filled = np.nan_to_num(T)
    C = shortcuts.cosines(T, T.T)
    for i in range(3):
        for j in range(3):
            a, b = filled[i], filled[:, j]
            assert C[i, j] == pytest.approx(a @ b / math.sqrt(a @ a * (b @ b)))
    assert not shortcuts.cosines(np.zeros((1, 3)), T).any()


def test_coclusters_find_blocks():
    blocks = np.kron(np.eye(3), np.ones((4, 4))) + 0.01 * np.random.default_rng(0).random((12, 12))
    shuffled = np.random.default_rng(1).permutation(12)
    rows, columns = shortcuts.coclusters(blocks[shuffled] - 5, 3, seed=2**40)
    truth = np.repeat(range(3), 4)
    for cluster in range(3):
        (block,) = set(truth[shuffled][rows == cluster])
        assert set(truth[columns == cluster]) == {block}
    assert shortcuts.coclusters(np.ones((4, 4)), 2, seed=0) is None


def test_directions_reach_their_share():
    rng = np.random.default_rng(0)
    matrix = rng.random((6, 2)) @ rng.random((2, 6)) + 0.01 * rng.random((6, 6))
    squares = np.linalg.eigvalsh(shortcuts.unit_rows(matrix) @ shortcuts.unit_rows(matrix).T)[::-1]
    for gamma in (0.1, 0.5, 0.9, 0.99, 0.999999, 1.0):
        vectors, sigma, d = shortcuts.directions(matrix, gamma)
        assert sigma**2 == pytest.approx(squares, abs=1e-12)
        assert vectors.shape == (6, d)
        assert squares[:d].sum() >= gamma * squares.sum() - 1e-9
        assert d == 1 or squares[: d - 1].sum() < gamma * squares.sum()
    assert shortcuts.directions(np.full((3, 3), np.nan), 0.9)[2] == 0


def test_clusters_of_vectors():
    vectors = np.repeat([[0.0, 1.0], [1.0, 0.0]], 3, axis=0)
    found = shortcuts.clusters(vectors, 2, seed=0)
    assert len(set(found[:3])) == len(set(found[3:])) == 1
    assert found[0] != found[3]
    assert shortcuts.clusters(np.zeros((4, 0)), 2, seed=0) is None


def test_neither_torch_nor_sklearn_is_imported():
    code = (
        "import sys; from lab.evaluation import shortcuts; "
        "print({'torch', 'sklearn'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr


def test_copies_of_a_task_are_recognised():
    counts = [[[5, 0, 0, 7], [0, 5, 7, 0]], [[5, 1, 0, 7], [5, 0, 7, 0]]]
    assert shortcuts.copies(counts).tolist() == [[1, -1], [0, 0]]
