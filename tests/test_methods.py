"""Methods and steps: weights by hand, updates against written-out gradients."""

import math

import pytest
import torch
from conftest import make_splits

import methods
import metrics
import model
import trainer
from config import validate


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
    loss = metrics.LOSSES["logistic"]
    net = model.build(config, (7,)).double()
    twin = model.build(config, (7,)).double()
    trainer.full_batch_step(
        net, trainer.build_optimizer(net, config), split, loss, weights, batch_size
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
        loss = metrics.LOSSES["logistic"]
        trainer.minibatch_epoch(net, optimizer, splits.train, loss, 8, seed)
        return torch.cat(seen)

    first = epoch(1)
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, splits.train.inputs.tolist()))
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))
