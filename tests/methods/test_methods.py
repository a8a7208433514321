"""Methods and steps: weights by hand, updates against written-out gradients."""

import math

import pytest
import torch
from helpers import make_splits

from lab import methods
from lab.config.loading import validate
from lab.evaluation import metrics, predictions
from lab.evaluation.losses import LOGISTIC
from lab.methods.erm import ERM
from lab.networks import building
from lab.training import loop, schedule, steps


def method(name, counts=(10, 5, 3, 12), **keys):
    return methods.build(validate({"debias_method": name, **keys}), make_splits(train=counts))


def test_weights_of_erm_and_importance_weighting():
    assert method("None").flow_weights([1, 2, 3, 4], (1, 2, 3, 4)) == [0.1, 0.2, 0.3, 0.4]
    assert method("IW_uniform").flow_weights([1, 2, 3, 4], (1, 2, 3, 4)) == [0.25] * 4
    assert method("IW_uniform").flow_weights([1, 2, 3, 4], (1, 0, 0, 4)) == [0.5, 0, 0, 0.5]


def test_q_of_group_dro_by_hand():
    dro = method("GroupDRO", dro_eta_q=0.5)
    q = [0.25] * 4
    for losses in ([0.7, 1.0, 0.2, 0.1], [0.5, 2.0, 0.1, 0.3]):
        raised = [weight * math.exp(0.5 * loss) for weight, loss in zip(q, losses)]
        q = [value / sum(raised) for value in raised]
        assert dro.flow_weights(losses, dro.counts) == pytest.approx(q, rel=1e-12)
        dro.advance(losses)
    assert [math.exp(value) for value in dro.state()["log_q"]] == pytest.approx(q, rel=1e-12)


@pytest.mark.parametrize("size", [4, 7, 30])
def test_the_flow_of_online_group_dro_is_that_of_its_batches(size):
    """Mean weights over many shuffled epochs, with steps so small that q stays as it is."""
    keys = {"dro_eta_q": 1e-6, "group_batches": "mini", "train_batch_size": size}
    dro = method("GroupDRO", **keys)
    dro.advance([1e6, 2e6, 0.0, 1e6])  # q = (e, e², 1, e)/Z
    losses = [0.5] * 4
    group = torch.arange(4).repeat_interleave(torch.tensor(dro.counts))
    sums, batches = torch.zeros(4, dtype=torch.float64), 0
    for epoch in range(3000):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(size):
            values = torch.full((len(batch),), 0.5, dtype=torch.float64, requires_grad=True)
            dro.batch_loss(values, group[batch]).backward()
            # ∂(Σ q_g mean_g)/∂ℓ_i = q_g/n_g(batch): its sum over the group is the weight of ∇R_g.
            sums.index_add_(0, group[batch], values.grad)
            batches += 1
    assert dro.flow_weights(losses, dro.counts) == pytest.approx(
        (sums / batches).tolist(), abs=0.01
    )
    assert sum(dro.step_weights(losses)) == pytest.approx(1)


def test_a_method_that_changes_the_loss_has_no_known_flow():
    class Squared(ERM):
        def batch_loss(self, losses, group):
            return super().batch_loss(losses**2, group)

    class Known(Squared):
        def batch_loss(self, losses, group):
            return super().batch_loss(losses, group)

        def flow_weights(self, group_losses, counts):
            return [0.25] * len(counts)

    config, splits = validate({"train_batch_size": None}), make_splits()
    squared, known = Squared(config, splits), Known(config, splits)
    assert all(math.isnan(w) for w in squared.flow_weights([1.0] * 4, (1, 2, 3, 4)))
    assert known.flow_weights([1.0] * 4, (1, 2, 3, 4)) == [0.25] * 4
    # Stepping group by group would leave its loss out.
    assert not steps.takes_full_batch(config, squared)
    assert steps.takes_full_batch(config, known)
    assert steps.takes_full_batch(config, ERM(config, splits))


def test_q_of_an_empty_group_stays_zero_and_its_nan_loss_does_no_harm():
    dro = method("GroupDRO", counts=(8, 0, 0, 6), dro_eta_q=1.0)
    dro.advance([1.0, math.nan, math.nan, 2.0])
    weights = dro.flow_weights([1.0, math.nan, math.nan, 2.0], dro.counts)
    e = math.exp(2.0)
    assert weights == pytest.approx([1 / (1 + e), 0, 0, e / (1 + e)])


def test_q_survives_what_a_float_cannot_hold():
    dro = method("GroupDRO", dro_eta_q=1e6)
    dro.advance([0.0, 1.0, 0.0, 0.0])
    assert dro.flow_weights([0.0] * 4, dro.counts) == [0, 1, 0, 0]
    dro.advance([2.0, 0.0, 0.0, 0.0])
    assert dro.flow_weights([0.0] * 4, dro.counts) == [1, 0, 0, 0]


@pytest.mark.parametrize("batch_size", [3, 100])
def test_full_batch_step_against_one_gradient_per_group(batch_size):
    splits = make_splits()
    split, weights = splits.train, [0.1, 0.4, 0.2, 0.3]
    config = validate({"hidden_dim": 9, "learning_rate": 0.3})
    loss = LOGISTIC
    net = building.build(config, (7,)).double()
    twin = building.build(config, (7,)).double()
    steps.full_batch_step(
        net, schedule.build_optimizer(net, config), split, loss, weights, batch_size
    )
    for g, part in enumerate(split.slices):
        (weights[g] * loss.value(twin(split.inputs[part]), split.y[part]).mean()).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.3 * parameter.grad
    for found, expected in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(found, expected, atol=1e-14)


