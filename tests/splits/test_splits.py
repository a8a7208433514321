"""Splits: groups by counts, any number of them, and the fingerprint of their content."""

import numpy as np
import pytest
import torch
from helpers import make_split, make_splits, many_groups

from lab.splits import groups
from lab.splits.composites import Composites
from lab.splits.splits import Split, Splits


def composites(n, seed=0):
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return Composites(digits, rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))


def test_groups_follow_from_the_counts():
    split = make_split((3, 0, 2, 4))
    assert torch.equal(split.group, groups.index(split.y, split.a))
    split = many_groups((2, 0, 1, 3, 0, 2), num_attributes=3)
    assert torch.equal(split.group, 3 * split.y + split.a)
    assert groups.class_cells(2, 3) == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    with pytest.raises(ValueError, match="moments of 6 groups"):
        _ = split.moments


def test_rows_of_the_table_of_counts():
    train = many_groups((2, 0, 1, 3), num_attributes=2)
    cells = groups.class_cells(2, 2)
    splits = Splits(train, train, ["cat, 0", "cat, 1", "dog, 0", "dog, 1"], train, cells=cells)
    rows = [row for row in splits.count_rows() if row["split"] == "train"]
    assert [(row["y"], row["a"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row["name"] for row in rows][2] == "dog, 0"
    assert [row["count"] for row in rows] == [2, 0, 1, 3]
    assert [(row["y"], row["a"]) for row in make_splits().count_rows()[:4]] == list(groups.GROUPS)


def test_the_target_set_is_evaluated_and_the_data_for_retraining_are_not():
    splits = make_splits()
    splits.target, splits.dfr = make_split((1, 1, 1, 1)), make_split((1, 2, 1, 1))
    assert list(splits.named()) == ["train", "test", "target", "dfr"]
    assert list(splits.evaluated()) == ["train", "test", "target"]
    assert splits.to("cpu").target.counts == [1, 1, 1, 1]


def test_further_evaluation_sets_are_evaluated_moved_and_distinguished():
    splits = make_splits()
    before = splits.fingerprint()
    splits.dfr = make_split((1, 2, 1, 1))
    splits.evaluation_sets = {
        "clean": make_split((2, 0, 2, 0)),
        "opposite": make_split((0, 2, 0, 2)),
    }
    splits.masks = torch.eye(4).bool()[:, None]
    assert list(splits.evaluated()) == ["train", "test", "clean", "opposite"]
    assert {row["split"] for row in splits.count_rows()} == {*splits.named()}
    changed = splits.changed(lambda name, split: split.subset(torch.arange(1), [1, 0, 0, 0]))
    assert [len(split) for split in changed.named().values()] == [1] * 5
    assert splits.evaluation_sets["clean"].counts == [2, 0, 2, 0]
    moved = splits.to("meta")
    assert moved.evaluation_sets["clean"].y.is_meta and moved.masks.is_meta and moved.dfr.a.is_meta
    found = {before, splits.fingerprint()}
    splits.evaluation_sets["clean"].y[0] *= -1
    found.add(splits.fingerprint())
    splits.evaluation_sets = dict(zip(("opposite", "clean"), splits.evaluation_sets.values()))
    found.add(splits.fingerprint())
    assert len(found) == 4


def test_the_minority_is_where_the_attribute_is_not_the_label_or_as_given():
    split = make_split((1, 2, 1, 1))
    assert split.in_minority.tolist() == [False, True, True, True, False]
    split.minority = (True, False, False, False)
    assert split.in_minority.tolist() == [True, False, False, False, False]
    assert split.to("cpu").minority == split.minority
    assert split.subset(torch.tensor([4]), [0, 0, 0, 1]).in_minority.tolist() == [False]
    lazy = Split(composites(5), torch.ones(5), torch.ones(5), [0, 0, 0, 5], split.minority)
    assert lazy.augmented(3).minority == split.minority


def test_subsets_and_augmentation_of_lazy_inputs():
    split = Split(composites(5), torch.ones(5), torch.ones(5), [0, 0, 0, 5])
    few = split.subset(torch.tensor([1, 4]), [0, 0, 0, 2])
    assert torch.equal(few.inputs[:], split.inputs[:][[1, 4]])
    changed = split.augmented(3)
    assert torch.equal(changed.inputs[:], split.inputs.augmented(3)[:])
    assert changed.y is split.y and split.inputs.shifts is None
    tensors = make_split((1, 1, 1, 1))
    assert tensors.augmented(3) is tensors


def changes():
    """(what, change(splits)) for everything that the fingerprint must tell apart."""

    def flip(name, attribute):
        def change(splits):
            getattr(getattr(splits, name), attribute)[2] *= -1

        return change

    def nudge(splits):
        values = splits.test.inputs.view(-1)
        values[5] = torch.nextafter(values[5], values[5] + 1)

    def swap(splits):
        splits.train, splits.test = splits.test, splits.train

    def recount(splits):
        splits.train.counts = [11, 6, 4, 9]

    def shorten(splits):
        splits.test = splits.test.subset(torch.arange(20), [6, 5, 7, 2])

    def add(splits):
        splits.val = splits.test

    def rename(splits):
        splits.target, splits.val = splits.test, None

    def half(splits):
        splits.test.inputs = splits.test.inputs.float()

    def reshape(splits):
        splits.test.inputs = splits.test.inputs.view(-1, 7, 1)

    def lazily(splits):
        splits.train.inputs = composites(30)

    def lazily_other(splits):
        splits.train.inputs = composites(30, seed=1)

    flips = {f"{n}.{k}": flip(n, k) for n in ("train", "test") for k in ("y", "a", "inputs")}
    others = (nudge, swap, recount, shorten, add, rename, half, reshape, lazily, lazily_other)
    return flips | {change.__name__: change for change in others}


def test_the_fingerprint_changes_with_everything():
    found = {"nothing": make_splits().fingerprint()}
    assert make_splits().fingerprint() == found["nothing"]
    for what, change in changes().items():
        splits = make_splits()
        change(splits)
        found[what] = splits.fingerprint()
    assert len(set(found.values())) == len(found), found
    assert all(len(value) == 64 for value in found.values())


def test_the_fingerprint_needs_no_contiguous_tensors():
    splits = make_splits()
    before = splits.fingerprint()
    splits.train.inputs = splits.train.inputs.T.contiguous().T
    assert not splits.train.inputs.is_contiguous()
    assert splits.fingerprint() == before


def test_splits_by_name():
    parts = {name: make_split((1, 2, 1, 1)) for name in ("train", "test", "val", "clean")}
    splits = Splits.from_named(parts, group_names=list("abcd"), facts={"source": "made up"})
    assert list(splits.named()) == ["train", "test", "val", "clean"]
    assert splits.evaluation_sets == {"clean": parts["clean"]}
    assert splits.dfr is None and splits.samples == {} and splits.facts == {"source": "made up"}
