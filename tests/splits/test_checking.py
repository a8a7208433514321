"""What a data set gives is checked: shapes, types, the order of the samples."""

from dataclasses import replace

import pytest
import torch
from helpers import make_splits

from lab.splits import checking


def single():
    return make_splits(dtype=torch.float32)


def found(splits, inputs="vectors"):
    return list(checking.problems(splits, inputs))


def test_splits_as_they_have_to_be():
    assert found(single()) == []


def with_train(**changes):
    splits = single()
    return replace(splits, train=replace(splits.train, **changes))


def changed(values, i, value):
    values = values.clone()
    values[i] = value
    return values


TRAIN = single().train
SHUFFLED = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(0))
WRONG = {
    "its code gives a NoneType": lambda: None,
    "group_names has 2 names": lambda: replace(single(), group_names=["a", "b"]),
    "train: counts has 3 numbers": lambda: with_train(counts=[12, 5, 13]),
    "train: counts add up to 31 samples, but y has 30": lambda: with_train(counts=[12, 5, 4, 10]),
    "train: y of sample 0 is 0, in the place of group 0": lambda: with_train(y=(TRAIN.y + 1) / 2),
    "stored group by group": lambda: with_train(y=TRAIN.y[SHUFFLED], a=TRAIN.a[SHUFFLED]),
    "train: a of sample 3": lambda: with_train(a=changed(TRAIN.a, 3, 1)),
    "train: inputs are torch.float64": lambda: with_train(inputs=TRAIN.inputs.double()),
    "allowed for vectors: (N, d)": lambda: with_train(inputs=torch.zeros(30, 1, 4, 4)),
    "the input of sample 7": lambda: with_train(inputs=changed(TRAIN.inputs, (7, 2), torch.nan)),
}


@pytest.mark.parametrize("problem", WRONG)
def test_each_fault_is_named(problem):
    (line,) = found(WRONG[problem]())
    assert problem in line


def test_vectors_are_no_pictures():
    assert len(found(single(), "pictures")) == 2  # of both splits
