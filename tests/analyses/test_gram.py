"""Every analysis against an obviously right twin: one autograd call per group, in float64."""

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from helpers import make_split, make_splits

from lab import methods
from lab.analyses import gram, measuring, quantities
from lab.config.loading import validate
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOGISTIC
from lab.networks import building, mlp
from lab.splits import groups

EMPTY_TWO = (8, 0, 0, 6)  # what train_correlation 1 gives


def network(dtype=torch.float64, inputs=7, **keys):
    config = validate({"hidden_dim": 11, "num_hidden_layers": 2, **keys})
    net = building.build(config, (inputs,)).to(dtype)
    with torch.no_grad():  # away from zero biases, and from f ≈ 0
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(5), dtype=dtype
            )
    return net, config


def flat_gradient(net, scalar):
    trainable = [p for p in net.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, trainable)])


def twin_rows(net, split, loss_name):
    """V (8, P): four ∇_g and four m_g, None for an empty group."""
    gradients, jacobians = [], []
    for y, a in groups.GROUPS:
        mine = (split.y == y) & (split.a == a)
        if not mine.any():
            gradients.append(None)
            jacobians.append(None)
            continue
        x, labels = split.inputs[mine], split.y[mine]
        if loss_name == "logistic":
            loss = torch.log(1 + torch.exp(-labels * net(x))).mean()
        else:
            loss = ((net(x) - labels) ** 2).mean()
        gradients.append(flat_gradient(net, loss))
        jacobians.append(flat_gradient(net, net(x).mean()))
    return gradients + jacobians


def twin_gram(net, splits, loss_name):
    rows = twin_rows(net, splits["train"], loss_name) + twin_rows(net, splits["test"], loss_name)
    K = np.full((16, 16), np.nan)
    for i, u in enumerate(rows):
        for j, v in enumerate(rows):
            if u is not None and v is not None:
                K[i, j] = float(u @ v)
    return K


def gram_of(net, config, splits, **options):
    loss = config.loss.load()
    options = {"kinds": {0, 1}, "batch_size": 5} | options
    return gram.gram_matrix(net, splits, loss, **options)[0]


def assert_close(value, expected, tolerance=1e-12):
    scale = np.nanmax(np.abs(expected)) if np.isfinite(expected).any() else 1
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


VARIANTS = [
    # Two layers of exp overflow the naive loss of the twin.
    {"activation_function": name, "num_hidden_layers": 1 if name == "exp" else 2}
    for name in mlp.ACTIVATIONS
] + [
    {"initialization_method": "NTP"},
    {"loss_function": "mse"},
    {"use_skip_connections": True, "num_hidden_layers": 4},
    {"use_bias": True, "use_zero_bias_initialization": False},
    {"use_bias": True, "initialization_method": "NTP", "loss_function": "mse"},
    {"fix_final_layer": True, "use_bias": True},
    {"num_hidden_layers": 1, "hidden_dim": 1},
    {"use_skip_connections": True, "use_bias": True, "activation_function": "gelu"},
]


@pytest.mark.parametrize("keys", VARIANTS, ids=lambda keys: "-".join(map(str, keys.values())))
@pytest.mark.parametrize("train", [(12, 5, 4, 9), EMPTY_TWO], ids=["full", "empty"])
def test_gram_matrix_against_autograd(keys, train):
    net, config = network(**keys)
    splits = make_splits(train=train)
    splits = {"train": splits.train, "test": splits.test}
    assert_close(gram_of(net, config, splits), twin_gram(net, splits, config.loss_function))


def test_float32_stays_close_to_float64():
    splits = make_splits(train=(40, 30, 20, 30))
    splits = {"train": splits.train, "test": splits.test}
    net, config = network()
    exact = twin_gram(net, splits, "logistic")
    single = {
        name: type(s)(s.inputs.float(), s.y.float(), s.a.float(), s.counts)
        for name, s in splits.items()
    }
    assert_close(gram_of(net.float(), config, single), exact, tolerance=1e-6)


