"""The networks that are trained: an MLP in the maximal-update (muP) or neural-tangent (NTP)
parametrisation, and a small ConvNet and ResNets, end to end on pictures.

All of them have `hidden(x, layer)`, the features, and `classifier`, the linear layer after them,
whose one output (N,) or several outputs (N, C) `forward` gives.

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

import copy
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lab.config.facts import BATCH_NORM
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.splits.pictures import IMAGENET_MEAN, IMAGENET_STD
from lab.system import distributed, memory
from lab.system.errors import ConfigError

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

        def layer(role, fan_in, fan_out):
            bias = bias_scaling(kind, role, width) if config.use_bias else None
            return ScaledLinear(fan_in, fan_out, weight_scaling(kind, role, width), bias)

        self.layers = nn.ModuleList([layer("input", inputs, width)])
        self.layers += [layer("hidden", width, width) for _ in range(config.num_hidden_layers - 1)]
        self.layers.append(layer("output", width, num_outputs))
        for i, module in enumerate(self.layers):
            seed = derive_seed(config.seed, "initialisation", i)
            generator = torch.Generator().manual_seed(seed)
            module.initialise(generator, config.use_zero_bias_initialization)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers) - 1

    @property
    def classifier(self) -> ScaledLinear:
        """The last layer. Another one can be put in its place."""
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


class PictureNet(nn.Module):
    """A network for pictures (N, C, H, W): a body that makes features (N, d), then a linear layer.

    max_batch: how many pictures a forward and a backward pass may hold in memory at once;
    mixed_precision: whether the body computes in bfloat16 while training on CUDA.
    """

    def __init__(self, body: nn.Module, classifier: nn.Linear, max_batch: int, mixed_precision):
        super().__init__()
        # In this memory format convolutions are faster, on CPUs and on GPUs.
        self.body = body.to(memory_format=torch.channels_last)
        self.classifier = classifier
        self.max_batch, self.mixed_precision = max_batch, mixed_precision

    def hidden(self, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Features: None = what the classifier sees, 0 = the flattened input."""
        if layer == 0:
            return x.flatten(1)
        if layer is not None:
            raise ValueError(f"hidden layer {layer} of a network whose layers have no numbers")
        mixed = self.mixed_precision and self.training and x.is_cuda
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            h = self.body(x.contiguous(memory_format=torch.channels_last))
        return h.float() if mixed else h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs f, (N,) or (N, C), of pictures (N, C, H, W)."""
        return self.classifier(self.hidden(x)).squeeze(1)


class Standardised(nn.Module):
    """Pictures (N, 1 or 3, H, W) as ImageNet's ResNets take them: RGB, standardised by channel.

    Pictures of unit norm are first scaled to the norm that ImageNet's have on average at this size.
    """

    def __init__(self, input_shape, unit_norm: bool, mean, std):
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        size = 3 * math.prod(input_shape[1:])
        self.scale = (size * (mean**2 + std**2).mean()).sqrt().item() if unit_norm else 1.0
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A single channel is broadcast to three.
        return (x * self.scale - self.mean) / self.std


def convnet(config: Config, input_shape) -> tuple[nn.Module, int]:
    """A body of two convolutions and a linear layer, and the number of its features."""
    channels, height, width = input_shape
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), config.latent_size),
        nn.ReLU(),
    )
    return body, config.latent_size


def resnet(config: Config, input_shape) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its last layer, and the number of its features.

    Raises `DataError` when pretrained weights are missing or of another model.
    """
    from lab.features import backbones  # with torchvision, slow to import

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.channels_standardised:
        mean, std = (0.0,) * 3, (1.0,) * 3
    prepare = Standardised(input_shape, config.normalize_inputs, mean, std)
    return nn.Sequential(prepare, backbones.resnet(config)), RESNET_FEATURES[config.model_name]


PICTURE_NETS = {"ConvNet": convnet, "ResNet18": resnet, "ResNet50": resnet}
RESNET_FEATURES = {"ResNet18": 512, "ResNet50": 2048}
BATCH_BYTES = 2**31  # of a forward and a backward pass in evaluation and analyses
BYTES_PER_PIXEL = {"ConvNet": 600, "ResNet18": 700, "ResNet50": 2000}  # measured on a CPU


