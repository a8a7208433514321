"""Picture backbones as functions pictures → features.

`resolve(config)` checks the configuration against the model, `find_weights` says which file holds
its weights (fetching it when it can), `build` gives a `Backbone`. No downloaded code is run.
"""

import difflib
import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import optimization

from lab.config.registry import Backbone as BackboneRecord
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.networks import weights as weight_files
from lab.networks.weights import EXTRACTOR_KEY, TORCHVISION
from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD
from lab.system.errors import ConfigError

log = logging.getLogger(f"spurious.{__name__}")

SIDE = 224
DINOV2 = {
    "DINOv2_ViT_S_14": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2_ViT_B_14": "vit_base_patch14_dinov2.lvd142m",
    "DINOv2_ViT_L_14": "vit_large_patch14_dinov2.lvd142m",
    "DINOv2_ViT_G_14": "vit_giant_patch14_dinov2.lvd142m",
}
RANDOM = "random"


@dataclass(frozen=True)
class Block:
    """A ViT's block whose tokens are taken: its number (from 0), of how many, their aggregation."""

    number: int
    of: int
    aggregation: str

    @property
    def is_last(self) -> bool:
        """Whether it is the last, whose tokens pass the final LayerNorm."""
        return self.number == self.of - 1

    def __str__(self) -> str:
        return f"block{self.number}-{self.aggregation}"