@pytest.mark.parametrize("memory", [1, 16 * 8 * 20, 16 * 8 * 90])
def test_slices_of_output_units_change_nothing(memory):
    net, config = network(use_bias=True, use_zero_bias_initialization=False)
    splits = make_splits()
    splits = {"train": splits.train, "test": splits.test}
    passes = list(gram._passes(list(net.layers), 16, memory))
    assert len(passes) > 1
    units = [(id(layer), u) for part in passes for layer, s in part for u in range(s.start, s.stop)]
    assert len(units) == len(set(units)) == sum(len(layer.weight) for layer in net.layers)
    whole = gram_of(net, config, splits)
    assert_close(gram_of(net, config, splits, memory_bytes=memory), whole)


def test_one_slice_at_a_time_is_in_memory(monkeypatch):
    net, config = network()
    alive, most = weakref.WeakSet(), []

    class Counted(gram._SliceSums):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(gram, "_SliceSums", Counted)
    passes = list(gram._passes(list(net.layers), 16, 1))
    assert len(passes) == 23 and all(len(chunk) == 1 for chunk in passes)
    gram_of(net, config, vars(make_splits()), memory_bytes=1)
    assert len(most) == 23 and max(most) == 1


def test_missing_sides_and_kinds_are_nan():
    net, config = network()
    splits = make_splits()
    K = gram_of(net, config, {"test": splits.test}, kinds={gram.GRADIENT})
    assert np.isfinite(K[8:12, 8:12]).all()
    K[8:12, 8:12] = np.nan
    assert np.isnan(K).all()


def test_outputs_are_those_of_an_evaluation_without_analyses():
    net, _ = network(dtype=torch.float32)
    split = make_split((12, 5, 4, 9), dtype=torch.float32)
    loss = LOGISTIC
    _, found = gram.gram_matrix(net, {"train": split}, loss, {0, 1}, batch_size=4)
    assert torch.equal(found["train"], predictions.outputs(net, split, 4))


