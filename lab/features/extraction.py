"""Features of pictures, written once to a cache.

Ranks of torchrun share the cache folder, so several machines need it on a common file system.
While a file is made, its finished shards of `SHARD` pictures are kept, so that an interrupted
extraction continues where it stopped, with the same result.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from lab.config.schema import Config
from lab.features import backbones
from lab.features import cache as feature_cache
from lab.features.backbones import SIDE
from lab.networks import weights as weight_files
from lab.splits.splits import Splits
from lab.system import cores, distributed, files
from lab.system.errors import DataError, UserError
from lab.system.progress import Progress

log = logging.getLogger(f"spurious.{__name__}")

FORMAT = 1  # part of the key: raise it when the same key comes to mean other features
SHARD = 512  # pictures; part of nothing, but shards of another size are not reused
MAX_HASHES = 2**20  # bytes of the file with the weights' hashes, at some 200 bytes each
PLAIN_SECONDS = 30  # between progress lines without a terminal


class TensorPictures:
    """Pictures (N, C, H, W) in [0, 1] in memory, C = 1 or 3, as RGB of 224 × 224 pixels.

    Resized bilinearly and rounded to 8 bits, like pictures from files.
    """

    def __init__(self, pictures: torch.Tensor):
        if len(pictures) and not 0 <= pictures.min() <= pictures.max() <= 1:
            raise ValueError("pictures outside [0, 1]")
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    @functools.cached_property
    def identity(self) -> str:
        pixels = self.pictures.contiguous().numpy()
        digest = hashlib.sha256(pixels.data.cast("B")).hexdigest()
        return f"tensor {tuple(pixels.shape)} {digest}, bilinear to {SIDE}"

    def decode_uint8(self, i: int) -> torch.Tensor:
        """Picture i, (3, 224, 224) uint8."""
        picture = F.interpolate(
            self.pictures[i : i + 1], (SIDE, SIDE), mode="bilinear", antialias=True
        )
        return (picture[0] * 255).round_().clamp_(0, 255).byte().expand(3, -1, -1)


class Extractor:
    """The configured backbone and the cache of its features.

    Made before any picture is read. Raises `ConfigError` for a model, block or layer that does not
    exist, `DataError` when weights are missing or the cache folder cannot be used. facts: what was
    used, as plain data.
    """

    def __init__(self, config: Config, device: str = "cpu"):
        self.config, self.device = config, device
        self.folder = Path(config.features_cache_dir)
        self.spec = backbones.resolve(config)
        self.precision = backbones.choose_precision(config, device)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from None
        # What is fetched into a machine's own cache is fetched by one process, before the others.
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        found = distributed.together(
            lambda: backbones.find_weights(config, self.spec) if leads else None
        )
        other = distributed.together(
            lambda: None if leads else backbones.find_weights(config, self.spec)
        )
        self.weights = found if leads else other
        self.weights_id = _weights_id(self.folder, self.weights, self.spec, config.seed)
        self.facts: dict = {
            "model": self.spec.name,
            "architecture": self.spec.architecture,
            "layer": self.spec.layer,
            "precision": self.precision,
            "weights": self.weights_id,
            "weights_file": None if self.weights is None else str(self.weights),
            "files": {},
        }

    def extract(self, splits: Splits) -> Splits:
        """The splits with features (N, d) float32 as inputs, on the CPU.

        Inputs are tensors of pictures in [0, 1], or objects with `decode_uint8(i)` → (3, 224, 224)
        uint8, `len` and `identity`, a text that changes with the pictures. Features come from the
        cache if it has them, else they are computed and kept.
        """

        def extracted(name, split):
            features = self.features(name, split.inputs)
            if self.config.normalize_inputs:
                features = F.normalize(features)
            # A split's own type, so that whatever else it holds goes along.
            return dataclasses.replace(split, inputs=features)

        return splits.changed(extracted)

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        log.info(
            "Backbone %s, %s, %s on %s",
            self.spec.name, self.spec.layer, self.precision, self.device,
        )  # fmt: skip
        return backbones.build(self.config, self.spec, self.weights, self.device)

    def features(self, split: str, pictures) -> torch.Tensor:
        """Features (N, d) float32 of these pictures, mapped from the cache file."""
        if isinstance(pictures, torch.Tensor):
            pictures = TensorPictures(pictures)
        key = json.dumps(
            {
                "format": FORMAT,
                "dataset": self.config.dataset_name,
                "pictures": pictures.identity,
                "number": len(pictures),
                "transform": {"side": SIDE, "mean": self.spec.mean, "std": self.spec.std},
                "model": self.spec.architecture,
                "layer": self.spec.layer,
                "weights": self.weights_id,
                "precision": self.precision,
            },
            sort_keys=True,
        )
        entry = _Entry(self, split, key, pictures)
        try:
            features = entry.get()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        except feature_cache.Damaged as error:  # just made, or by another run
            raise DataError(f"features_cache_dir: {entry.path} is not usable ({error})") from None
        self.facts["files"][split] = entry.path.name
        return features


class _Entry:
    """The features of one split: in the cache, or to be made."""

    def __init__(self, job: Extractor, split: str, key: str, pictures):
        self.job, self.split, self.key, self.pictures = job, split, key, pictures
        self.digest = hashlib.sha256(key.encode()).hexdigest()[: feature_cache.HASH_LENGTH]
        model = job.spec.name.replace(":", "-")
        stem = f"{job.config.dataset_name}_{split}_{model}_{job.spec.layer}_{self.digest}"
        self.path = job.folder / f"{stem}.safetensors"
        self.parts = self.path.with_suffix(".parts")

    def get(self) -> torch.Tensor:
        """The features, made if need be; the ranks of a group of processes share the work."""
        first, world = distributed.rank() == 0, distributed.world()
        with (
            feature_cache.locked(self.job.folder / f"{self.digest}.lock")
            if first
            else nullcontext()
        ):
            if first:
                # Splits of the same pictures (val and dfr) have the same features: one file does.
                twins = sorted(self.job.folder.glob(f"*_{self.digest}.safetensors"))
                if twins and self.path not in twins:
                    self.path = twins[0]
            todo, self.path = distributed.from_first((self._todo(), self.path) if first else None)
            if todo:
                log.info(
                    "Extracting %s: %d pictures, %d of %d shards to do",
                    self.split, len(self.pictures), len(todo), self._shards(),
                )  # fmt: skip
                distributed.together(lambda: self._extract(todo[distributed.rank() :: world]))
            if first and todo is not None:
                self._merge()
            distributed.barrier()
        return feature_cache.read(
            self.path, self.key, len(self.pictures), verify=todo is not None or not first
        )

    def _shards(self) -> int:
        return math.ceil(len(self.pictures) / SHARD)

    def _todo(self) -> list[int] | None:
        """Numbers of the shards that have to be made, None if the whole file exists."""
        if self.path.exists():
            try:
                feature_cache.read(self.path, self.key, len(self.pictures))
            except feature_cache.Damaged as error:
                log.warning("%s is damaged (%s): made again", self.path, error)
            else:
                log.info("Features from %s", self.path)
                return None
        missing = []
        for shard in range(self._shards()):
            try:
                self._read_part(shard)
            except FileNotFoundError:
                missing.append(shard)
            except feature_cache.Damaged as error:
                log.warning("%s is not reused (%s): made again", self._part(shard), error)
                missing.append(shard)
        return missing

    def _part(self, shard: int) -> Path:
        return self.parts / f"{shard:06d}.safetensors"

    def _read_part(self, shard: int) -> torch.Tensor:
        return feature_cache.read(
            self._part(shard), self._part_key(shard), len(self._indices(shard))
        )

    def _indices(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.pictures)))

    def _part_key(self, shard: int) -> str:
        # Shards are mixed only if they were made alike, to the last bit.
        config = self.job.config
        alike = {
            "of": self.digest,
            "shard": shard,
            "of_size": SHARD,
            "batch_size": config.feature_extractor_batch_size,
            "device": torch.device(self.job.device).type,
        }
        return json.dumps(alike, sort_keys=True)

    def _extract(self, shards: list[int]) -> None:
        """Compute these shards and write each as it is complete."""
        backbone, done = self.job.backbone, []
        self.parts.mkdir(exist_ok=True)
        batches = []
        for shard in shards:
            indices = self._indices(shard)
            size = self.job.config.feature_extractor_batch_size
            batches += [(shard, indices[i : i + size]) for i in range(0, len(indices), size)]
        total = sum(len(indices) for _, indices in batches)
        with Progress(
            log,
            "{text}: {done} of {total} pictures, {rate:.1f} a second, {left:.0f} s left",
            total,
            unit=" pictures",
            every_seconds=PLAIN_SECONDS,
        ) as progress:
            extracted = 0
            decoded = _decoded(
                self.pictures, [b for _, b in batches], self.job.config, backbone.device
            )
            for i, ((shard, indices), pictures) in enumerate(zip(batches, decoded)):
                done.append(backbone(pictures))
                if i + 1 == len(batches) or batches[i + 1][0] != shard:
                    features = torch.cat(done).cpu()
                    done = []
                    if not torch.isfinite(features).all():
                        raise DataError(
                            "feature_extractor_weights: the backbone gives NaN or infinite "
                            f"features in {backbone.precision}; are the weights damaged?"
                        )
                    feature_cache.write(
                        self._part(shard), [features], {"key": self._part_key(shard)}
                    )
                extracted += len(indices)
                progress.show(extracted, f"{self.split} features")

    def _merge(self) -> None:
        """Write the cache file from its shards, one at a time, and remove them."""

        def shards():
            for shard in range(self._shards()):
                yield self._read_part(shard)

        spec = self.job.spec
        shown = {
            "dataset": self.job.config.dataset_name,
            "split": self.split,
            "model": spec.name,
            "layer": spec.layer,
            "key": self.key,
        }
        feature_cache.write(self.path, shards, shown)
        shutil.rmtree(self.parts)
        log.info("Features kept in %s", self.path)


def unwritable(folder: Path, error: OSError) -> DataError:
    """The error of a cache folder that cannot be used."""
    return DataError(f"features_cache_dir: {folder} cannot be used, {error.strerror or error}")


def _weights_id(folder: Path, path: Path | None, spec: backbones.Spec, seed: int) -> str:
    """What stands for the weights in the key: the file's SHA-256, or the seed of random ones.

    Hashing gigabytes takes seconds, so hashes are kept by path, size and time of change.
    """
    if path is None:
        return f"random-{seed} of torch {torch.__version__}"  # whose initialisation draws them
    path = path.resolve()
    kept = folder / feature_cache.WEIGHT_HASHES
    try:
        stat = path.stat()
        fingerprint = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        known = _known_hashes(kept)
        if known.get(str(path), [])[:3] == fingerprint:
            return known[str(path)][3]
        digest = weight_files.file_hash(path)
    except OSError as error:
        raise DataError(
            f"feature_extractor_weights: {path} cannot be read, {error.strerror}"
        ) from None
    if os.access(folder, os.W_OK):
        try:
            text = json.dumps(known | {str(path): [*fingerprint, digest]}, indent=1)
            files.write_text(kept, text)
        except OSError as error:
            raise unwritable(folder, error) from None
    return digest


def _known_hashes(kept: Path) -> dict[str, list]:
    """{path: [bytes, time of change, time of status change, SHA-256]}; {} where it is damaged."""
    try:
        with open(kept, "rb") as file:
            known = json.loads(file.read(MAX_HASHES))
        for entry in known.values():
            *fingerprint, digest = entry
            if len(fingerprint) != 3 or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError("an entry is no fingerprint with a SHA-256")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s is damaged (%s): made again", kept, error)
        return {}
    return known


class _Decoding(Dataset):
    """Pictures as a data set of torch, whose items are pictures or what is wrong with them."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __getitem__(self, i: int):
        try:
            return torch.as_tensor(self.pictures.decode_uint8(i))
        except UserError as error:
            # Raised in a worker, it would come back as another kind, with a traceback in it.
            return error


def _collate(items):
    problems = [item for item in items if isinstance(item, UserError)]
    return problems[0] if problems else torch.stack(items)


def _leave_signals_to_main(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _decoded(pictures, batches, config: Config, device: torch.device):
    """Yields (B, 3, 224, 224) uint8 for every list of indices, decoded ahead in processes."""
    workers = cores.available() if config.num_workers is None else config.num_workers
    loader: DataLoader = DataLoader(
        _Decoding(pictures),
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # its own: torch's stays as it was, cached features or not
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