def test_minibatches_see_every_sample_once_in_an_order_of_seed_and_epoch():
    splits = make_splits()
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))

        def forward(self, x):
            seen.append(x)
            return x @ self.w

    def epoch(seed):
        seen.clear()
        net = Spy()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = LOGISTIC
        steps.minibatch_epoch(net, optimizer, splits.train, loss, 8, seed)
        return torch.cat(seen)

    first = epoch(1)
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, splits.train.inputs.tolist()))
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))


LOSSES_OF_A_BATCH = torch.tensor([0.2, 1.5, 0.7, 0.1, 2.0], dtype=torch.float64)
GROUPS_OF_A_BATCH = torch.tensor([0, 3, 0, 1, 3])  # none of group 2


def test_importance_weighting_of_a_batch():
    """Its expectation over random batches is the mean of the group losses."""
    counts = (10, 5, 0, 25)
    loss = method("IW_uniform", counts).batch_loss(LOSSES_OF_A_BATCH, torch.tensor([0, 3, 0, 1, 3]))
    expected = (
        sum(
            value * (1 / 3) / (counts[g] / 40)
            for value, g in zip(LOSSES_OF_A_BATCH.tolist(), GROUPS_OF_A_BATCH.tolist())
        )
        / 5
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)

    splits = make_splits(train=(10, 5, 3, 12))
    net = building.build(validate({"hidden_dim": 5}), (7,)).double()
    losses = LOGISTIC.value(net(splits.train.inputs), splits.train.y)
    whole = method("IW_uniform").batch_loss(losses, splits.train.group)
    means = [losses[part].mean() for part in splits.train.slices]
    assert whole.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-12)


def test_online_group_dro_by_hand():
    dro = method("GroupDRO", dro_eta_q=0.5)
    losses = LOSSES_OF_A_BATCH.clone().requires_grad_()
    value = dro.batch_loss(losses, GROUPS_OF_A_BATCH)
    raised = [math.exp(0.5 * 0.45), math.exp(0.5 * 0.1), 1.0, math.exp(0.5 * 1.75)]
    q = [x / sum(raised) for x in raised]
    assert [math.exp(x) for x in dro.log_q] == pytest.approx(q, rel=1e-12)
    assert value.item() == pytest.approx(q[0] * 0.45 + q[1] * 0.1 + q[3] * 1.75, rel=1e-12)
    value.backward()
    expected = [q[0] / 2, q[3] / 2, q[0] / 2, q[1], q[3] / 2]  # q is a constant of the step
    assert losses.grad.tolist() == pytest.approx(expected, rel=1e-12)
    # The absent group keeps its ratio to where exp(0) stood.
    dro.batch_loss(LOSSES_OF_A_BATCH, GROUPS_OF_A_BATCH)
    again = [x * y for x, y in zip(q, raised)]
    assert [math.exp(x) for x in dro.log_q] == pytest.approx([x / sum(again) for x in again])


@pytest.mark.parametrize("name", ["IW_uniform", "GroupDRO"])
def test_mini_batches_of_everything_are_the_full_batch(fake_run, settings, name):
    """One batch with all samples does the step of the full batch."""
    results = []
    for batches in ("full", "mini"):
        config = settings(
            debias_method=name, group_batches=batches, train_batch_size=30, epochs=1,
            learning_rate=0.3, dro_eta_q=0.5,
        )  # fmt: skip
        splits = make_splits()
        net = building.build(config, (7,)).double()
        optimizer = schedule.build_optimizer(net, config)
        loss, made = LOGISTIC, methods.build(config, splits)
        if batches == "full":
            f = predictions.outputs(net, splits.train, 100)
            losses = metrics.group_means(loss.value(f, splits.train.y), splits.train.slices)
            weights = made.step_weights(losses)
            steps.full_batch_step(net, optimizer, splits.train, loss, weights, 100)
        else:
            steps.minibatch_epoch(net, optimizer, splits.train, loss, 30, 0, made)
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-12)


def test_schedule(fake_run, settings, monkeypatch):
    config = settings(scheduler="cosine", epochs=4, learning_rate=0.2, train_batch_size=10)
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args):
        rates.append({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    net = building.build(config, (7,)).double()
    loop.train(net, make_splits(), config, fake_run)
    expected = [0.2 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert [rate for (rate,) in rates[::3]] == pytest.approx(expected)
    assert rates[0] == {0.2}
    assert schedule.learning_rate_factor(settings(), 7) == 1


def test_a_single_sample_left_over_joins_the_last_batch_where_there_is_batch_norm():
    sizes = []

    class Spy(torch.nn.Sequential):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x).squeeze(1)

    splits = make_splits()  # 30 training samples
    for layers, expected in ((1, [29, 1]), (2, [30])):
        net = Spy(torch.nn.Linear(7, 1), torch.nn.BatchNorm1d(1))[:layers].double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = LOGISTIC
        sizes.clear()
        steps.minibatch_epoch(net, optimizer, splits.train, loss, 29, 0)
        assert sizes == expected
