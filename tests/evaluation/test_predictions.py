"""Outputs of a network, batch by batch."""

import torch
from helpers import make_split, many_groups

from lab.evaluation import predictions


def test_outputs_in_batches_keep_the_order():
    split = make_split((5, 0, 7, 1), shape=(2, 2), dtype=torch.float32)

    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1)

    expected = split.inputs.flatten(1).sum(1)
    for size in (1, 3, 100):
        assert torch.equal(predictions.outputs(Sum(), split, size), expected)


def test_outputs_of_several_classes_in_batches():
    split = many_groups((5, 0, 7, 1, 2, 0), num_attributes=2)
    for size in (1, 4, 100):
        assert torch.equal(predictions.outputs(torch.nn.Identity(), split, size), split.inputs)
    plan = predictions.evaluation_plan(split, 4)
    sizes = [len(x) for _, _, x in predictions.batches(split, plan)]
    assert sizes == [4, 4, 4, 3]  # across the groups