def picture_network(name, shape=(3, 32, 32), frozen=(), **keys):
    """A network for pictures in float64 that has been through a batch, in evaluation mode."""
    config = validate({"model_name": name, "latent_size": 9, **keys})
    net = building.build(config, shape).double()
    for part in frozen:
        getattr(net.body[1], part).requires_grad_(False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * parameter.std() * noise if parameter.dim() > 1 else 0.1 * noise
        net.train()(torch.rand(8, *shape, generator=generator, dtype=torch.float64))
    return net.eval(), config


PICTURE_VARIANTS = [
    {"name": "ConvNet"},
    {"name": "ConvNet", "shape": (1, 9, 5), "loss_function": "mse", "fix_final_layer": True},
    # Most of its 11 million parameters frozen, so that 32 gradients of them fit into the memory;
    # small, so that hardly a unit is so close to 0 that rounding to float32 switches it.
    {"name": "ResNet18", "shape": (3, 8, 8), "frozen": ("layer3", "layer4")},
]


@pytest.mark.parametrize("keys", PICTURE_VARIANTS, ids=["ConvNet", "grey", "ResNet18"])
@pytest.mark.parametrize("train", [(4, 1, 2, 3), (3, 0, 0, 2)], ids=["full", "empty"])
def test_gram_matrix_of_networks_for_pictures_against_autograd(keys, train):
    net, config = picture_network(**keys)
    splits = make_splits(train, (2, 1, 1, 3), shape=keys.get("shape", (3, 32, 32)))
    both = {"train": splits.train, "test": splits.test}
    exact = twin_gram(net, both, config.loss_function)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert_close(gram_of(net, config, both, batch_size=2), exact)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    net.float()
    single = {
        name: type(s)(s.inputs.float(), s.y.float(), s.a.float(), s.counts)
        for name, s in both.items()
    }
    loss = config.loss.load()
    K, outputs = gram.gram_matrix(net, single, loss, {0, 1}, batch_size=2)
    assert_close(K, exact, tolerance=1e-5)
    for name, split in single.items():
        assert torch.equal(outputs[name], predictions.outputs(net, split, 2))


def test_passes_over_parameter_tensors_change_nothing():
    net, config = picture_network("ConvNet")
    splits = make_splits((4, 1, 2, 3), (2, 1, 1, 3), shape=(3, 32, 32))
    splits = {"train": splits.train, "test": splits.test}
    parameters = list(net.parameters())
    memory = 16 * 8 * 20_000  # all but the linear layer's 64 · 8 · 8 · 9 weights, which go alone
    passes = list(gram._tensor_passes(parameters, 16, memory))
    assert [len(chunk) for chunk in passes] == [4, 1, 3]
    assert [p for chunk in passes for (p,) in chunk] == parameters
    whole = gram_of(net, config, splits)
    assert_close(gram_of(net, config, splits, memory_bytes=memory), whole)


def test_parameters_that_the_output_does_not_depend_on_have_gradient_zero():
    net, config = picture_network("ConvNet")
    splits = {"train": make_split((2, 1, 1, 2), shape=(3, 32, 32))}
    before = gram_of(net, config, splits)
    net.other_head = torch.nn.Linear(9, 3).double()
    assert_close(gram_of(net, config, splits), before)


# What follows takes the twin's rows V and writes each definition out with vectors.


@pytest.fixture(params=["logistic", "mse"])
def case(request):
    net, config = network(loss_function=request.param)
    splits = make_splits()
    both = {"train": splits.train, "test": splits.test}
    V = {name: twin_rows(net, split, request.param) for name, split in both.items()}
    return net, config, both, V, gram_of(net, config, both)


def shares(split):
    return [count / len(split) for count in split.counts]


def moments(split):
    y, a = split.y.mean().item(), split.a.mean().item()
    return y, a, (split.y * split.a).mean().item() - y * a


def basis(rows):
    cells = list(zip(groups.GROUPS, rows))
    return {
        "inv": sum(row for _, row in cells) / 4,
        "Y": sum(y * row for (y, _), row in cells) / 4,
        "A": sum(a * row for (_, a), row in cells) / 4,
        "AY": sum(y * a * row for (y, a), row in cells) / 4,
    }


@pytest.mark.parametrize("side", ["train", "test"])
def test_gradient_basis(case, side):
    _, _, splits, V, K = case
    found = quantities.gradient_basis(K, side, splits[side].counts)
    v = basis(V[side][:4])
    expected = {f"norm_{name}": v[name].norm().item() for name in v}
    for first, second in itertools.combinations(v, 2):
        cosine = torch.cosine_similarity(v[first], v[second], dim=0)
        expected[f"cosine_{first}_{second}"] = cosine.item()
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-9)
    # The identity that gives the basis its meaning.
    y, a, covariance = moments(splits[side])
    rebuilt = v["inv"] + y * v["Y"] + a * v["A"] + (covariance + y * a) * v["AY"]
    average = sum(p * row for p, row in zip(shares(splits[side]), V[side]))
    assert torch.allclose(rebuilt, average, atol=1e-12)


FLOWS = [("train", "train"), ("test", "test"), ("test", "train")]


@pytest.mark.parametrize(("gap", "flow"), FLOWS)
@pytest.mark.parametrize("pair", [(1, 0), (2, 3), (0, 3)])
def test_gap_dynamics_factors(case, gap, flow, pair):
    _, _, splits, V, K = case
    weights = [0.1, 0.4, 0.2, 0.3]
    counts = splits[flow].counts
    found = quantities.gap_dynamics_factors(K, pair, gap, flow, counts, weights)
    delta = V[gap][pair[1]] - V[gap][pair[0]]
    v = basis(V[flow][:4])
    y, a, covariance = moments(splits[flow])
    expected = {
        "term1": delta @ v["inv"],
        "term2": delta @ (y * v["Y"] + a * v["A"] + y * a * v["AY"]),
        "term3": delta @ (covariance * v["AY"]),
        "total": delta @ sum(p * row for p, row in zip(shares(splits[flow]), V[flow])),
        "method_total": delta @ sum(w * row for w, row in zip(weights, V[flow])),
    }
    assert found == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-9, abs=1e-14)
    assert found["term1"] + found["term2"] + found["term3"] == pytest.approx(
        found["total"], rel=1e-9, abs=1e-14
    )


