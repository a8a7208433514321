"""What every data set has to keep to, checked on what it gives: a plugin's above all."""

from collections.abc import Iterator
from typing import Any

import torch

from lab.splits.splits import Split, Splits

DIMENSIONS = {"vectors": (2, "(N, d)"), "pictures": (4, "(N, C, H, W)")}


def problems(splits: Any, inputs: str) -> Iterator[str]:
    """One line for each way in which these are no splits as `lab.splits.splits` describes them.

    inputs: "pictures" or "vectors", what the record of the data set says.
    """
    if not isinstance(splits, Splits):
        yield f"its code gives a {type(splits).__name__}; allowed: lab.splits.splits.Splits"
        return
    groups = len(splits.cells)
    if len(splits.group_names) != groups:
        yield f"group_names has {len(splits.group_names)} names; allowed: one for each of {groups}"
    for name, split in splits.named().items():
        yield from (f"{name}: {problem}" for problem in _of_split(split, splits, inputs))


def _of_split(split: Split, splits: Splits, inputs: str) -> Iterator[str]:
    counts = split.counts
    sizes = {"y": len(split.y), "a": len(split.a), "inputs": len(split.inputs)}
    if len(counts) != len(splits.cells):
        yield f"counts has {len(counts)} numbers; allowed: one for each of {len(splits.cells)}"
    elif any(size != sum(counts) for size in sizes.values()):
        shown = ", ".join(f"{what} has {size}" for what, size in sizes.items())
        yield f"counts add up to {sum(counts)} samples, but {shown}"
    elif split.y.dim() == 1:
        for what, values, place in (("y", split.y, 0), ("a", split.a, 1)):
            expected = torch.tensor([cell[place] for cell in splits.cells])[split.group.cpu()]
            wrong = (values.cpu() != expected).nonzero()
            if len(wrong):
                i = int(wrong[0])
                g = int(split.group[i])
                yield (
                    f"{what} of sample {i} is {values[i].item():g}, in the place of group {g}, "
                    f"{splits.group_names[g]}, where {what} is {int(expected[i])}; samples are "
                    "stored group by group, in the order of counts and cells"
                )
                return
    if isinstance(split.inputs, torch.Tensor):
        yield from _of_inputs(split.inputs, inputs)


def _of_inputs(values: torch.Tensor, inputs: str) -> Iterator[str]:
    dimensions, shape = DIMENSIONS[inputs]
    if values.dtype != torch.float32:
        yield f"inputs are {values.dtype}; allowed: torch.float32"
    if values.dim() != dimensions:
        yield f"inputs have the shape {tuple(values.shape)}; allowed for {inputs}: {shape}"
    elif not torch.isfinite(values).all():
        sample = int((~torch.isfinite(values.flatten(1))).any(1).nonzero()[0])
        yield f"the input of sample {sample} is not finite"
