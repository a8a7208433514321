"""SCALE's step against a loop that is written out, ERM on the target set, drawn batches."""

import copy
import math

import pytest
import torch
from helpers import make_split, make_splits

import plotting
from lab import methods
from lab.config.loading import validate
from lab.config.seeds import derive_seed
from lab.evaluation.losses import LOGISTIC
from lab.figures import analyses
from lab.folders import reading
from lab.methods import scale
from lab.networks import building
from lab.system.errors import DataError
from lab.training import loop, schedule, steps

BATCH = 8


def problem(shape=(3, 12, 12), name="ConvNet", size=4, **keys):
    """(network, method, optimizer, splits): a small network in float64 with a target set."""
    splits = make_splits(shape=shape, train=(12, 4, 4, 12))
    splits.target = make_split((5, 5, 5, 5), shape=shape, seed=9)
    given = {
        "dataset_name": "Dominoes", "dominoes_classes": "binary", "debias_method": "SCALE",
        "model_name": name, "latent_size": 5, "hidden_dim": 6, "scale_group_size": size,
        "train_batch_size": BATCH, "learning_rate": 0.3, "momentum": 0.7, "weight_decay": 0.05,
    }  # fmt: skip
    config = validate(given | keys)
    net = building.build(config, shape).double()
    method = methods.build(config, splits)
    optimizer = schedule.build_optimizer(net, config, method.prepare(net))
    method.cosine_sums = method.cosine_sums.double()
    return net, method, optimizer, splits, config


LAMBDA = {
    "linear": lambda c: (c + 1) / 2,
    "relu": lambda c: max(c, 0.0),
    "raw": lambda c: c,
    "step": lambda c: 1.0 if c > 0 else 0.0,
}


def written_out(net, train_head, batches, loss, mode, kernels_of_a_row, config):
    """Parameters after these steps, every row by itself; returns (network, head, cosines)."""
    net, train_head = copy.deepcopy(net), copy.deepcopy(train_head)
    everything = dict(net.named_parameters()) | {
        f"train_head.{n}": p for n, p in train_head.named_parameters()
    }
    velocity, seen = {}, {}
    for (x, y), (tx, ty) in batches:
        body = {n: p for n, p in net.named_parameters() if not n.startswith(HEADS)}
        g = torch.autograd.grad(
            loss.value(train_head(net.hidden(x)).squeeze(1), y).mean(),
            [*body.values(), *train_head.parameters()],
        )
        t = torch.autograd.grad(loss.value(net(tx), ty).mean(), list(net.parameters()))
        direction = dict(zip([n for n, _ in net.named_parameters()], t))
        head = dict(
            zip([f"train_head.{n}" for n, _ in train_head.named_parameters()], g[len(body) :])
        )
        for (name, p), gradient in zip(body.items(), g):
            target = direction[name]
            if p.dim() == 4:
                outputs, inputs = p.shape[:2]
                kernels = [(o, i) for o in range(outputs) for i in range(inputs)]
                size = inputs if inputs <= 3 else kernels_of_a_row[name]
                rows = [kernels[k : k + size] for k in range(0, len(kernels), size)]
                new = torch.zeros_like(target)
                cosines = []
                for row in rows:
                    a = torch.cat([gradient[o, i].flatten() for o, i in row])
                    b = torch.cat([target[o, i].flatten() for o, i in row])
                    c = float(a @ b / max(a.norm() * b.norm(), 1e-8))
                    cosines.append(c)
                    for o, i in row:
                        new[o, i] = LAMBDA[mode](c) * gradient[o, i] + target[o, i]
            else:
                c = float((gradient * target).sum() / max(gradient.norm() * target.norm(), 1e-8))
                cosines, new = [c], LAMBDA[mode](c) * gradient + target
            direction[name] = new
            seen.setdefault(name, []).append(sum(cosines) / len(cosines))
        with torch.no_grad():
            for name, d in (direction | head).items():
                d = d + config.weight_decay * everything[name]
                velocity[name] = d + config.momentum * velocity.get(name, 0)
                everything[name] -= config.learning_rate * velocity[name]
    return net, train_head, {name: sum(values) / len(values) for name, values in seen.items()}


HEADS = ("classifier", "layers.1")  # of the ConvNet, of an MLP with one hidden layer