@pytest.mark.parametrize(("gap", "flow"), FLOWS)
def test_static_dynamic_decomposition(case, gap, flow):
    _, config, splits, V, K = case
    loss = config.loss.load()
    minority, majority = 1, 3
    found = quantities.static_dynamic_decomposition(
        K, (minority, majority), gap, flow, splits[flow].counts, loss
    )
    slope = 0.5 if config.loss_function == "logistic" else 2.0  # c₀(y) = -slope·y

    def static(side, g):
        return -slope * groups.GROUPS[g][0] * V[side][4 + g]

    delta_s = static(gap, majority) - static(gap, minority)
    delta_d = V[gap][majority] - V[gap][minority] - delta_s
    p = shares(splits[flow])
    flow_s = sum(p[g] * static(flow, g) for g in range(4))
    flow_d = sum(p[g] * (V[flow][g] - static(flow, g)) for g in range(4))
    expected = {
        "TermA": delta_s @ flow_s,
        "TermB": delta_s @ flow_d + delta_d @ flow_s,
        "TermC": delta_d @ flow_d,
        "total": (delta_s + delta_d) @ (flow_s + flow_d),
    }
    assert found == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-9, abs=1e-14)
    parts = found["TermA"] + found["TermB"] + found["TermC"]
    assert parts == pytest.approx(found["total"], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("side", ["train", "test"])
def test_jacobian_norm(case, side):
    _, _, splits, V, K = case
    m = V[side][4:]
    found = quantities.jacobian_norm(K, side, splits[side].counts)
    expected = {f"norm_sq_{groups.name(g)}": m[g] @ m[g] for g in range(4)}
    for i in range(4):
        for j in range(i + 1, 4):
            pair = f"{groups.name(i)}_vs_{groups.name(j)}"
            expected[f"dot_{pair}"] = m[i] @ m[j]
            expected[f"cosine_{pair}"] = torch.cosine_similarity(m[i], m[j], dim=0)
            expected[f"dist_sq_{pair}"] = ((m[i] - m[j]) ** 2).sum()
    delta_S = sum(a * m[g] for g, (_, a) in enumerate(groups.GROUPS)) / 2
    delta_L = sum(y * m[g] for g, (y, _) in enumerate(groups.GROUPS)) / 2
    m_A, m_Y = delta_S / 2, delta_L / 2
    expected |= {
        "norm_Delta_S": delta_S.norm(),
        "norm_Delta_L": delta_L.norm(),
        "ratio_Delta_S_L": delta_S.norm() / delta_L.norm(),
        "dot_Delta_S_Delta_L": delta_S @ delta_L,
        "cosine_Delta_S_Delta_L": torch.cosine_similarity(delta_S, delta_L, dim=0),
        "norm_sq_m_A": m_A @ m_A,
        "norm_sq_m_Y": m_Y @ m_Y,
        "dot_m_A_m_Y": m_A @ m_Y,
    }
    assert found == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-9, abs=1e-14)


def test_model_output_expectation():
    split = make_split((5, 1, 0, 4))
    f = torch.arange(10.0)
    found = quantities.model_output_expectation(f, split)
    expected = {"mean_G(-1,-1)": 2.0, "std_G(-1,-1)": np.std([0, 1, 2, 3, 4], ddof=1)}
    expected |= {"mean_G(-1,+1)": 5.0, "std_G(-1,+1)": math.nan}
    expected |= {"mean_G(+1,-1)": math.nan, "std_G(+1,-1)": math.nan}
    expected |= {"mean_G(+1,+1)": 7.5, "std_G(+1,+1)": np.std([6, 7, 8, 9], ddof=1)}
    assert found == pytest.approx(expected, nan_ok=True)


