"""The optimizer and its learning rates: by parameter tensor, and over the epochs."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from lab.config.schema import Config
from lab.networks.building import parameter_groups


def build_optimizer(
    model: nn.Module, config: Config, further: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """SGD or AdamW with the learning rates of the parametrisation; further: parameters besides."""
    groups, further = parameter_groups(model, config), list(further)
    if further:
        groups.append({"params": further, "lr": config.learning_rate})
    for group in groups:
        group["initial_lr"] = group["lr"]
    rate, decay = config.learning_rate, config.weight_decay
    assert decay is not None  # validation puts the optimizer's own in place of null
    if config.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)


def learning_rate_factor(config: Config, epoch: int) -> float:
    """What the scheduler multiplies the learning rate by in an epoch (from 1).

    cosine: (1 + cos(π·(epoch - 1)/epochs))/2 (Loshchilov & Hutter, 2017), from 1 towards 0.
    """
    if config.scheduler == "none":
        return 1.0
    return (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, config: Config, epoch: int) -> None:
    """Give every parameter group of `build_optimizer` its learning rate in an epoch (from 1)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(config, epoch)