@pytest.mark.parametrize("mode", LAMBDA)
@pytest.mark.parametrize(
    ("network", "size", "kernels"),
    [("ConvNet", 4, 4), ("ConvNet", 60, 32), ("ConvNet", 10**6, 2048), ("MLP", 64, 0)],
    ids=["divides", "largest divisor", "whole tensor", "mlp"],
)  # fmt: skip
def test_steps_are_those_of_the_loop(mode, network, size, kernels):
    net, method, optimizer, splits, config = problem(name=network, size=size, scale_mode=mode)
    loss, train, target = LOGISTIC, splits.train, splits.target
    # The train head starts as a copy; make it another one.
    with torch.no_grad():
        for p in method.train_head.parameters():
            p.mul_(0.5).add_(0.1)
    indices = [torch.arange(k, k + BATCH) for k in (0, 9, 20)]
    drawn = [torch.tensor([0, 3, 6, 9, 12, 15, 18, 19]), torch.arange(8), torch.arange(5, 13)]
    batches = [
        ((train.inputs[i], train.y[i]), (target.inputs[j], target.y[j]))
        for i, j in zip(indices, drawn)
    ]
    rows = {"body.3.weight": kernels}
    expected, head, cosines = written_out(net, method.train_head, batches, loss, mode, rows, config)
    method.start_epoch(1, 0)
    method.targets = iter([b for _, b in batches])
    net.train()
    for (x, y), _ in batches:
        optimizer.zero_grad()
        method.backward(net, loss, x, y, None)
        optimizer.step()
    for (name, a), b in zip(net.named_parameters(), expected.parameters()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), name
    for a, b in zip(method.train_head.parameters(), head.parameters()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    measured = method.measured()
    assert measured == {f"cosine_{n}": pytest.approx(v, abs=1e-9) for n, v in cosines.items()}


@pytest.mark.parametrize(
    ("shape", "size", "rows"),
    [((64, 32, 3, 3), 64, 32), ((8, 3, 7, 7), 64, 8), ((8, 1, 3, 3), 1, 8), ((6, 5, 3, 3), 4, 10),
     ((6, 5, 3, 3), 7, 5), ((6, 5, 3, 3), 1, 30), ((6, 5, 3, 3), 1000, 1), ((10, 20), 4, 1),
     ((10,), 4, 1)],
)  # fmt: skip
def test_rows(shape, size, rows):
    assert scale.num_rows(shape, size) == rows


def test_the_log_names_layers_that_the_group_size_does_not_divide(caplog):
    with caplog.at_level("INFO"):
        problem(size=60)
    assert "SCALE: rows of 32 kernels in body.3.weight" in caplog.messages
    assert len(caplog.messages) == 1


def test_a_vanishing_gradient_has_cosine_zero():
    g = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    t = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-2.0, -2.0]])
    assert scale.cosines(g, t).tolist() == pytest.approx([0, 0, -1])
    noise = 1e-12 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert scale.MODES["linear"](scale.cosines(noise, -noise)).tolist() == pytest.approx([0.5] * 5)


def test_without_train_gradients_it_is_erm_on_the_target_batches(monkeypatch):
    """λ ≡ 0: the network moves as ERM would on the very same target batches."""
    monkeypatch.setitem(scale.MODES, "linear", torch.zeros_like)
    net, method, optimizer, splits, config = problem()
    twin = copy.deepcopy(net)
    other = schedule.build_optimizer(twin, config)
    loss = LOGISTIC
    same = scale.SCALE(config, splits)._target_batches(3, 0)
    method.start_epoch(3, 0)
    for step in range(4):
        index = torch.arange(BATCH) + step
        for optimiser in (optimizer, other):
            optimiser.zero_grad()
        method.backward(net, loss, splits.train.inputs[index], splits.train.y[index], None)
        x, y = next(same)
        loss.value(twin(x), y).mean().backward()
        optimizer.step(), other.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(a, b, rtol=1e-12)


def test_target_batches_are_drawn_anew_without_replacement():
    _, method, _, splits, _ = problem()
    where = {tuple(x.flatten().tolist()): i for i, x in enumerate(splits.target.inputs)}

    def batches(epoch, first, count):
        stream = method._target_batches(epoch, first)
        found = [next(stream) for _ in range(count)]
        return [[where[tuple(x.flatten().tolist())] for x in xs] for xs, _ in found]

    first = batches(1, 0, 9)
    assert all(len(set(batch)) == BATCH for batch in first)
    assert len({tuple(batch) for batch in first}) == 9
    assert {i for batch in first for i in batch} == set(range(20))
    assert batches(1, 4, 5) == first[4:]  # as after resuming in the middle of an epoch
    assert batches(2, 0, 9) != first


