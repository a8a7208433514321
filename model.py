"""The networks that are trained: an MLP in the maximal-update (muP) or neural-tangent (NTP)
parametrisation.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, derive_seed
from errors import ConfigError

ACTIVATIONS = {
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
    """The same for biases that start at random; at zero start the std does not count."""
    if parametrisation == "muP" and layer != "output":
        root = math.sqrt(width)
        return Scaling(root, 1 / root, 1 / root)
    return Scaling(1.0, 1.0, 1.0)


class ScaledLinear(nn.Module):
    """z = c·W h + c_b·b, with c and c_b fixed by the parametrisation.

    Shapes: h (N, inputs), W (outputs, inputs), b (outputs,), z (N, outputs).
    """

    def __init__(self, inputs: int, outputs: int, weight: Scaling, bias: Scaling | None):
        super().__init__()
        self.weight_scaling, self.bias_scaling = weight, bias
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def initialise(self, generator: torch.Generator, zero_bias: bool) -> None:
        """Draw weights and biases from centred normal distributions."""
        with torch.no_grad():
            self.weight.normal_(0, self.weight_scaling.std, generator=generator)
            if self.bias is not None:
                self.bias.normal_(0, self.bias_scaling.std, generator=generator)
                if zero_bias:
                    self.bias.zero_()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # The multiplier goes on the product: on W it would cost a pass over a larger tensor.
        z = F.linear(h, self.weight)
        if self.weight_scaling.multiplier != 1:
            z = z * self.weight_scaling.multiplier
        if self.bias is not None:
            z = z + self.bias_scaling.multiplier * self.bias
        return z


class MLP(nn.Module):
    """A scalar network f(x) with L hidden layers of equal width.

    h_0 is the flattened input, z_l = layer_l(h_{l-1}) (+ h_{l-1} with skips, from l = 2 on),
    h_l = activation(z_l), f = layer_{L+1}(h_L).
    """

    def __init__(self, inputs: int, config: Config):
        super().__init__()
        width, kind = config.hidden_dim, config.initialization_method
        self.activation = ACTIVATIONS[config.activation_function]
        self.skip = config.use_skip_connections

        def layer(role, fan_in, fan_out):
            bias = bias_scaling(kind, role, width) if config.use_bias else None
            return ScaledLinear(fan_in, fan_out, weight_scaling(kind, role, width), bias)

        self.layers = nn.ModuleList([layer("input", inputs, width)])
        self.layers += [layer("hidden", width, width) for _ in range(config.num_hidden_layers - 1)]
        self.layers.append(layer("output", width, 1))
        for i, module in enumerate(self.layers):
            seed = derive_seed(config.seed, "initialisation", i)
            generator = torch.Generator().manual_seed(seed)
            module.initialise(generator, config.use_zero_bias_initialization)
        if config.fix_final_layer:
            self.layers[-1].requires_grad_(False)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers) - 1

    def hidden(self, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """h_l, (N, width): 0 = the flattened input, None = the last, what the classifier sees."""
        h = x.flatten(1)
        for i, module in enumerate(self.layers[:-1][:layer]):
            z = module(h)
            h = self.activation(z + h if self.skip and i > 0 else z)
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs f, (N,), of inputs (N, ...)."""
        return self.layers[-1](self.hidden(x)).squeeze(1)


def build(config: Config, input_shape) -> nn.Module:
    """The network that the configuration asks for, initialised from its seed, on the CPU."""
    return MLP(math.prod(input_shape), config)


def parameter_groups(model: MLP, config: Config) -> list[dict]:
    """Trainable parameters with their learning rates, as torch's optimisers take them."""
    groups = []
    for module in model.layers:
        for parameter, scaling in (
            (module.weight, module.weight_scaling),
            (module.bias, module.bias_scaling),
        ):
            if parameter is not None and parameter.requires_grad:
                factor = scaling.adam_factor if config.optimizer == "Adam" else 1.0
                groups.append({"params": [parameter], "lr": config.learning_rate * factor})
    return groups


def choose_device(name: str) -> str:
    """The device for `device`; "auto" takes cuda or mps where there is one, else cpu.

    Raises `ConfigError` when the device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        usable = ", ".join(["auto", *(device for device in there if there[device])])
        raise ConfigError(f"device: given {name}, which torch cannot use here; allowed: {usable}")
    return name


def target_layer(config: Config) -> int | None:
    """`dfr_target_layer` as the argument of `hidden`."""
    name = config.dfr_target_layer
    return None if name == "last_hidden" else int(name.removeprefix("layer_"))