def test_empty_groups_are_nan_where_they_count_and_only_there():
    net, config = network()
    splits = make_splits(train=EMPTY_TWO)
    both = {"train": splits.train, "test": splits.test}
    K = gram_of(net, config, both)
    V = twin_rows(net, splits.train, "logistic")
    loss, counts = LOGISTIC, splits.train.counts
    weights = methods.build(config, splits).flow_weights([1.0] * 4, counts)

    there = quantities.gap_dynamics_factors(K, (0, 3), "train", "train", counts, weights)
    average = (8 * V[0] + 6 * V[3]) / 14
    assert there["total"] == pytest.approx(((V[3] - V[0]) @ average).item(), rel=1e-9)
    assert there["method_total"] == there["total"]
    assert all(math.isnan(there[term]) for term in ("term1", "term2", "term3"))

    empty = quantities.gap_dynamics_factors(K, (1, 0), "train", "train", counts, weights)
    assert all(math.isnan(value) for value in empty.values())
    under_train = quantities.gap_dynamics_factors(K, (1, 0), "test", "train", counts, weights)
    assert math.isfinite(under_train["total"])

    static = quantities.static_dynamic_decomposition(K, (0, 3), "train", "train", counts, loss)
    assert all(math.isfinite(value) for value in static.values())
    assert static["total"] == pytest.approx(there["total"])
    assert all(math.isnan(v) for v in quantities.gradient_basis(K, "train", counts).values())
    jacobian = quantities.jacobian_norm(K, "train", counts)
    assert math.isfinite(jacobian["norm_sq_G(-1,-1)"])
    assert math.isnan(jacobian["norm_sq_G(-1,+1)"])
    assert math.isnan(jacobian["norm_Delta_S"])


def test_balanced_moments_and_an_empty_group_still_give_nan_terms():
    """Zero coefficients must not turn an empty group's NaN into a silent zero."""
    net, config = network()
    splits = make_splits(train=(7, 0, 0, 7))  # ȳ = ā = 0: term2 has zero weights throughout
    K = gram_of(net, config, {"train": splits.train})
    terms = quantities.gap_dynamics_factors(
        K, (0, 3), "train", "train", splits.train.counts, [0.5, 0, 0, 0.5]
    )
    assert math.isnan(terms["term2"])


def test_an_empty_test_group_is_nan_even_where_the_flows_weights_are_zero():
    net, config = network()
    splits = make_splits(train=(5, 5, 5, 5), test=(4, 0, 3, 2))
    K = gram_of(net, config, {"train": splits.train, "test": splits.test})
    counts = splits.train.counts  # balanced: no weight in term2 and term3
    empty = quantities.gap_dynamics_factors(K, (1, 0), "test", "train", counts, [0.25] * 4)
    assert all(math.isnan(value) for value in empty.values())
    there = quantities.gap_dynamics_factors(K, (2, 3), "test", "train", counts, [0.25] * 4)
    assert there["term2"] == there["term3"] == 0
    assert there["term1"] == pytest.approx(there["total"])


def test_total_is_the_gaps_change_over_a_tiny_step():
    net, config = network()
    splits = make_splits()
    both = {"train": splits.train, "test": splits.test}
    loss = config.loss.load()
    K = gram_of(net, config, both)
    counts = splits.train.counts

    def gaps(side, pair):
        f = predictions.outputs(net, both[side], 100)
        losses = metrics.group_means(loss.value(f, both[side].y), both[side].slices)
        return losses[pair[0]] - losses[pair[1]]

    pair, step = (1, 0), 1e-6
    before = {side: gaps(side, pair) for side in both}
    risk = loss.value(net(splits.train.inputs), splits.train.y).mean()
    gradients = torch.autograd.grad(risk, list(net.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), gradients):
            parameter -= step * gradient
    for side, gap_side in (("train", "train"), ("test", "test")):
        total = quantities.gap_dynamics_factors(K, pair, gap_side, "train", counts, [0] * 4)[
            "total"
        ]
        assert (gaps(side, pair) - before[side]) / step == pytest.approx(total, rel=1e-4)