def test_refused(settings):
    splits = make_splits()
    given = {"dataset_name": "Dominoes", "dominoes_classes": "binary"}
    for name in ("SCALE", "ERM_target"):
        with pytest.raises(DataError, match="val_target_size"):
            methods.build(validate(given | {"debias_method": name}), splits)
    splits.target = make_split((1, 1, 1, 1))
    with pytest.raises(DataError, match="target set, which has 4, and from training, which has 30"):
        methods.build(validate(given | {"debias_method": "SCALE"}), splits)


@pytest.mark.parametrize("batch_size", [None, 6])
def test_erm_target_is_erm_on_the_target_set(fake_run, settings, batch_size):
    splits = make_splits(train=(12, 4, 4, 12))
    splits.target = make_split((5, 5, 5, 5), seed=9)
    keys = {
        "dataset_name": "Dominoes", "dominoes_classes": "binary", "epochs": 3, "hidden_dim": 6,
        "train_batch_size": batch_size, "learning_rate": 0.3,
    }  # fmt: skip
    config = settings(**keys, debias_method="ERM_target")
    net = building.build(config, (7,)).double()
    loop.train(net, splits, config, fake_run)
    assert all(math.isnan(row["flow_weight_0"]) for row in fake_run.rows)
    measured = fake_run.values("gap_dynamics_factors", "measured", "train")
    assert all(map(math.isnan, measured.values()))

    twin = building.build(config, (7,)).double()
    optimizer = schedule.build_optimizer(twin, config)
    loss, target = LOGISTIC, splits.target
    for epoch in range(1, 4):
        if batch_size:
            seed = derive_seed(config.seed, "batches", epoch)
            steps.minibatch_epoch(twin, optimizer, target, loss, batch_size, seed)
        else:
            optimizer.zero_grad()
            loss.value(twin(target.inputs), target.y).mean().backward()
            optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-12)


def test_mean_cosines_are_rows_of_the_analysis_table(fake_run, settings):
    splits = make_splits(shape=(3, 8, 8), train=(12, 4, 4, 12), dtype=torch.float32)
    splits.target = make_split((5, 5, 5, 5), shape=(3, 8, 8), dtype=torch.float32, seed=9)
    config = settings(
        dataset_name="Dominoes", dominoes_classes="binary", debias_method="SCALE", epochs=2,
        model_name="ConvNet", latent_size=4, train_batch_size=8, learning_rate=0.01,
    )  # fmt: skip
    net = building.build(config, (3, 8, 8))
    loop.train(net, splits, config, fake_run)
    rows = [row for row in fake_run.analyses if row["analysis"] == "SCALE"]
    assert {row["epoch"] for row in rows} == {1, 2}
    assert {row["quantity"] for row in rows} == {
        f"cosine_body.{layer}.{kind}" for layer in (0, 3, 7) for kind in ("weight", "bias")
    }
    assert all(-1 <= row["value"] <= 1 for row in rows)


def test_the_figure_shows_every_tensor_in_the_order_of_the_network(tmp_path):
    names = [f"cosine_body.{layer}.weight" for layer in (10, 2, 1)]
    rows = ["epoch,split,analysis,pair,quantity,value"]
    rows += [
        f"{epoch},train,SCALE,,{name},{0.1 * epoch - 0.2 * i}"
        for epoch in (1, 2, 3) for i, name in enumerate(names)
    ]  # fmt: skip
    (tmp_path / "analysis.csv").write_text("\n".join(rows) + "\n")
    run = reading.read_run(tmp_path)
    ax = analyses.scale(run).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "10.weight", "2.weight", "1.weight"
    ]  # fmt: skip
    shown = ax.images[0].get_array()
    expected = [[0.1 * epoch - 0.2 * i for epoch in (1, 2, 3)] for i in range(3)]
    assert shown.tolist() == [pytest.approx(row) for row in expected]
    assert [path.name for path in plotting.draw(tmp_path)] == ["scale.png"]
