"""The main memory that a configuration asks for, told before anything is loaded.

Every key has bounds of its own, but products of keys (width² × depth, features × samples) pass any
machine's memory, and a process that does so is killed without a word. `demands` estimates from the
configuration alone; what depends on the data counts as the public data sets have it.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import groups

PROGRAM = 1.0e9  # the imports of a run
FITTER = 0.15e9  # a process that fits: its own imports
DECODER = 0.05e9  # a process that decodes: what it does not share with the one it was forked from
PICTURE = 3 * 224 * 224  # numbers in a picture as a backbone takes it
SHARD = 512  # pictures of which features are held at once
GRAM_ANALYSES = (
    "gradient_basis",
    "gap_dynamics_factors",
    "jacobian_norm",
    "static_dynamic_decomposition",
)
PICTURE_BATCH = 2**27  # bytes of a batch of pictures in evaluation and analyses

# Samples of the train, val and test splits; val of ColoredMNIST comes out of the training part.
SAMPLES = {
    ("ColoredMNIST", "embedded"): (4000, 4000, 1000),
    ("ColoredMNIST", "full"): (60_000, 60_000, 10_000),
    ("WaterBirds", None): (4795, 1199, 5794),
}
WATERBIRDS_BALANCED = 532 / 1199  # of the official validation set, as DFR fits on it
PIXELS = {"ColoredMNIST": 28 * 28, "WaterBirds": 224 * 224}
RESNET_CHANNELS = {
    "ResNet18": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "avgpool": 512},
    "ResNet50": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048, "avgpool": 2048},
}
VIT_WIDTHS = {
    "ViT_B_16": 768,
    "DINOv2_ViT_S_14": 384,
    "DINOv2_ViT_B_14": 768,
    "DINOv2_ViT_L_14": 1024,
    "DINOv2_ViT_G_14": 1536,
}
# (millions of parameters, bytes a picture while it passes through the network)
BACKBONES = {
    "ResNet18": (12, 10e6),
    "ResNet50": (26, 15e6),
    "ViT_B_16": (87, 10e6),
    "DINOv2_ViT_S_14": (22, 5e6),
    "DINOv2_ViT_B_14": (87, 10e6),
    "DINOv2_ViT_L_14": (304, 12e6),
    "DINOv2_ViT_G_14": (1137, 25e6),
}
OTHER_BACKBONE, OTHER_FEATURES = (100, 15e6), 2048  # of timm: any

# What `demands` reads.
KEYS = (
    "device", "dataset_name", "mnist_source", "num_train_samples", "num_val_samples",
    "num_test_samples", "train_correlation", "train_label_marginal", "train_attribute_marginal",
    "use_grayscale", "normalize_inputs", "use_feature_extractor", "feature_extractor_model_name",
    "feature_extractor_resnet_intermediate_layer", "feature_extractor_resnet_pooling_output_size",
    "feature_extractor_batch_size", "num_workers", "num_hidden_layers", "hidden_dim", "use_bias",
    "debias_method", "train_batch_size", "eval_batch_size", "optimizer", "momentum",
    "analysis_target", "analysis_memory_gb", *(f"analyze_{name}" for name in GRAM_ANALYSES),
    "use_dfr", "dfr_target_layer", "dfr_val_split_strategy", "dfr_val_ratio", "dfr_reg",
    "dfr_c_options", "dfr_num_retrains", "dfr_num_workers",
)  # fmt: skip


class Demand(NamedTuple):
    """Bytes that some keys ask for together, and what for."""

    bytes: float
    keys: tuple[str, ...]
    purpose: str


def inputs(c: dict) -> int:
    """Numbers in one input of the network; c: the configuration's values by key."""
    name = c["feature_extractor_model_name"]
    if not c["use_feature_extractor"]:
        return PIXELS[c["dataset_name"]] * (1 if c["use_grayscale"] else 3)
    if name in RESNET_CHANNELS:
        layer = c["feature_extractor_resnet_intermediate_layer"]
        side = c["feature_extractor_resnet_pooling_output_size"] if layer != "avgpool" else 1
        return RESNET_CHANNELS[name][layer] * side**2
    return VIT_WIDTHS.get(name, OTHER_FEATURES)


def parameters(c: dict) -> int:
    """Parameters of the network."""
    width, depth = c["hidden_dim"], c["num_hidden_layers"]
    weights = inputs(c) * width + (depth - 1) * width**2 + width
    return weights + (depth * width + 1 if c["use_bias"] else 0)


def samples(c: dict) -> tuple[int, int, int]:
    """Samples of train (DFR's hold-out included), val and test."""
    source = c["mnist_source"] if c["dataset_name"] == "ColoredMNIST" else None
    there = SAMPLES[c["dataset_name"], source]
    asked = [c[f"num_{split}_samples"] for split in ("train", "val", "test")]
    train, val, test = (n if k is None else min(n, k) for n, k in zip(there, asked))
    if c["dataset_name"] == "ColoredMNIST":
        val = min(val, there[0] - train)
    return train, val, test