def test_caps_draw_a_seeded_subset_per_group():
    split = make_split((9, 3, 6, 2))
    subset = measuring.capped(split, 4, seed=3)
    assert subset.counts == [4, 3, 4, 2]
    rows = {tuple(row.tolist()) for row in split.inputs}
    assert len({tuple(row.tolist()) for row in subset.inputs} & rows) == 13
    assert torch.equal(subset.group.bincount(), torch.tensor(subset.counts))
    assert torch.equal(subset.inputs, measuring.capped(split, 4, seed=3).inputs)
    assert not torch.equal(subset.inputs, measuring.capped(split, 4, seed=4).inputs)
    assert measuring.capped(split, 9, seed=3) is split
    assert measuring.capped(split, None, seed=3) is split


@pytest.mark.parametrize("caps", [(None, 3), (3, None), (2, 4), (3, 3)])
def test_caps_in_a_measurement(caps):
    """Each analysis takes its own subset; shares and moments stay those of the whole split."""
    net, config = network(jacobian_num_samples=caps[0], gradient_gram_num_samples=caps[1])
    splits = make_splits()
    analyses = measuring.Analyses(config, splits)
    measurement = analyses.measure(net, 0)
    method = methods.build(config, splits)
    rows = analyses.rows(measurement, method, [1.0] * 4)
    found = {(r["split"], r["analysis"], r["pair"], r["quantity"]): r["value"] for r in rows}
    seed = measuring.derive_seed(config.seed, "analysis samples", "train")
    for_gram = measuring.capped(splits.train, caps[1], seed)
    for_jacobian = measuring.capped(splits.train, caps[0], seed)
    V = twin_rows(net, for_gram, "logistic")
    total = (V[0] - V[1]) @ sum(p * row for p, row in zip(shares(splits.train), V))
    key = ("train", "gap_dynamics_factors", "G(-1,+1)_vs_G(-1,-1)", "total")
    assert found[key] == pytest.approx(total.item(), rel=1e-9)
    key = ("train", "static_dynamic_decomposition", "G(-1,+1)_vs_G(-1,-1)", "TermA")
    p = shares(splits.train)
    flow = sum(p[g] * -0.5 * groups.GROUPS[g][0] * V[4 + g] for g in range(4))
    assert found[key] == pytest.approx((0.5 * (V[4] - V[5]) @ flow).item(), rel=1e-9)
    m = twin_rows(net, for_jacobian, "logistic")[4]
    key = ("train", "jacobian_norm", "", "norm_sq_G(-1,-1)")
    assert found[key] == pytest.approx((m @ m).item(), rel=1e-9)
    f = net(for_gram.inputs[for_gram.slices[0]])
    key = ("train", "model_output_expectation", "", "mean_G(-1,-1)")
    assert found[key] == pytest.approx(f.mean().item(), rel=1e-9)
    assert ("train" in measurement.outputs) == (None in caps)


def test_only_what_is_due_is_measured():
    keys = {f"{name}_analysis_epochs": [] for name in BUILT_IN.of(Analysis)}
    net, config = network(**keys | {"jacobian_norm_analysis_epochs": [1]})
    analyses = measuring.Analyses(config, make_splits())
    nothing = analyses.measure(net, 0)
    assert nothing.K is None
    assert not nothing.outputs
    K = analyses.measure(net, 1).K
    assert np.isnan(K[:4, :4]).all()
    assert np.isfinite(K[4:8, 12:]).all()


def test_analysis_target_limits_the_splits():
    net, config = network(analysis_target="test")
    splits = make_splits()
    analyses = measuring.Analyses(config, splits)
    method = methods.build(config, splits)
    rows = analyses.rows(analyses.measure(net, 0), method, [1.0] * 4)
    assert {row["split"] for row in rows} == {"test"}
