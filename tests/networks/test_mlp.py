"""The networks: formulas, initialisation, and what happens as the width grows."""

import math

import numpy as np
import pytest
import torch
from helpers import make_split

from lab.config.loading import validate
from lab.evaluation.losses import LOGISTIC
from lab.networks import building
from lab.system import devices
from lab.system.errors import ConfigError
from lab.training import schedule, steps


def build(inputs=12, dtype=torch.float64, **keys):
    config = validate({"hidden_dim": 16, "num_hidden_layers": 3, **keys})
    return building.build(config, (inputs,)).to(dtype), config


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["muP", "NTP"])
def test_forward_is_the_written_formula(kind, skip):
    net, _ = build(
        initialization_method=kind,
        use_skip_connections=skip,
        use_bias=True,
        use_zero_bias_initialization=False,
        activation_function="tanh",
    )
    m = 16
    if kind == "muP":
        c, c_b = [m**0.5, 1, 1, m**-0.5], [m**0.5, m**0.5, m**0.5, 1]
    else:
        c, c_b = [1, m**-0.5, m**-0.5, m**-0.5], [1, 1, 1, 1]
    x = make_split((2, 1, 1, 2), shape=(3, 4)).inputs
    h, hidden = x.flatten(1), []
    for i, layer in enumerate(net.layers):
        hidden.append(h)
        z = c[i] * h @ layer.weight.T + c_b[i] * layer.bias
        if i == 3:
            f = z[:, 0]
        else:
            h = torch.tanh(z + h if skip and i > 0 else z)
    assert torch.allclose(net(x), f, atol=1e-12)
    for i in range(4):
        assert torch.allclose(net.hidden(x, i), hidden[i], atol=1e-12)
    assert torch.equal(net.hidden(x), net.hidden(x, 3))


@pytest.mark.parametrize("kind", ["muP", "NTP"])
def test_initial_deviations_and_learning_rates(kind):
    m = 400
    net, config = build(
        inputs=300,
        hidden_dim=m,
        initialization_method=kind,
        use_bias=True,
        use_zero_bias_initialization=False,
        optimizer="Adam",
        learning_rate=0.5,
        fix_final_layer=False,
    )
    root = m**0.5 if kind == "muP" else 1.0
    for layer in net.layers[:-1]:
        assert layer.weight.std().item() == pytest.approx(1 / root, rel=0.02)
        assert layer.bias.std().item() == pytest.approx(1 / root, rel=0.15)
    assert net.layers[-1].weight.std().item() == pytest.approx(1 / root, rel=0.15)
    rates = [group["lr"] for group in building.parameter_groups(net, config)]
    factors = [1 / m**0.5, 1 / m**0.5, 1 / m, 1 / m**0.5, 1 / m, 1 / m**0.5, 1 / m**0.5, 1]
    assert rates == pytest.approx([0.5 * (f if kind == "muP" else 1) for f in factors])
    sgd = config.model_copy(update={"optimizer": "SGD"})
    assert {group["lr"] for group in building.parameter_groups(net, sgd)} == {0.5}


def test_default_weight_decay():
    assert validate({"optimizer": "Adam"}).weight_decay == 0.01
    assert validate({"optimizer": "SGD"}).weight_decay == 0.0
    assert validate({"optimizer": "Adam", "weight_decay": 0.3}).weight_decay == 0.3


def test_zero_biases_and_a_fixed_final_layer():
    net, config = build(use_bias=True, fix_final_layer=True)
    assert all((layer.bias == 0).all() for layer in net.layers)
    trained = {id(p) for group in building.parameter_groups(net, config) for p in group["params"]}
    last = net.layers[-1]
    assert id(last.weight) not in trained
    assert id(last.bias) not in trained
    assert len(trained) == 6


def test_same_seed_same_network_and_width_does_not_shift_other_layers():
    first, second = build()[0], build()[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    other = build(seed=1)[0]
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_a_device_that_is_not_there_is_a_configuration_error():
    assert devices.choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device: given cuda.*allowed: auto, cpu"):
            devices.choose_device("cuda")


WIDTHS = [64, 256, 1024, 4096]


def feature_changes(width, number=3, **keys):
    """RMS change per coordinate of h_1, h_2 and f after a few full-batch steps."""
    split = make_split((8, 8, 8, 8), shape=(20,), dtype=torch.float32)
    changes = []
    for seed in range(3):
        config = validate(
            {"hidden_dim": width, "num_hidden_layers": 2, "seed": seed, "weight_decay": 0.0} | keys
        )
        net = building.build(config, (20,))

        def outputs(net=net):
            with torch.no_grad():
                x = split.inputs
                return [net.hidden(x, 1), net.hidden(x, 2), net(x)]

        before = outputs()
        optimizer = schedule.build_optimizer(net, config)
        loss = LOGISTIC
        for _ in range(number):
            steps.full_batch_step(net, optimizer, split, loss, [0.25] * 4, 1000)
        changes.append(
            [(now - then).square().mean().sqrt().item() for now, then in zip(outputs(), before)]
        )
    return np.mean(changes, axis=0)


def slopes(**keys):
    """Exponents of the width in the changes: least squares in log-log."""
    changes = np.array([feature_changes(width, **keys) for width in WIDTHS])
    x = np.log(WIDTHS) - np.mean(np.log(WIDTHS))
    return (x[:, None] * np.log(changes)).sum(0) / (x**2).sum()


@pytest.mark.parametrize(
    ("optimizer", "rate", "decay"),
    [("SGD", 0.5, 0.0), ("SGD", 0.5, 0.01), ("Adam", 0.05, 0.0), ("Adam", 0.05, 0.1)],
)
def test_under_mup_every_layer_moves_alike_at_all_widths(optimizer, rate, decay):
    keys = {"optimizer": optimizer, "learning_rate": rate, "weight_decay": decay}
    found = slopes(initialization_method="muP", **keys)
    assert np.abs(found).max() < 0.12, found


def test_under_ntp_with_sgd_hidden_features_move_less_and_less():
    found = slopes(initialization_method="NTP", optimizer="SGD", learning_rate=0.5)
    assert found[0] < -0.35
    assert found[1] < -0.35
    assert abs(found[2]) < 0.15  # the output still learns
    assert math.isclose(found[0], -0.5, abs_tol=0.15)  # as 1/√m


@pytest.mark.parametrize("method", ["muP", "NTP"])
@pytest.mark.parametrize("width", [16, 256])
def test_weight_decay_of_adam_does_not_depend_on_the_width(method, width):
    """A step without gradients shrinks every weight by learning rate × weight decay."""
    net, config = build(
        optimizer="Adam", learning_rate=0.1, weight_decay=0.2, hidden_dim=width,
        num_hidden_layers=2, initialization_method=method, use_bias=True,
        use_zero_bias_initialization=False,
    )  # fmt: skip
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = schedule.build_optimizer(net, config)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new in zip(before, net.parameters()):
        torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.2))