def cores() -> int:
    """Processors that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def demands(c: dict) -> list[Demand]:
    """What a run holds in main memory, by purpose; on CUDA the network is only made there."""
    network = Demand(
        4 * parameters(c) * _copies(c),
        ("hidden_dim", "num_hidden_layers", "optimizer"),
        f"{parameters(c):.3g} parameters",
    )
    found = [Demand(PROGRAM, (), "the program"), network, _data(c)]
    if c["device"] != "cuda":
        found += [_activations(c), _analyses(c)]
    if c["use_feature_extractor"]:
        found.append(_backbone(c))
    if c["use_dfr"]:
        found.append(_dfr(c))
    return found


def _copies(c) -> int:
    """Weights, gradients and what the optimiser keeps of each parameter."""
    if c["device"] == "cuda":
        return 1
    return 2 + (2 if c["optimizer"] == "Adam" else int(c["momentum"] > 0))


def _data(c) -> Demand:
    lazy = c["dataset_name"] == "WaterBirds" and not c["use_feature_extractor"]
    mapped = c["use_feature_extractor"] and not c["normalize_inputs"]
    held = 0 if lazy or mapped else 4 * inputs(c) * sum(samples(c))
    keys = ["num_train_samples", "num_test_samples"]
    if c["use_feature_extractor"]:
        keys += ["feature_extractor_resnet_pooling_output_size"]
    return Demand(held, tuple(keys), f"{sum(samples(c))} inputs of {inputs(c)} numbers")


def _activations(c) -> Demand:
    splits, pictures = (
        samples(c),
        not c["use_feature_extractor"] and c["dataset_name"] != "ColoredMNIST",
    )
    evaluated = min(c["eval_batch_size"], max(splits))
    if pictures:
        evaluated = min(evaluated, PICTURE_BATCH // (4 * inputs(c)))
    full_batch = c["debias_method"] != "None" or c["train_batch_size"] is None
    trained = 0 if full_batch else min(c["train_batch_size"], splits[0])
    name, batch = max(
        ("eval_batch_size", evaluated), ("train_batch_size", trained), key=lambda x: x[1]
    )
    # Inputs, outputs and sensitivities of every layer in float32; DFR's features in float64.
    each = c["hidden_dim"] * max(12 * (c["num_hidden_layers"] + 1), 32)
    each += inputs(c) * (4 + 8 * pictures)
    return Demand(
        batch * each,
        (name, "hidden_dim", "num_hidden_layers"),
        f"the activations of {batch} samples",
    )


def _analyses(c) -> Demand:
    wanted = any(c[f"analyze_{name}"] for name in GRAM_ANALYSES)
    rows = 8 * (2 if c["analysis_target"] == "both" else 1)
    held = min(c["analysis_memory_gb"] * 1e9, 4 * rows * parameters(c)) if wanted else 0
    return Demand(held, ("analysis_memory_gb", "hidden_dim", "num_hidden_layers"), "gradient sums")


def _backbone(c) -> Demand:
    millions, each = BACKBONES.get(c["feature_extractor_model_name"], OTHER_BACKBONE)
    batch = min(c["feature_extractor_batch_size"], SHARD, max(samples(c)))
    workers = cores() if c["num_workers"] is None else c["num_workers"]
    workers = min(workers, math.ceil(max(samples(c)) / batch))
    held = 2 * 4e6 * millions + workers * (DECODER + 2 * batch * PICTURE)
    held += 3 * 4 * min(SHARD, max(samples(c))) * inputs(c)
    if c["device"] != "cuda":
        held += batch * each
    keys = ("feature_extractor_batch_size", "num_workers", "feature_extractor_model_name")
    return Demand(held, keys, f"{batch} pictures at once in the backbone, {workers} workers")


def _dfr(c) -> Demand:
    features = inputs(c) if c["dfr_target_layer"] == "layer_0" else c["hidden_dim"]
    train, val, _ = samples(c)
    original = c["dfr_val_split_strategy"] == "original"
    rows = val if original else round(c["dfr_val_ratio"] * train)
    fits = max(c["dfr_num_retrains"], len(c["dfr_c_options"]) if c["dfr_reg"] != "none" else 1)
    workers = min(c["dfr_num_workers"] or cores(), fits)
    # In float64; a fit copies its rows, and the solver them again, with an index each.
    held = 8 * features * rows * (2 + 3 * workers * _balanced(c)) + (workers > 1) * workers * FITTER
    keys = ("dfr_num_workers", "dfr_target_layer", "hidden_dim", "num_train_samples")
    return Demand(held, keys, f"{workers} fits at once on {rows} × {features} features")


def _balanced(c) -> float:
    """The share of DFR's samples that is left when every group is as large as the smallest."""
    if c["dataset_name"] != "ColoredMNIST":
        return WATERBIRDS_BALANCED
    moments = (
        c[f"train_{name}"] for name in ("label_marginal", "attribute_marginal", "correlation")
    )
    there = [share for share in groups.probabilities(*moments) if share > 1e-9]
    return len(there) * min(there, default=0.0)


def available() -> float | None:
    """Bytes of main memory that this process may use at most; None where that is not told.

    The machine's, or less where a control group (of a container, of a batch job) allows less.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return None
    for folder, name in _control_groups():
        for place in (folder, *folder.parents):
            try:
                limits.append(int((place / name).read_text()))
            except (OSError, ValueError):  # no such level, or "max"
                continue
    return min(limits)


def _control_groups(root=Path("/sys/fs/cgroup"), table=Path("/proc/self/cgroup")):
    """(folder, name of the file with the limit) of the control groups for memory."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield root / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
