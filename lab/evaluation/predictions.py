"""Batches of a split, and a network's outputs on it.

Evaluation and analyses share their batches, so that they see exactly the same outputs.
"""

from collections.abc import Iterable, Iterator

import torch

from lab.splits.splits import Split


def group_batches(split: Split, batch_size: int, model=None) -> Iterator[tuple[int, slice]]:
    """Yields (group, slice): the split in batches of one group each, in the split's order.

    Batches are smaller than `batch_size` where pictures, or networks for them, limit their memory.
    """
    batch_size = _limited(split, batch_size, model)
    for group, part in enumerate(split.slices):
        for start in range(part.start, part.stop, batch_size):
            yield group, slice(start, min(start + batch_size, part.stop))


def evaluation_plan(split: Split, batch_size: int, model=None) -> list[tuple[int | None, slice]]:
    """The batches in which a split is evaluated, in its order, as a plan for `batches`.

    Those of `group_batches`, which the analyses use as well. With more than four groups, of which
    there are no analyses, batches contain several groups: most of these may be small.
    """
    if len(split.counts) <= 4:
        return list(group_batches(split, batch_size, model))
    batch_size = _limited(split, batch_size, model)
    return [(None, slice(i, i + batch_size)) for i in range(0, len(split), batch_size)]


def batches(split: Split, plan: Iterable) -> Iterator[tuple]:
    """Yields (tag, index, inputs[index]) for pairs (tag, index), in order.

    The way to iterate over a split: pictures are decoded ahead of use.
    """
    plan = list(plan)
    inputs, indices = split.inputs, [index for _, index in plan]
    if isinstance(inputs, torch.Tensor):
        loaded: Iterator[torch.Tensor] = map(inputs.__getitem__, indices)
    else:
        loaded = inputs.batches(indices)
    for (tag, index), x in zip(plan, loaded):
        yield tag, index, x


@torch.no_grad()
def outputs(model, split: Split, batch_size: int) -> torch.Tensor:
    """Outputs f, (N,) or (N, C), of a network in evaluation mode, in batches of `batch_size`."""
    model.eval()
    plan = evaluation_plan(split, batch_size, model)
    return torch.cat([model(x) for _, _, x in batches(split, plan)])


def _limited(split: Split, batch_size: int, model) -> int:
    """The batch size, or the smaller limit of the inputs or of the network."""
    limits = [getattr(limited, "max_batch", batch_size) for limited in (split.inputs, model)]
    return min(batch_size, *limits)
