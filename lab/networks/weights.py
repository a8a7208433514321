"""Pretrained weights: where they are found, how they are fetched, reading them with distrust.

Shared by the ResNets that are trained and by the frozen backbones. torchvision's weights and the
original DINOv2 files are looked for in torch.hub's checkpoints, timm's in the Hugging Face cache.
Files hold tensors only: nothing in them is unpickled as code, and no downloaded code is run.
"""

import hashlib
import logging
import os
import pickle
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from lab.config.schema import Config
from lab.system import files, zip_files
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

NETWORK_TIMEOUT = 5  # seconds until a host is taken to be unreachable
TORCHVISION = {
    "ResNet18": ("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
    "ResNet50": ("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
    "ViT_B_16": ("vit_b_16", torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1),
}
# The keys that name a file with weights, each with the alternative where there is none.
WITHOUT_WEIGHTS = {
    "feature_extractor_weights": "or try things with feature_extractor_weights: random",
    "pretrained_weights": "or start from random weights with pretrained: false",
}
EXTRACTOR_KEY = "feature_extractor_weights"
HUB_NAMES = ["model.safetensors", "pytorch_model.bin"]


def resnet(config: Config) -> tuple[nn.Module, int]:
    """The ResNet of `model_name`, standardised pictures (B, 3, H, W) → features (B, d), and d.

    With `pretrained` its weights come from `pretrained_weights` or the libraries, else from
    torch's global generator. Raises `DataError` when they are missing or of another model.
    """
    name, weights = config.model_name, None
    if config.pretrained:
        given, key = config.pretrained_weights, "pretrained_weights"
        weights = torchvision_file(name, key) if given is None else given_file(given, key)
        log.info("%s starts from %s, SHA-256 %s", name, weights, file_hash(weights))
    with refusing_unsuitable(weights, name, "pretrained_weights"):
        model = torchvision_model(TORCHVISION[name][0], weights)
    features = model.fc.in_features
    model.fc = nn.Identity()
    return model, features


def given_file(given: str, key: str) -> Path:
    """The file that the configuration names. Raises `DataError` if it does not exist."""
    # Unlike Path's methods, without errors for impossible users and names.
    path = os.path.expanduser(given)
    if not os.path.isfile(path):
        raise DataError(f"{key}: there is no file {path}")
    return Path(path)


def checkpoints() -> Path:
    """torch.hub's folder of downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def torchvision_file(name: str, key: str) -> Path:
    """The file with torchvision's weights of this model, fetched if it is missing and reachable.

    Raises `DataError`, with the ways out, if it is missing and cannot be fetched.
    """
    url = TORCHVISION[name][1].url
    path = checkpoints() / url.rpartition("/")[2]
    if not path.is_file():
        reason = unreachable(url) or _download(url, path)
        if reason:
            raise DataError(
                f"{key}: {path.name}, the weights of {name}, is not in {path.parent} and cannot "
                f"be fetched ({reason}); get {url} where there is a network and copy it there, or "
                f"name the file as {key}, {WITHOUT_WEIGHTS[key]}"
            )
    return path


def timm_file(name: str, architecture: str) -> Path:
    """The file with timm's weights of this architecture; as `torchvision_file`, for this name."""
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    cfg: Any = timm.get_pretrained_cfg(architecture)
    url_file = checkpoints() / urllib.parse.urlparse(cfg.url or "").path.rpartition("/")[2]
    if cfg.url and url_file.suffix != ".npz" and url_file.is_file():
        return url_file
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_NAMES
    if repository:
        for file_name in names:
            found = huggingface_hub.try_to_load_from_cache(
                repository, file_name, revision=revision or None
            )
            if isinstance(found, str):
                return Path(found)
    if not repository and not cfg.url:
        raise DataError(
            f"{EXTRACTOR_KEY}: timm has no pretrained weights of {name}; give a file, "
            f"{WITHOUT_WEIGHTS[EXTRACTOR_KEY]}"
        )
    if not repository:
        reason = unreachable(cfg.url) or _download(cfg.url, url_file)
    elif constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = unreachable(constants.ENDPOINT)
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
        f"{EXTRACTOR_KEY}: the weights of {name} are missing (looked for "
        f"{' and '.join(places)}) and cannot be fetched ({reason}); {', or '.join(sources)}, or "
        f"name the file as {EXTRACTOR_KEY}, {WITHOUT_WEIGHTS[EXTRACTOR_KEY]}"
    )


HUB_NAMES = ["model.safetensors", "pytorch_model.bin"]


def _from_hub(repository: str, names: list[str], revision: str) -> Path | str:
    """The fetched file, or why it could not be fetched."""
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
            reason = first_line(error)
        except (OSError, errors.HfHubHTTPError, RuntimeError, ValueError) as error:
            return first_line(error)
    return reason


def unreachable(url: str) -> str | None:
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
                raise OSError(f"only {target.tell()} of {bar.total} bytes arrived")
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


@contextmanager
def refusing_unsuitable(weights: Path | None, name: str, key: str) -> Iterator[None]:
    """What fails inside, while weights are loaded, becomes a `DataError`."""
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
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            # torch's and timm's own texts are long and advise to switch the safety off.
            reason = "not a file of weights only; save model.state_dict(), or as .safetensors"
        raise DataError(
            f"{key}: {weights} does not hold the weights of {name} ({reason})"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, in at most 200 characters."""
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


def torchvision_model(architecture: str, weights: Path | None) -> Any:
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


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state.get("model", state))
    return {name.removeprefix("module."): value for name, value in state.items()}