def build(config: Config, input_shape, num_outputs: int = 1) -> nn.Module:
    """The network that the configuration asks for, initialised from its seed, on the CPU.

    input_shape: of one input; num_outputs: see `num_outputs`. The random state of torch is neither
    used nor changed. Raises `DataError` when pretrained weights are missing or of another model.
    """
    if config.model_name == "MLP":
        _check_memory(config, math.prod(input_shape), num_outputs)
        network = MLP(math.prod(input_shape), config, num_outputs)
    else:
        network = _picture_net(config, tuple(input_shape), num_outputs)
    if config.fix_final_layer:
        network.classifier.requires_grad_(False)
    return network


def _check_memory(config: Config, inputs: int, num_outputs: int) -> None:
    """Raises `ConfigError` if an MLP does not fit into the memory, before it takes it."""
    width, depth = config.hidden_dim, config.num_hidden_layers
    weights = width * (inputs + (depth - 1) * width + num_outputs)
    needed = memory.training_bytes(weights, config.optimizer, config.momentum)
    there = memory.available()
    if config.device != "cuda" and there and needed > there:
        raise ConfigError(
            f"hidden_dim, num_hidden_layers: given {width}, {depth}, which with {inputs} inputs is "
            f"{memory.shown(needed)} for parameters, gradients and optimizer, but "
            f"{memory.shown(there)} are there; allowed: less"
        )


def build_for(config: Config, splits) -> nn.Module:
    """The network for the pictures or features and the labels of these `splits.Splits`."""
    outputs = num_outputs(config, splits.num_classes, len(splits.tasks))
    network = build(config, splits.train.inputs.shape[1:], outputs)
    if distributed.grouped() and config.model_name in BATCH_NORM:
        if dist.get_backend() == "gloo":
            raise ConfigError(
                f"model_name: given {config.model_name}, whose batch norm works over several "
                "processes on GPUs only; allowed here: MLP, ConvNet"
            )
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def _picture_net(config: Config, input_shape, num_outputs: int) -> PictureNet:
    name = config.model_name
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < 4:
        raise ValueError(f"{name} takes pictures (1 or 3, H ≥ 4, W ≥ 4), not {input_shape}")
    # For CUDA: the same kernels every time, and no TensorFloat32 in what is called float32.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    with _seeded(config.seed, "initialisation", "body"):
        body, features = PICTURE_NETS[name](config, input_shape)
    with _seeded(config.seed, "initialisation", "classifier"):
        classifier = nn.Linear(features, num_outputs)
    picture = BYTES_PER_PIXEL[name] * math.prod(input_shape[1:])
    return PictureNet(body, classifier, max(1, BATCH_BYTES // picture), config.mixed_precision)


@contextmanager
def _seeded(*purpose):
    """torch's own initialisations draw from the seed for this purpose inside."""
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone: torch.manual_seed would set those of GPUs for good.
        torch.default_generator.manual_seed(derive_seed(*purpose))
        yield


def fresh_classifier(network, config: Config, *purpose) -> nn.Module:
    """A last layer like the network's, trainable, initialised from the seed for this purpose.

    On the CPU, so that it starts alike on every device; the network keeps its own.
    """
    layer = copy.deepcopy(network.classifier).cpu().requires_grad_(True)
    if isinstance(layer, ScaledLinear):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, *purpose))
        layer.initialise(generator, config.use_zero_bias_initialization)
    else:
        with _seeded(config.seed, *purpose):
            layer.reset_parameters()
    return layer


def num_outputs(config: Config, num_classes: int, num_tasks: int = 1) -> int:
    """How many outputs the loss takes: one a task for labels -1 and +1, else one a class."""
    return num_classes if config.loss_function == "cross_entropy" else num_tasks


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Trainable parameters with their learning rates, as torch's optimisers take them."""
    if not isinstance(model, MLP):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable, "lr": config.learning_rate}]
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
