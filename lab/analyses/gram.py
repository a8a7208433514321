"""What the gradient flow does to the gap between groups, from one small Gram matrix.

For group g let R_g be the mean loss, ∇_g = ∇R_g its gradient over all trainable parameters, and
m_g = E_g[∇f] the mean Jacobian of the scalar output f. Stack the eight vectors of a split to
V ∈ R^{8×P}. Every analysis here is bilinear in V, so it needs only K = V Vᵀ. With training and
test stacked (16×16), the flow of the test gap under the training gradient is exact, too.

How K is computed. Both kinds of rows are Σ_i w_i ∇f_i over the samples of a group: ∇_g takes the
weights ℓ'(f,y)/n_g and m_g takes 1/n_g. K adds up over parameter tensors and over output units of
a tensor, not over batches: what is kept over the batches are the sums of the eight rows, never a
gradient per sample. In an MLP a layer z = c·W h + c_b·b has the gradient c·Σ_i w_i s_i h_iᵀ with
the sensitivities s = ∂f/∂z: one forward and one backward pass of Σ f give h and s of every sample,
and each kind of row is one matrix product. Other networks take one backward pass for each kind.

The network is in evaluation mode: the gradients are those of the function that is evaluated, in
which batch norm has its running statistics, and measuring leaves these as they are.

Empty groups have rows of NaN; a quantity is NaN when it gives a weight to one of them.
"""

import math
from typing import Any

import numpy as np
import torch

from lab.evaluation import metrics, predictions
from lab.evaluation.losses import Loss
from lab.networks.mlp import MLP
from lab.splits import groups
from lab.splits.splits import Split

GRADIENT, JACOBIAN = 0, 1  # the two kinds of rows: ∇_g and m_g
SIDES = ("train", "test")
ROWS = 8  # rows of K per side: four ∇_g, then four m_g
COLUMNS = 1 << 13  # of V at a time for the products in float64: what fits into the cache


def labels() -> list[str]:
    """Names of the 16 rows of K, such as `train/gradient/G(-1,+1)`."""
    return [
        f"{side}/{kind}/{groups.name(g)}"
        for side in SIDES
        for kind in ("gradient", "jacobian")
        for g in range(4)
    ]


def gram_matrix(model, splits, loss: Loss, kinds, batch_size: int, memory_bytes: float = 1e9):
    """K = V Vᵀ and the outputs, for splits {"train": split, "test": split} or one of them.

    Returns (K, outputs): K (16, 16) float64 in the order of `labels()`, NaN where a split, a
    kind of row or a group is missing; outputs {side: f (N,)} in the order of each split.

    kinds: which of GRADIENT and JACOBIAN are wanted. Memory: the sums take rows × P numbers of
    the network's type; above `memory_bytes` they are formed in slices, of output units in an MLP
    and of whole parameter tensors in other networks, one more pass over the data per slice.
    """
    model.eval()
    kinds, sides = sorted(kinds), [side for side in SIDES if side in splits]
    shape = (len(sides), 4, len(kinds))
    rows = math.prod(shape)
    sums_of: Any
    if isinstance(model, MLP):
        layers = [layer for layer in model.layers if layer.weight.requires_grad]
        passes, sums_of = _passes(layers, rows, memory_bytes), _SliceSums
        accumulate = _accumulate
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        passes, sums_of = _tensor_passes(parameters, rows, memory_bytes), _TensorSums
        accumulate = _accumulate_by_autograd
    sums = np.zeros((rows, rows))
    outputs = {}
    for chunk in passes:
        parts = [sums_of(*item, shape) for item in chunk]
        for i, side in enumerate(sides):
            outputs[side] = accumulate(
                model, splits[side], parts, loss, kinds, batch_size, side_index=i
            )
        for part in parts:
            sums += part.gram()
        del parts, part  # before the next ones take their memory

    # From (side, group, kind) to the order of the labels, divided by the group sizes.
    places, sizes = [], []
    for side in sides:
        for g in range(4):
            for kind in kinds:
                places.append(ROWS * SIDES.index(side) + 4 * kind + g)
                sizes.append(splits[side].counts[g] or math.nan)
    K = np.full((2 * ROWS, 2 * ROWS), np.nan)
    K[np.ix_(places, places)] = sums / np.outer(sizes, sizes)
    return K, outputs


