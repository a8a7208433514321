"""The network that a configuration asks for, its last layer, and what its optimiser takes.

Every network has `hidden(x, layer)`, the features, and `classifier`, the linear layer after them,
whose one output (N,) or several outputs (N, C) `forward` gives.
"""

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lab.config.registry import Network
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.networks.mlp import MLP, ScaledLinear
from lab.networks.picture_nets import PictureNet
from lab.system import distributed, memory
from lab.system.errors import ConfigError

BATCH_BYTES = 2**31  # of a forward and a backward pass in evaluation and analyses


def build(config: Config, input_shape, num_outputs: int = 1) -> nn.Module:
    """The network that the configuration asks for, initialised from its seed, on the CPU.

    input_shape: of one input; num_outputs: see `num_outputs`. The random state of torch is neither
    used nor changed. Raises `DataError` when pretrained weights are missing or of another model.
    """
    if config.network.whole:
        _check_memory(config, math.prod(input_shape), num_outputs)
        network = config.network.load()(math.prod(input_shape), config, num_outputs)
    else:
        network = _with_body(config, tuple(input_shape), num_outputs)
    if config.fix_final_layer:
        network.classifier.requires_grad_(False)
    return network


def _check_memory(config: Config, inputs: int, num_outputs: int) -> None:
    """Raises `ConfigError` if an MLP does not fit into the memory, before it takes it."""
    width, depth = config.hidden_dim, config.num_hidden_layers
    weights = width * (inputs + (depth - 1) * width + num_outputs)
    needed = memory.training_bytes(weights, config.optimizer, config.momentum)
    available = memory.available()
    if config.device != "cuda" and available and needed > available:
        raise ConfigError(
            f"hidden_dim, num_hidden_layers: given {width}, {depth}, which with {inputs} inputs is "
            f"{memory.shown(needed)} for parameters, gradients and optimizer, but only "
            f"{memory.shown(available)} are available; allowed: less"
        )


def _with_body(config: Config, input_shape, num_outputs: int) -> PictureNet:
    record = config.network
    # For CUDA: the same kernels every time, and no TensorFloat32 in what is called float32.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    with seeded(config.seed, "initialisation", "body"):
        module, features = record.load()(config, input_shape)
    with seeded(config.seed, "initialisation", "classifier"):
        classifier = nn.Linear(features, num_outputs)
    # Vectors are small: only pictures limit a batch.
    max_batch = sys.maxsize
    if record.pictures:
        max_batch = max(1, BATCH_BYTES // (record.bytes_per_pixel * math.prod(input_shape[1:])))
    return PictureNet(module, classifier, max_batch, config.mixed_precision, record.gradcam_layer)


def build_for(config: Config, splits) -> nn.Module:
    """The network for the pictures or features and the labels of these `splits.Splits`."""
    outputs = num_outputs(config, splits.num_classes, len(splits.tasks))
    network = build(config, splits.train.inputs.shape[1:], outputs)
    if distributed.grouped() and config.network.batch_norm:
        if dist.get_backend() == "gloo":
            known = config.catalogue.of(Network)
            others = ", ".join(name for name, record in known.items() if not record.batch_norm)
            raise ConfigError(
                f"model_name: given {config.model_name}, whose batch norm works over several "
                f"processes on GPUs only; allowed here: {others}"
            )
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


@contextmanager
def seeded(*purpose) -> Iterator[None]:
    """Inside, torch's own initialisations draw from the seed for this purpose."""
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone: torch.manual_seed would set those of GPUs for good.
        torch.default_generator.manual_seed(derive_seed(*purpose))
        yield


def fresh_classifier(network, config: Config, *purpose) -> ScaledLinear | nn.Linear:
    """A last layer like the network's, trainable, initialised from the seed for this purpose.

    On the CPU, so that it starts alike on every device; the network keeps its own.
    """
    layer = copy.deepcopy(network.classifier).cpu().requires_grad_(True)
    if isinstance(layer, ScaledLinear):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, *purpose))
        layer.initialise(generator, config.use_zero_bias_initialization)
    else:
        with seeded(config.seed, *purpose):
            layer.reset_parameters()
    return layer


def num_outputs(config: Config, num_classes: int, num_tasks: int = 1) -> int:
    """How many outputs the loss takes: one a task for labels -1 and +1, else one a class."""
    return num_classes if config.loss.class_outputs else num_tasks


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Trainable parameters with their learning rates, as torch's optimisers take them.

    AdamW shrinks a weight by learning rate × weight decay in a step. In muP the rate of a layer has
    a factor that falls with the width; the decay is divided by it, so that the shrinkage is that of
    `learning_rate` and `weight_decay` at every width, which transfer of both needs (Yang et al.,
    2021, Appendix B.3).
    """
    if not isinstance(model, MLP):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable, "lr": config.learning_rate}]
    groups = []
    for module in model.layers:
        assert isinstance(module, ScaledLinear)
        for parameter, scaling in (
            (module.weight, module.weight_scaling),
            (module.bias, module.bias_scaling),
        ):
            if parameter is not None and parameter.requires_grad:
                factor = scaling.adam_factor if config.optimizer == "Adam" else 1.0
                group = {"params": [parameter], "lr": config.learning_rate * factor}
                if config.optimizer == "Adam":
                    assert config.weight_decay is not None  # resolved on reading
                    group["weight_decay"] = config.weight_decay / factor
                groups.append(group)
    return groups
