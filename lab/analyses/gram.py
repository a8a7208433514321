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

import numpy as np
import torch

from lab.config.facts import ANALYSES
from lab.config.schema import Config, derive_seed
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOSSES, Loss
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
    chunk, left = [], memory_bytes
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
    chunk, left = [], memory_bytes
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


def _rows(side: str, kind: int, weights) -> np.ndarray:
    """Coefficients (16,) of Σ_g weights_g ∇_g (or m_g) of a side."""
    u = np.zeros(2 * ROWS)
    start = ROWS * SIDES.index(side) + 4 * kind
    u[start : start + 4] = weights
    return u


def product(K: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """⟨Σ u_i V_i, Σ v_j V_j⟩ = uᵀ K v over the rows that have a weight.

    Rows without a weight do not count even where K is NaN (empty groups). A weight on such a row,
    or a weight that is NaN itself, makes the product NaN, even with a combination that is zero.
    """
    i, j = np.flatnonzero(u), np.flatnonzero(v)
    undefined = np.isnan([*u, *v, *K.diagonal()[i], *K.diagonal()[j]]).any()
    if undefined:
        return math.nan
    return float(u[i] @ K[np.ix_(i, j)] @ v[j])


def norm_squared(K: np.ndarray, u: np.ndarray) -> float:
    """‖Σ u_i V_i‖², clipped to 0 where rounding makes it negative."""
    return float(np.maximum(product(K, u, u), 0.0))


def norm(K: np.ndarray, u: np.ndarray) -> float:
    """‖Σ u_i V_i‖."""
    return math.sqrt(norm_squared(K, u))


def cosine(K: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """Cosine of two combinations of rows; NaN when one has norm 0."""
    norms = norm(K, u) * norm(K, v)
    return float(np.clip(product(K, u, v) / norms, -1, 1)) if norms != 0 else math.nan


def _unit(g: int) -> np.ndarray:
    return np.eye(4)[g]


def _basis(side: str, kind: int, counts) -> dict[str, np.ndarray]:
    """Walsh-Hadamard combinations ¼Σ, ¼Σy, ¼Σa, ¼Σya of a side; NaN when a group is empty."""
    scale = 0.25 if min(counts) > 0 else math.nan
    signs = {"inv": np.ones(4), "Y": Y, "A": A, "AY": A * Y}
    return {name: _rows(side, kind, sign * scale) for name, sign in signs.items()}


def gradient_basis(K: np.ndarray, side: str, counts) -> dict[str, float]:
    """Norms and cosines of v_inv, v_Y, v_A, v_AY: ¼Σ∇_g, ¼Σy∇_g, ¼Σa∇_g, ¼Σya∇_g.

    They are the Walsh-Hadamard transform of the group gradients, in which
    ∇R = v_inv + ȳ v_Y + ā v_A + (ρ + ȳā) v_AY.
    """
    basis = _basis(side, GRADIENT, counts)
    names = list(basis)
    result = {f"norm_{name}": norm(K, basis[name]) for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            result[f"cosine_{first}_{second}"] = cosine(K, basis[first], basis[second])
    return result


def gap_dynamics_factors(
    K: np.ndarray, pair, gap_side: str, flow_side: str, counts, flow_weights
) -> dict[str, float]:
    """Split of d/dt (R_g1 - R_g2) = ⟨∇_g2 - ∇_g1, ∇R⟩ = ⟨Δ, ∇R⟩ for a pair (g1, g2).

    term1 = ⟨Δ, v_inv⟩: what is left without any bias; term2 = ⟨Δ, ȳ v_Y + ā v_A + ȳā v_AY⟩:
    marginal imbalance; term3 = ⟨Δ, ρ v_AY⟩: the spurious correlation. They add up to `total`.
    `method_total` = ⟨Δ, Σ w_g ∇_g⟩ for the flow weights of the run's own method.

    Δ comes from `gap_side`, ∇R and the moments (from `counts`) from `flow_side`.
    """
    g1, g2 = pair
    delta = _rows(gap_side, GRADIENT, _unit(g2) - _unit(g1))
    basis = _basis(flow_side, GRADIENT, counts)
    y_mean, a_mean, covariance = groups.moments(counts)
    marginal = y_mean * basis["Y"] + a_mean * basis["A"] + y_mean * a_mean * basis["AY"]
    return {
        "term1": product(K, delta, basis["inv"]),
        "term2": product(K, delta, marginal),
        "term3": product(K, delta, covariance * basis["AY"]),
        "total": product(K, delta, _rows(flow_side, GRADIENT, groups.shares(counts))),
        "method_total": product(K, delta, _rows(flow_side, GRADIENT, flow_weights)),
    }


def static_dynamic_decomposition(
    K: np.ndarray, pair, gap_side: str, flow_side: str, counts, loss: Loss
) -> dict[str, float]:
    """Static and dynamic parts of ⟨Δ, ∇R⟩ for a pair (minority, majority), Δ = ∇_maj - ∇_min.

    Every ∇_g = static c₀(y)·m_g + dynamic rest, with c₀(y) = ∂ℓ/∂f at f = 0. TermA =
    ⟨Δ_static, ∇R_static⟩, TermB the two mixed products, TermC = ⟨Δ_dynamic, ∇R_dynamic⟩.
    """
    at_zero = loss.at_zero(Y)

    def parts(side, weights):
        whole = _rows(side, GRADIENT, weights)
        static = _rows(side, JACOBIAN, weights * at_zero)
        return whole, static, whole - static

    minority, majority = pair
    delta, delta_static, delta_dynamic = parts(gap_side, _unit(majority) - _unit(minority))
    flow, flow_static, flow_dynamic = parts(flow_side, np.array(groups.shares(counts)))
    return {
        "TermA": product(K, delta_static, flow_static),
        "TermB": product(K, delta_static, flow_dynamic) + product(K, delta_dynamic, flow_static),
        "TermC": product(K, delta_dynamic, flow_dynamic),
        "total": product(K, delta, flow),
    }


def jacobian_norm(K: np.ndarray, side: str, counts) -> dict[str, float]:
    """Norms and angles of the mean Jacobians m_g and of their contrasts.

    Δ_S = ½Σ a·m_g (attribute) and Δ_L = ½Σ y·m_g (label); m_A = Δ_S/2, m_Y = Δ_L/2.
    """
    single = [_rows(side, JACOBIAN, _unit(g)) for g in range(4)]
    basis = _basis(side, JACOBIAN, counts)
    m_A, m_Y = basis["A"], basis["Y"]
    delta_S, delta_L = 2 * m_A, 2 * m_Y
    result = {f"norm_sq_{groups.name(g)}": norm_squared(K, single[g]) for g in range(4)}
    for i in range(4):
        for j in range(i + 1, 4):
            name = groups.pair_name(i, j)
            result[f"dot_{name}"] = product(K, single[i], single[j])
            result[f"cosine_{name}"] = cosine(K, single[i], single[j])
            result[f"dist_sq_{name}"] = norm_squared(K, single[i] - single[j])
    norm_S, norm_L = norm(K, delta_S), norm(K, delta_L)
    return result | {
        "norm_Delta_S": norm_S,
        "norm_Delta_L": norm_L,
        "ratio_Delta_S_L": norm_S / norm_L if norm_L != 0 else math.nan,
        "dot_Delta_S_Delta_L": product(K, delta_S, delta_L),
        "cosine_Delta_S_Delta_L": cosine(K, delta_S, delta_L),
        "norm_sq_m_A": norm_squared(K, m_A),
        "norm_sq_m_Y": norm_squared(K, m_Y),
        "dot_m_A_m_Y": product(K, m_A, m_Y),
    }


def model_output_expectation(f: torch.Tensor, split: Split) -> dict[str, float]:
    """Mean and standard deviation (n - 1) of the output f (N,) in each group."""
    f = metrics.float64(f)
    result = {}
    for g, part in enumerate(split.slices):
        values = f[part]
        result[f"mean_{groups.name(g)}"] = values.mean().item() if len(values) else math.nan
        result[f"std_{groups.name(g)}"] = values.std().item() if len(values) > 1 else math.nan
    return result


def capped(split: Split, samples: int | None, seed: int) -> Split:
    """A random subset with at most `samples` of each group; the split itself when that is all."""
    if samples is None or max(split.counts) <= samples:
        return split
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for part in split.slices:
        order = torch.randperm(part.stop - part.start, generator=generator)
        chosen.append(part.start + order[:samples].sort().values)
    index = torch.cat(chosen).to(split.y.device)
    counts = [len(indices) for indices in chosen]
    return split.subset(index, counts)


@dataclass
class Measurement:
    """What one checkpoint's passes over the data gave.

    K: Gram matrix on the samples of all analyses but the Jacobian norms, K_jacobian on those of
    the Jacobian norms (the same matrix when the samples are the same); outputs: f of the whole
    splits where a pass covered them; expectation_outputs: f on the samples of K.
    """

    epoch: int
    due: set
    K: np.ndarray | None
    K_jacobian: np.ndarray | None
    outputs: dict
    expectation_outputs: dict


class Analyses:
    """The analyses of a run: which are due, on which samples, and their rows."""

    def __init__(self, config: Config, splits: Splits):
        self.config = config
        self.loss = LOSSES[config.loss_function]
        target = config.analysis_target
        self.sides = [side for side in SIDES if target in (side, "both")]
        self.splits = {side: getattr(splits, side) for side in self.sides}
        self.samples = self._capped(config.gradient_gram_num_samples)
        self.jacobian_samples = self.samples
        if config.jacobian_num_samples != config.gradient_gram_num_samples:
            self.jacobian_samples = self._capped(config.jacobian_num_samples)
        # Caps that exceed every group leave the splits as they are; then one pass serves all.
        self.one_pass = all(self.samples[s] is self.jacobian_samples[s] for s in self.sides)
        self.flows = [(side, side, side) for side in self.sides]
        if target == "both":
            self.flows.append(("test_under_train", "test", "train"))

    def _capped(self, samples):
        seed = self.config.seed
        return {
            side: capped(split, samples, derive_seed(seed, "analysis samples", side))
            for side, split in self.splits.items()
        }

    def due(self, epoch: int) -> set[str]:
        """Names of the analyses to be made at this epoch."""
        due = set()
        for name in ANALYSES:
            epochs = getattr(self.config, f"{name}_analysis_epochs")
            if getattr(self.config, f"analyze_{name}") and (epochs is None or epoch in epochs):
                due.add(name)
        return due

    def measure(self, model, epoch: int) -> Measurement:
        """One forward and one backward pass over the samples of the analyses that are due."""
        due = self.due(epoch)
        rows, jacobian_rows = set(), set()
        if due & {"gradient_basis", "gap_dynamics_factors", "static_dynamic_decomposition"}:
            rows.add(GRADIENT)
        if "static_dynamic_decomposition" in due:
            rows.add(JACOBIAN)
        if "jacobian_norm" in due:
            jacobian_rows.add(JACOBIAN)
        if self.one_pass:
            rows |= jacobian_rows
            jacobian_rows = set()

        K, f = self._gram(model, self.samples, rows)
        K_jacobian, jacobian_f = self._gram(model, self.jacobian_samples, jacobian_rows)
        if "model_output_expectation" in due and not f:
            size = self.config.eval_batch_size
            f = {
                side: predictions.outputs(model, split, size)
                for side, split in self.samples.items()
            }
        whole = {
            side: values
            for found, samples in ((f, self.samples), (jacobian_f, self.jacobian_samples))
            for side, values in found.items()
            if samples[side] is self.splits[side]
        }
        return Measurement(epoch, due, K, K if K_jacobian is None else K_jacobian, whole, f)

    def _gram(self, model, samples, rows):
        if not rows:
            return None, {}
        return gram_matrix(
            model,
            samples,
            self.loss,
            rows,
            self.config.eval_batch_size,
            self.config.analysis_memory_gb * 1e9,
        )

    def rows(self, measurement: Measurement, method, group_losses) -> list[dict]:
        """Rows of `analysis.csv` for one checkpoint.

        method, group_losses: the training method and the mean losses R_g of the training split
        at this checkpoint, for the weights of the method's next step.
        """
        rows, due = [], measurement.due

        def add(split, analysis, pair, values):
            for quantity, value in values.items():
                key = {"epoch": measurement.epoch, "split": split, "analysis": analysis}
                rows.append(key | {"pair": pair, "quantity": quantity, "value": value})

        for side in self.sides:
            counts = self.splits[side].counts
            if "gradient_basis" in due:
                add(side, "gradient_basis", "", gradient_basis(measurement.K, side, counts))
            if "jacobian_norm" in due:
                values = jacobian_norm(measurement.K_jacobian, side, counts)
                add(side, "jacobian_norm", "", values)
            if "model_output_expectation" in due:
                f = measurement.expectation_outputs[side]
                values = model_output_expectation(f, self.samples[side])
                add(side, "model_output_expectation", "", values)
        for name, gap_side, flow_side in self.flows:
            counts = self.splits[flow_side].counts
            if "gap_dynamics_factors" in due:
                weights = method.flow_weights(group_losses, counts)
                for pair in self.pairs("gap_dynamics_factors"):
                    values = gap_dynamics_factors(
                        measurement.K, pair, gap_side, flow_side, counts, weights
                    )
                    add(name, "gap_dynamics_factors", groups.pair_name(*pair), values)
            if "static_dynamic_decomposition" in due:
                for pair in self.pairs("static_dynamic_decomposition"):
                    values = static_dynamic_decomposition(
                        measurement.K, pair, gap_side, flow_side, counts, self.loss
                    )
                    add(name, "static_dynamic_decomposition", groups.pair_name(*pair), values)
        return rows

    def pairs(self, analysis: str) -> list[tuple[int, int]]:
        """The configured pairs of an analysis, as group indices."""
        return [groups.pair_indices(pair) for pair in getattr(self.config, analysis).group_pairs]

    def measured_rows(self, epoch: int, change) -> list[dict]:
        """Rows `measured` of an epoch. change(side, g1, g2): the gap's change by learning rate."""
        if "gap_dynamics_factors" not in self.due(epoch):
            return []
        return [
            {
                "epoch": epoch,
                "split": name,
                "analysis": "gap_dynamics_factors",
                "pair": groups.pair_name(*pair),
                "quantity": "measured",
                "value": change(gap_side, *pair),
            }
            for name, gap_side, _ in self.flows
            for pair in self.pairs("gap_dynamics_factors")
        ]
