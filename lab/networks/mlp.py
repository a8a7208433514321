"""An MLP in the maximal-update (muP) or neural-tangent (NTP) parametrisation.

muP follows Table 9 of Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer"; NTP follows Jacot et al., "Neural Tangent Kernel". With width m:

| layer  | muP: multiplier, init std, Adam factor | NTP: multiplier, init std |
|--------|----------------------------------------|---------------------------|
| input  | √m, 1/√m, 1/√m                         | 1, 1                      |
| hidden | 1, 1/√m, 1/m                           | 1/√m, 1                   |
| output | 1/√m, 1/√m, 1/√m                       | 1/√m, 1                   |
| biases | √m (output 1), 1/√m (output 1) or 0, 1/√m (output 1) | 1, 1 or 0   |

SGD takes the same learning rate in every layer; NTP's Adam factors are 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lab.config.schema import Config
from lab.config.seeds import derive_seed

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
    "silu": F.silu,
    "softplus": F.softplus,
    "abs": torch.abs,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "exp": torch.exp,
}


class Scaling(NamedTuple):
    """Multiplier, standard deviation at initialisation and Adam's learning-rate factor."""

    multiplier: float
    std: float
    adam_factor: float


def weight_scaling(parametrisation: str, layer: str, width: int) -> Scaling:
    """How the weights of the "input", "hidden" or "output" layer scale with the width."""
    root = math.sqrt(width)
    if parametrisation == "muP":
        return {
            "input": Scaling(root, 1 / root, 1 / root),
            "hidden": Scaling(1.0, 1 / root, 1 / width),
            "output": Scaling(1 / root, 1 / root, 1 / root),
        }[layer]
    return Scaling(1.0 if layer == "input" else 1 / root, 1.0, 1.0)


def bias_scaling(parametrisation: str, layer: str, width: int) -> Scaling:
    """The same for biases that start at random; at zero start the std has no effect."""
    if parametrisation == "muP" and layer != "output":
        root = math.sqrt(width)
        return Scaling(root, 1 / root, 1 / root)
    return Scaling(1.0, 1.0, 1.0)


class ScaledLinear(nn.Module):
    """z = c·W h + c_b·b, with c and c_b fixed by the parametrisation.

    Shapes: h (N, inputs), W (outputs, inputs), b (outputs,), z (N, outputs).
    """

    def __init__(self, inputs: int, outputs: int, weight: Scaling, bias: Scaling, use_bias: bool):
        super().__init__()
        self.weight_scaling, self.bias_scaling = weight, bias
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if use_bias else None

    def initialise(self, generator: torch.Generator, zero_bias: bool) -> None:
        """Draw weights and biases from centred normal distributions."""
        with torch.no_grad():
            self.weight.normal_(0, self.weight_scaling.std, generator=generator)
            if self.bias is not None:
                self.bias.normal_(0, self.bias_scaling.std, generator=generator)
                if zero_bias:
                    self.bias.zero_()

    def effective(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (outputs, inputs) and bias (outputs,) of the plain linear layer that this is."""
        weight = self.weight_scaling.multiplier * self.weight
        if self.bias is None:
            return weight, weight.new_zeros(len(weight))
        return weight, self.bias_scaling.multiplier * self.bias

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # The multiplier goes on the product: on W it would cost a pass over a larger tensor.
        z = F.linear(h, self.weight)
        if self.weight_scaling.multiplier != 1:
            z = z * self.weight_scaling.multiplier
        if self.bias is not None:
            z = z + self.bias_scaling.multiplier * self.bias
        return z


class MLP(nn.Module):
    """L hidden layers of equal width, then a linear one.

    h_0 is the flattened input, z_l = layer_l(h_{l-1}) (+ h_{l-1} with skips, from l = 2 on),
    h_l = activation(z_l), f = layer_{L+1}(h_L).
    """

    def __init__(self, inputs: int, config: Config, num_outputs: int = 1):
        super().__init__()
        width, kind = config.hidden_dim, config.initialization_method
        self.activation = ACTIVATIONS[config.activation_function]
        self.skip = config.use_skip_connections

        def layer(role: str, fan_in: int, fan_out: int) -> ScaledLinear:
            weight, bias = (of(kind, role, width) for of in (weight_scaling, bias_scaling))
            return ScaledLinear(fan_in, fan_out, weight, bias, config.use_bias)

        layers = [layer("input", inputs, width)]
        layers += [layer("hidden", width, width) for _ in range(config.num_hidden_layers - 1)]
        layers.append(layer("output", width, num_outputs))
        for i, module in enumerate(layers):
            seed = derive_seed(config.seed, "initialisation", i)
            generator = torch.Generator().manual_seed(seed)
            module.initialise(generator, config.use_zero_bias_initialization)
        self.layers = nn.ModuleList(layers)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers) - 1

    @property
    def classifier(self) -> nn.Module:
        """The last layer. It can be replaced by another one."""
        return self.layers[-1]

    def __setattr__(self, name, value):
        # nn.Module would store a module under this name beside `layers`, past a setter.
        if name == "classifier":
            self.layers[-1] = value
        else:
            super().__setattr__(name, value)

    def hidden(self, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """h_l, (N, width): 0 = the flattened input, None = the last, what the classifier sees."""
        h = x.flatten(1)
        for i, module in enumerate(self.layers[:-1][:layer]):
            z = module(h)
            h = self.activation(z + h if self.skip and i > 0 else z)
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs f, (N,) or (N, C), of inputs (N, ...)."""
        return self.classifier(self.hidden(x)).squeeze(1)