@dataclass(frozen=True)
class Spec:
    """What is computed: everything that determines the features but weights and precision.

    architecture: the library's name of the model; layer: which output, as files are named after
    it; block: of a ViT, None for other models; mean, std: of the colour channels, in [0, 1].
    """

    name: str
    architecture: str
    layer: str
    block: Block | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Backbone:
    """Pictures (B, 3, 224, 224) uint8 → features (B, d) float32, on `device`."""

    def __init__(self, net: nn.Module, spec: Spec, device: str, precision: str):
        self.device, self.precision = torch.device(device), precision
        self.convolutional = spec.block is None
        net = net.eval().requires_grad_(False)
        if self.convolutional and self.device.type == "cpu":
            net = _folded(net)
        if self.convolutional:
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)
        self.net = net.to(self.device)
        self.mean = torch.tensor(spec.mean, device=self.device).view(3, 1, 1) * 255
        self.std = torch.tensor(spec.std, device=self.device).view(3, 1, 1) * 255

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        inputs = pictures.to(self.device, non_blocking=True).float()
        inputs.sub_(self.mean).div_(self.std)
        if self.convolutional:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with (
            self._numerics(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            return self.net(inputs).flatten(1).float().contiguous()

    def _numerics(self) -> AbstractContextManager:
        """On CUDA: the same kernels every time, and no TensorFloat32 in what is called fp32."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def choose_precision(config: Config, device: str) -> str:
    """fp32 or bf16."""
    if config.feature_extractor_precision != "auto":
        return config.feature_extractor_precision
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def resolve(config: Config) -> Spec:
    """The model and layer that the configuration names.

    Raises `ConfigError` for a model, block or aggregation that does not exist, with what does.
    """
    name = config.feature_extractor_model_name
    record = config.catalogue.of(BackboneRecord).get(name)
    if record and record.maps:
        layer: str = config.feature_extractor_resnet_intermediate_layer
        size = config.feature_extractor_resnet_pooling_output_size
        layer = layer if layer == "avgpool" else f"{layer}-{size}x{size}"
        return Spec(name, TORCHVISION[name][0], layer)
    block, mode = (
        config.feature_extractor_vit_target_block,
        config.feature_extractor_vit_aggregation_mode,
    )
    if record and record.blocks:
        blocks = record.blocks
        architecture = DINOV2.get(name) or TORCHVISION[name][0]
        tokens = Block(block % blocks, blocks, mode)
        return Spec(name, architecture, str(tokens), tokens)
    return _resolve_timm(name, name.removeprefix("timm:"), block, mode)


def _resolve_timm(name: str, architecture: str, block: int, mode: str) -> Spec:
    import timm

    key = f"feature_extractor_model_name: given {name}"
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(
            f"{key}, which timm {timm.__version__} does not have"
            + (f"; did you mean timm:{', timm:'.join(near)}?" if near else "")
        )
    try:
        cfg: Any = timm.get_pretrained_cfg(architecture, allow_unregistered=False)
        with torch.device("meta"):
            model: Any = timm.create_model(architecture, **_size(cfg))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"{key}, which cannot be built for pictures of {SIDE} × {SIDE} "
            f"({weight_files.first_line(error)})"
        ) from None
    mean, std = tuple(cfg.mean), tuple(cfg.std)
    if not _has_blocks(model):
        return Spec(name, architecture, "pooled", mean=mean, std=std)
    blocks = len(model.blocks)
    problems = []
    if not -blocks <= block < blocks:
        problems.append(
            f"feature_extractor_vit_target_block: given {block}, but {name} has {blocks} blocks; "
            f"allowed: 0 to {blocks - 1}, or -{blocks} to -1"
        )
    if mode != "mean_pool_patch" and not _has_cls_token(model):
        problems.append(
            f"feature_extractor_vit_aggregation_mode: given {mode}, but {name} has no CLS token; "
            "allowed: mean_pool_patch"
        )
    if problems:
        raise ConfigError(*problems)
    tokens = Block(block % blocks, blocks, mode)
    return Spec(name, architecture, str(tokens), tokens, mean, std)


def _size(cfg) -> dict:
    """The argument that makes a timm model of another fixed input size take ours."""
    other = cfg.fixed_input_size and tuple(cfg.input_size[1:]) != (SIDE, SIDE)
    return {"img_size": SIDE} if other else {}


def _has_blocks(model: nn.Module) -> bool:
    """Whether a timm model is a ViT: blocks whose tokens can be taken, prefix tokens apart."""
    # Other nets (EfficientNet) call their stages blocks too.
    forward = getattr(model, "forward_intermediates", None)
    return (
        hasattr(model, "blocks")
        and forward is not None
        and "return_prefix_tokens" in inspect.signature(forward).parameters
    )


def _has_cls_token(model: nn.Module) -> bool:
    return getattr(getattr(model, "embeds", model), "cls_token", None) is not None


def find_weights(config: Config, spec: Spec) -> Path | None:
    """The file with the weights, None for random ones; fetched if it is missing and reachable.

    Raises `DataError` when it is missing and cannot be fetched, see `lab.networks.weights`.
    """
    given = config.feature_extractor_weights
    if given == RANDOM:
        return None
    if given is not None:
        return weight_files.given_file(given, EXTRACTOR_KEY)
    if spec.name in TORCHVISION:
        return weight_files.torchvision_file(spec.name, EXTRACTOR_KEY)
    return weight_files.timm_file(spec.name, spec.architecture)


def build(config: Config, spec: Spec, weights: Path | None, device: str) -> Backbone:
    """The backbone with its weights, ready on `device`; layers that are not needed are cut off.

    Random weights come from `seed`. Raises `DataError` when the file is no such model's weights.
    """
    if weights is None:
        log.warning("The backbone %s has random weights: for trying things only", spec.name)
    make = _torchvision_net if spec.name in TORCHVISION else _timm_net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "backbone"))
        with weight_files.refusing_unsuitable(weights, spec.name, EXTRACTOR_KEY):
            net = make(config, spec, weights)
    return Backbone(net, spec, device, choose_precision(config, device))


def _torchvision_net(config: Config, spec: Spec, weights: Path | None) -> nn.Module:
    model = weight_files.torchvision_model(spec.architecture, weights)
    if spec.block is not None:
        return _TorchvisionViT(model, spec.block)
    layer, _, pooled = spec.layer.partition("-")
    last, size = (4, 1) if layer == "avgpool" else (int(layer[5:]), int(pooled.partition("x")[0]))
    stages = [getattr(model, f"layer{i}") for i in range(1, last + 1)]
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(size), nn.Flatten())


class _TorchvisionViT(nn.Module):
    """torchvision's ViT up to one block, its tokens made one vector."""

    model: Any

    def __init__(self, model: Any, block: Block):
        super().__init__()
        model.encoder.layers = model.encoder.layers[: block.number + 1]
        if not block.is_last:
            model.encoder.ln = nn.Identity()
        del model.heads
        self.model, self.mode = model, block.aggregation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.model._process_input(x)
        cls = self.model.class_token.expand(len(x), -1, -1)
        tokens = self.model.encoder(torch.cat([cls, patches], dim=1))
        return _aggregate(tokens[:, 1:], tokens[:, :1], self.mode)


def _timm_net(config: Config, spec: Spec, weights: Path | None) -> nn.Module:
    import timm

    cfg = timm.get_pretrained_cfg(spec.architecture)
    # With the file's own classes timm loads strictly: no layer stays random.
    source = {"file": str(weights), "source": ""} if weights is not None else {}
    model: Any = timm.create_model(
        spec.architecture,
        pretrained=weights is not None,
        pretrained_cfg_overlay=source,
        **_size(cfg),
    )
    if spec.block is not None:
        return _TimmViT(model, spec.block)
    model.reset_classifier(0)
    return model


class _TimmViT(nn.Module):
    """A ViT of timm up to one block, its tokens made one vector; register tokens are left out."""

    model: Any

    def __init__(self, model: Any, block: Block):
        super().__init__()
        model.prune_intermediate_layers([block.number], prune_norm=not block.is_last)
        self.model, self.block = model, block
        self.prefixed = getattr(model, "num_prefix_tokens", 0) > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (tokens,) = self.model.forward_intermediates(
            x,
            indices=[self.block.number],
            return_prefix_tokens=self.prefixed,
            norm=self.block.is_last,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = tokens if self.prefixed else (tokens, None)
        return _aggregate(patches, prefix, self.block.aggregation)


def _aggregate(patches: torch.Tensor, prefix: torch.Tensor | None, mode: str) -> torch.Tensor:
    """One vector (B, d) of patch tokens (B, n, d) and prefix tokens, of which CLS is the first."""
    if mode == "mean_pool_patch":
        return patches.float().mean(1)
    assert prefix is not None  # `resolve` refuses the other modes without it
    if mode == "cls_token":
        return prefix[:, 0]
    return torch.cat([prefix[:, :1], patches], dim=1).float().mean(1)


def _folded(net: nn.Module) -> nn.Module:
    """The net with each batch norm folded into the convolution before it."""
    try:
        return optimization.fuse(net, inplace=True)
    except Exception as error:  # tracing runs the net's own code, which may fail in any way
        log.debug(
            "Batch norm is not folded, the net cannot be traced: %s", weight_files.first_line(error)
        )
        return net
