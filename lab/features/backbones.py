"""Picture backbones as functions pictures → features, and where their weights come from.

`resolve(config)` checks the configuration against the model, `find_weights` says which file holds
its weights (fetching it when it can), `build` gives a `Backbone`. `resnet` gives the same ResNets
and weights for training. No downloaded code is run.
"""

import difflib
import hashlib
import inspect
import logging
import os
import pickle
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.fx.experimental import optimization

from lab.config.facts import RESNETS, VIT_BLOCKS
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.splits.pictures import IMAGENET_MEAN, IMAGENET_STD
from lab.system import files, zip_files
from lab.system.errors import ConfigError, DataError

log = logging.getLogger(f"spurious.{__name__}")

SIDE = 224
NETWORK_TIMEOUT = 5  # seconds until a host counts as out of reach
TORCHVISION = {
    "ResNet18": ("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
    "ResNet50": ("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
    "ViT_B_16": ("vit_b_16", torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1),
}
DINOV2 = {
    "DINOv2_ViT_S_14": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2_ViT_B_14": "vit_base_patch14_dinov2.lvd142m",
    "DINOv2_ViT_L_14": "vit_large_patch14_dinov2.lvd142m",
    "DINOv2_ViT_G_14": "vit_giant_patch14_dinov2.lvd142m",
}
RANDOM = "random"
# The keys that name a file with weights, each with the way out when there is none.
WITHOUT_WEIGHTS = {
    "feature_extractor_weights": "or try things with feature_extractor_weights: random",
    "pretrained_weights": "or start from random weights with pretrained: false",
}
EXTRACTOR_KEY = "feature_extractor_weights"
TRY_RANDOM = WITHOUT_WEIGHTS[EXTRACTOR_KEY]


@dataclass(frozen=True)
class Spec:
    """What is computed: everything that determines the features but weights and precision.

    architecture: the library's name of the model; layer: which output, as files are named after
    it; block, blocks: the ViT's block (from 0) and how many there are, None for other models;
    aggregation: of a ViT's tokens; mean, std: of the colour channels, in [0, 1].
    """

    name: str
    architecture: str
    layer: str
    block: int | None = None
    blocks: int | None = None
    aggregation: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def is_last(self) -> bool:
        """Whether the block is the ViT's last, whose tokens pass the final LayerNorm."""
        return self.block == self.blocks - 1


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

    def _numerics(self):
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
    if name in RESNETS:
        layer = config.feature_extractor_resnet_intermediate_layer
        size = config.feature_extractor_resnet_pooling_output_size
        layer = layer if layer == "avgpool" else f"{layer}-{size}x{size}"
        return Spec(name, TORCHVISION[name][0], layer)
    block, mode = (
        config.feature_extractor_vit_target_block,
        config.feature_extractor_vit_aggregation_mode,
    )
    if name in VIT_BLOCKS:
        blocks = VIT_BLOCKS[name]
        architecture = DINOV2.get(name) or TORCHVISION[name][0]
        layer = f"block{block % blocks}-{mode}"
        return Spec(name, architecture, layer, block % blocks, blocks, mode)
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
        cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=False)
        with torch.device("meta"):
            model = timm.create_model(architecture, **_size(cfg))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"{key}, which cannot be built for pictures of {SIDE} × {SIDE} ({_first_line(error)})"
        ) from None
    statistics = {"mean": tuple(cfg.mean), "std": tuple(cfg.std)}
    if not _has_blocks(model):
        return Spec(name, architecture, "pooled", **statistics)
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
    block %= blocks
    return Spec(name, architecture, f"block{block}-{mode}", block, blocks, mode, **statistics)


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
    """The file with the weights, None for random ones; fetched where missing and in reach.

    Looked for in torch.hub's checkpoints (torchvision's and the original DINOv2 files) and in the
    Hugging Face cache (timm's). Raises `DataError` when it is not there and cannot be fetched.
    """
    given = config.feature_extractor_weights
    if given == RANDOM:
        return None
    if given is not None:
        return _given_file(given, EXTRACTOR_KEY)
    if spec.name in TORCHVISION:
        return _torchvision_file(spec.name, EXTRACTOR_KEY)
    return _timm_file(spec)


def _given_file(given: str, key: str) -> Path:
    # Unlike Path's methods, without errors for users and names that there cannot be.
    path = os.path.expanduser(given)
    if not os.path.isfile(path):
        raise DataError(f"{key}: there is no file {path}")
    return Path(path)


