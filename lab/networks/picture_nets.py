"""Networks that are trained end to end on pictures: a small ConvNet and torchvision's ResNets.

A network is a body that makes features, and a linear layer after it. A body comes from a builder
`(config, input_shape) -> (body, number of its features)`, which draws from torch's generator.
"""

import math

import torch
from torch import nn

from lab.config.schema import Config
from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD


class PictureNet(nn.Module):
    """A body that makes features (N, d), then a linear layer.

    Inputs are pictures (N, C, H, W) or vectors (N, D).

    max_batch: how many inputs a forward and a backward pass may hold in memory at once;
    mixed_precision: whether the body computes in bfloat16 while training on CUDA; gradcam_layer:
    the last convolution block, as a dotted path in the body, None without convolutions.
    """

    def __init__(
        self,
        body: nn.Module,
        classifier: nn.Linear,
        max_batch: int,
        mixed_precision: bool,
        gradcam_layer: str | None = None,
    ):
        super().__init__()
        # In this memory format convolutions are faster, on CPUs and on GPUs.
        self.body = body.to(memory_format=torch.channels_last)
        self.classifier = classifier
        self.max_batch, self.mixed_precision = max_batch, mixed_precision
        self.gradcam_layer = gradcam_layer

    def hidden(self, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Features: None = what the classifier sees, 0 = the flattened input."""
        if layer == 0:
            return x.flatten(1)
        if layer is not None:
            raise ValueError(f"hidden layer {layer} of a network whose layers have no numbers")
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        mixed = self.mixed_precision and self.training and x.is_cuda
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            h = self.body(x)
        return h.float() if mixed else h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs f, (N,) or (N, C), of inputs (N, ...)."""
        return self.classifier(self.hidden(x)).squeeze(1)


class Standardised(nn.Module):
    """Pictures (N, 1 or 3, H, W) as ImageNet's ResNets take them: RGB, standardised by channel.

    Pictures of unit norm are first scaled to the norm that ImageNet's have on average at this size.
    """

    mean: torch.Tensor
    std: torch.Tensor

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
    channels, height, width = _pictures(config, input_shape)
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
    from lab.networks import weights  # with torchvision, slow to import

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.channels_standardised:
        mean, std = (0.0,) * 3, (1.0,) * 3
    shape = _pictures(config, input_shape)
    prepare = Standardised(shape, config.normalize_inputs, mean, std)
    body, features = weights.resnet(config)
    return nn.Sequential(prepare, body), features


def _pictures(config: Config, input_shape) -> tuple[int, int, int]:
    """The shape, if it is that of a picture for these networks; else raises `ValueError`."""
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < 4:
        raise ValueError(
            f"{config.model_name} takes pictures (1 or 3, H ≥ 4, W ≥ 4), not {input_shape}"
        )
    return input_shape