def _passes(layers, rows: int, memory_bytes: float):
    """Cuts the layers' output units into passes whose sums fit into the memory.

    Yields lists of (layer, slice of output units).
    """
    chunk: list[tuple] = []
    left = memory_bytes
    for layer in layers:
        units, inputs = layer.weight.shape
        cost = rows * (inputs + (layer.bias is not None)) * layer.weight.element_size()
        start = 0
        while start < units:
            fitting = int(left // cost)
            if fitting < 1 and chunk:
                yield chunk
                chunk, left = [], memory_bytes
                continue
            stop = min(units, start + max(fitting, 1))
            chunk.append((layer, slice(start, stop)))
            left -= (stop - start) * cost
            start = stop
    if chunk:
        yield chunk


def _tensor_passes(parameters, rows: int, memory_bytes: float):
    """The same for whole parameter tensors: yields lists of (parameter,)."""
    chunk: list[tuple] = []
    left = memory_bytes
    for parameter in parameters:
        cost = rows * parameter.numel() * parameter.element_size()
        if cost > left and chunk:
            yield chunk
            chunk, left = [], memory_bytes
        chunk.append((parameter,))
        left -= cost
    if chunk:
        yield chunk


class _SliceSums:
    """Sums over samples of the gradients of some output units of a layer.

    weight: (sides, groups, kinds, units, inputs); bias: (sides, groups, kinds, units) or None.
    """

    def __init__(self, layer, units: slice, shape):
        self.layer, self.units = layer, units
        self.h = self.z = None
        count = units.stop - units.start
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.weight = torch.zeros(*shape, count, layer.weight.shape[1], **options)
        self.bias = None if layer.bias is None else torch.zeros(*shape, count, **options)

    def add(self, side: int, group: int, kind: int, s, h) -> None:
        """Add Σ s_i h_iᵀ over a batch of one group: s (B, units), h (B, inputs)."""
        self.weight[side, group, kind].addmm_(s.t(), h)
        if self.bias is not None:
            self.bias[side, group, kind] += s.sum(0)

    def gram(self) -> np.ndarray:
        """This slice's share of K before the division by group sizes, in float64."""
        multiplier = self.layer.weight_scaling.multiplier
        result = _self_product(self.weight.flatten(0, 2).flatten(1)) * multiplier**2
        if self.bias is not None:
            multiplier = self.layer.bias_scaling.multiplier
            result += _self_product(self.bias.flatten(0, 2)) * multiplier**2
        return result


class _TensorSums:
    """Sums over samples of the gradients of a parameter tensor.

    gradients: (sides, groups, kinds, *shape of the parameter).
    """

    def __init__(self, parameter, shape):
        self.parameter = parameter
        options = {"device": parameter.device, "dtype": parameter.dtype}
        self.gradients = torch.zeros(*shape, *parameter.shape, **options)

    def gram(self) -> np.ndarray:
        """This tensor's share of K before the division by group sizes, in float64."""
        return _self_product(self.gradients.flatten(3).flatten(0, 2))


def _self_product(rows: torch.Tensor) -> np.ndarray:
    """V Vᵀ in float64 for V (rows, P), without a second copy of V."""
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(COLUMNS, dim=1):
        block = metrics.float64(columns)
        result += (block @ block.t()).cpu()
    return result.numpy()


def _accumulate(model, split: Split, parts, loss: Loss, kinds, batch_size: int, side_index: int):
    """One pass over a split: adds every batch to the sums and returns the outputs f (N,)."""
    wanted = list({id(part.layer): part.layer for part in parts}.values())
    inputs, outputs = {}, {}

    def remember(layer, args, z):
        inputs[layer], outputs[layer] = args[0].detach(), z

    hooks = [layer.register_forward_hook(remember) for layer in wanted]
    try:
        collected = []
        plan = predictions.group_batches(split, batch_size, model)
        for group, batch, x in predictions.batches(split, plan):
            with torch.enable_grad():
                f = model(x)
                sensitivities = torch.autograd.grad(f.sum(), [outputs[layer] for layer in wanted])
            f = f.detach()
            collected.append(f)
            derivative = loss.derivative(f, split.y[batch])[:, None]
            for layer, s in zip(wanted, sensitivities):
                for k, kind in enumerate(kinds):
                    weighted = s * derivative if kind == GRADIENT else s
                    for part in parts:
                        if part.layer is layer:
                            part.add(side_index, group, k, weighted[:, part.units], inputs[layer])
        return torch.cat(collected)
    finally:
        for hook in hooks:
            hook.remove()


def _accumulate_by_autograd(
    model, split: Split, parts, loss: Loss, kinds, batch_size: int, side_index: int
):
    """`_accumulate` for a network of any layers: one backward pass for each kind of row."""
    parameters = [part.parameter for part in parts]
    collected = []
    plan = predictions.group_batches(split, batch_size, model)
    for group, batch, x in predictions.batches(split, plan):
        with torch.enable_grad():
            f = model(x)
        collected.append(f.detach())
        for k, kind in enumerate(kinds):
            weights = torch.ones_like(f)
            if kind == GRADIENT:
                weights = loss.derivative(f.detach(), split.y[batch])
            # A parameter that f does not depend on has the gradient 0.
            gradients = torch.autograd.grad(
                f, parameters, weights, retain_graph=kind != kinds[-1], materialize_grads=True
            )
            for part, gradient in zip(parts, gradients):
                part.gradients[side_index, group, k] += gradient
    return torch.cat(collected)