def checkpoints() -> Path:
    """torch.hub's folder of downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _torchvision_file(name: str, key: str) -> Path:
    url = TORCHVISION[name][1].url
    path = checkpoints() / url.rpartition("/")[2]
    if not path.is_file():
        reason = _unreachable(url) or _download(url, path)
        if reason:
            raise DataError(
                f"{key}: {path.name}, the weights of {name}, is not in {path.parent} and cannot "
                f"be fetched ({reason}); get {url} where there is a network and copy it there, or "
                f"name the file as {key}, {WITHOUT_WEIGHTS[key]}"
            )
    return path


def _timm_file(spec: Spec) -> Path:
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    cfg = timm.get_pretrained_cfg(spec.architecture)
    url_file = checkpoints() / urllib.parse.urlparse(cfg.url or "").path.rpartition("/")[2]
    if cfg.url and url_file.suffix != ".npz" and url_file.is_file():
        return url_file
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_NAMES
    if repository:
        for name in names:
            found = huggingface_hub.try_to_load_from_cache(
                repository, name, revision=revision or None
            )
            if isinstance(found, str):
                return Path(found)
    if not repository and not cfg.url:
        raise DataError(
            f"feature_extractor_weights: there are no pretrained weights of {spec.name}; give a "
            f"file, {TRY_RANDOM}"
        )
    if not repository:
        reason = _unreachable(cfg.url) or _download(cfg.url, url_file)
    elif constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = _unreachable(constants.ENDPOINT)
        if not reason:
            found = _from_hub(repository, names, revision)
            if isinstance(found, Path):
                return found
            reason = found
    if not reason:
        return url_file
    places, sources = [], []
    if repository:
        places.append(f"{names[0]} of {repository} in {constants.HF_HUB_CACHE}")
        sources.append(f"run `hf download {repository} {names[0]}` where there is a network")
    if cfg.url:
        places.append(f"{url_file.name} in {url_file.parent}")
        sources.append(f"copy {cfg.url} to {url_file.parent}")
    raise DataError(
        f"feature_extractor_weights: the weights of {spec.name} are not there (looked for "
        f"{' and '.join(places)}) and cannot be fetched ({reason}); {', or '.join(sources)}, or "
        f"name the file as feature_extractor_weights, {TRY_RANDOM}"
    )


HUB_NAMES = ["model.safetensors", "pytorch_model.bin"]


def _from_hub(repository: str, names: list[str], revision: str) -> Path | str:
    """The fetched file, or why there is none."""
    import huggingface_hub
    from huggingface_hub import errors

    for name in names:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, name, revision=revision or None, etag_timeout=NETWORK_TIMEOUT
                )
            )
        except errors.EntryNotFoundError as error:
            reason = _first_line(error)
        except (OSError, errors.HfHubHTTPError, RuntimeError, ValueError) as error:
            return _first_line(error)
    return reason


def _unreachable(url: str) -> str | None:
    """Why the host of `url` does not answer, or None if it does; within `NETWORK_TIMEOUT`."""
    answer = []

    def ask():
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT):
                answer.append(None)
        except urllib.error.HTTPError as error:
            answer.append(None if error.code < 500 else str(error))
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, "reason", error)))

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return answer[0] if answer else f"no answer within {NETWORK_TIMEOUT} s"


def _download(url: str, path: Path) -> str | None:
    """Fetch `url` to `path`, complete or not at all; returns why it failed, None if it did not."""
    from tqdm import tqdm

    log.info("Fetching %s", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            files.complete(path) as temporary,
            open(temporary, "wb") as target,
            urllib.request.urlopen(url, timeout=4 * NETWORK_TIMEOUT) as source,
            tqdm(
                total=int(source.headers.get("Content-Length", 0)) or None,
                unit="B",
                unit_scale=True,
                desc=path.name,
                disable=None,
            ) as bar,
        ):
            while block := source.read(1 << 20):
                target.write(block)
                bar.update(len(block))
            target.flush()
            if bar.total and target.tell() != bar.total:
                raise OSError(f"only {target.tell()} of {bar.total} bytes came")
            _check_name(path.name, temporary)
    except OSError as error:
        return str(error)
    return None


def _check_name(name: str, path: Path) -> None:
    """Raises `OSError` unless the file has the hash in its name (`resnet18-f37072fd.pth`)."""
    wanted = re.search(r"-([0-9a-f]{8,})\.", name)
    if wanted and not file_hash(path).startswith(wanted[1]):
        raise OSError(f"the SHA-256 of {name} does not start with {wanted[1]}")


def file_hash(path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(config: Config, spec: Spec, weights: Path | None, device: str) -> Backbone:
    """The backbone with its weights, ready on `device`; layers that are not needed are cut off.

    Random weights come from `seed`. Raises `DataError` when the file is no such model's weights.
    """
    if weights is None:
        log.warning("The backbone %s has random weights: for trying things only", spec.name)
    make = _torchvision_net if spec.name in TORCHVISION else _timm_net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "backbone"))
        with _unsuitable(weights, spec.name, EXTRACTOR_KEY):
            net = make(config, spec, weights)
    return Backbone(net, spec, device, choose_precision(config, device))


@contextmanager
def _unsuitable(weights: Path | None, name: str, key: str):
    """What goes wrong inside, while weights are loaded, becomes a `DataError`."""
    try:
        if weights is not None:
            _refuse_packed(weights)
        yield
    except (
        RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError,
        MemoryError, pickle.UnpicklingError, safetensors.SafetensorError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        if weights is None:
            raise
        reason = _first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            # torch's and timm's own texts are long and advise to switch the safety off.
            reason = "not a file of weights only; save model.state_dict(), or as .safetensors"
        raise DataError(
            f"{key}: {weights} does not hold the weights of {name} ({reason})"
        ) from None


def resnet(config: Config) -> nn.Module:
    """The ResNet of `model_name`: standardised pictures (B, 3, H, W) → features (B, d) float32.

    With `pretrained` its weights come from `pretrained_weights` or the libraries, else from
    torch's global generator. Raises `DataError` when they are missing or of another model.
    """
    name, weights = config.model_name, None
    if config.pretrained:
        given, key = config.pretrained_weights, "pretrained_weights"
        weights = _torchvision_file(name, key) if given is None else _given_file(given, key)
        log.info("%s starts from %s, SHA-256 %s", name, weights, file_hash(weights))
    with _unsuitable(weights, name, "pretrained_weights"):
        model = _torchvision_model(TORCHVISION[name][0], weights)
    model.fc = nn.Identity()
    return model


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch's first line only says that something is wrong with a class, the next one what.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [repr(error)])[0]
    return text if len(text) <= 200 else text[:197] + "..."


def _refuse_packed(path: Path) -> None:
    """Raises `zipfile.BadZipFile` for a zip file that holds more than its own size.

    torch.save stores without packing, and torch.load allocates what a member is said to hold.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    unpacked = sum(member.file_size for member in zip_files.members(path))
    size = path.stat().st_size
    if unpacked > size:
        raise zipfile.BadZipFile(f"{unpacked} bytes packed into {size}; torch.save packs nothing")


def _torchvision_model(architecture: str, weights: Path | None) -> nn.Module:
    """torchvision's whole model with these weights, its classification head aside."""
    model = getattr(torchvision.models, architecture)(weights=None)
    if weights is not None:
        # The head is not used, so a file may lack it or have one for other classes.
        heads = ("fc.", "heads.")
        state = {k: v for k, v in _read_state(weights).items() if not k.startswith(heads)}
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith(heads)]
        if missing or unexpected:
            raise RuntimeError(
                f"{len(missing)} tensors missing, {len(unexpected)} of another model, such as "
                + (missing + unexpected)[0]
            )
    return model


def _torchvision_net(config: Config, spec: Spec, weights: Path | None) -> nn.Module:
    model = _torchvision_model(spec.architecture, weights)
    if spec.block is not None:
        return _TorchvisionViT(model, spec)
    layer, _, size = spec.layer.partition("-")
    last, size = (4, 1) if layer == "avgpool" else (int(layer[5:]), int(size.partition("x")[0]))
    stages = [getattr(model, f"layer{i}") for i in range(1, last + 1)]
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(size), nn.Flatten())


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state.get("model", state))
    return {name.removeprefix("module."): value for name, value in state.items()}


class _TorchvisionViT(nn.Module):
    """torchvision's ViT up to one block, its tokens made one vector."""

    def __init__(self, model: nn.Module, spec: Spec):
        super().__init__()
        model.encoder.layers = model.encoder.layers[: spec.block + 1]
        if not spec.is_last:
            model.encoder.ln = nn.Identity()
        del model.heads
        self.model, self.mode = model, spec.aggregation

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
    model = timm.create_model(
        spec.architecture,
        pretrained=weights is not None,
        pretrained_cfg_overlay=source,
        **_size(cfg),
    )
    if spec.block is not None:
        return _TimmViT(model, spec)
    model.reset_classifier(0)
    return model


class _TimmViT(nn.Module):
    """A ViT of timm up to one block, its tokens made one vector; register tokens are left out."""

    def __init__(self, model: nn.Module, spec: Spec):
        super().__init__()
        model.prune_intermediate_layers([spec.block], prune_norm=not spec.is_last)
        self.model, self.spec = model, spec
        self.prefixed = getattr(model, "num_prefix_tokens", 0) > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (tokens,) = self.model.forward_intermediates(
            x,
            indices=[self.spec.block],
            return_prefix_tokens=self.prefixed,
            norm=self.spec.is_last,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = tokens if self.prefixed else (tokens, None)
        return _aggregate(patches, prefix, self.spec.aggregation)


def _aggregate(patches: torch.Tensor, prefix: torch.Tensor | None, mode: str) -> torch.Tensor:
    """One vector (B, d) of patch tokens (B, n, d) and prefix tokens, of which CLS is the first."""
    if mode == "cls_token":
        return prefix[:, 0]
    if mode == "mean_pool_patch":
        return patches.float().mean(1)
    return torch.cat([prefix[:, :1], patches], dim=1).float().mean(1)


def _folded(net: nn.Module) -> nn.Module:
    """The net with each batch norm folded into the convolution before it."""
    try:
        return optimization.fuse(net, inplace=True)
    except Exception as error:  # tracing runs the net's own code, which may fail in any way
        log.debug("Batch norm is not folded, the net cannot be traced: %s", _first_line(error))
        return net
