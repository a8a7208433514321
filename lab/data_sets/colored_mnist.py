"""ColoredMNIST: digits in colour. Five or more is the label, the colour the attribute."""

import numpy as np
import torch

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.data_sets.drawing import (
    CHUNK,
    SAMPLES_PER_GROUP,
    Pool,
    draw_to_moments,
    hold_out,
    labels,
    prepared,
    shown,
    tensor_of,
)
from lab.data_sets.sources import mnist
from lab.splits.pixels import LUMA
from lab.splits.splits import Split, Splits


def load(config: Config) -> Splits:
    """Digits in colour: y = +1 for digits ≥ 5; a = +1 red, -1 green.

    The digit's own channel keeps its values, the others are scaled by 0.25. Group counts follow
    the configured moments exactly; no digit is in two splits.
    """
    train_digits, test_digits = mnist.load(config.mnist_source, config.data_dir)
    pools = {}
    for part, digits in (("training", train_digits), ("test", test_digits)):
        y = np.where(digits.labels >= 5, 1, -1)
        place = f"the {part} part of mnist_source {config.mnist_source}"
        seed = derive_seed(config.seed, "digits", part)
        names, hint = {-1: "digits 0 to 4", +1: "digits 5 to 9"}, mnist.hint(config.mnist_source)
        pools[part] = Pool(y, names, place, seed, hint)
    train = draw_to_moments(pools["training"], "train", config)
    val = draw_to_moments(pools["training"], "val", config)
    test = draw_to_moments(pools["test"], "test", config)

    train, held_out = hold_out(train, config)

    samples = _colour(train_digits.images, [i[:SAMPLES_PER_GROUP] for i in train], config)
    splits = Splits(
        train=prepared(_colour(train_digits.images, train, config), config),
        test=prepared(_colour(test_digits.images, test, config), config),
        group_names=["digit < 5, green", "digit < 5, red", "digit ≥ 5, green", "digit ≥ 5, red"],
        samples=shown(samples, tensor_of(samples)),
        facts={"mnist": config.mnist_source},
    )
    if sum(map(len, val)):
        splits.val = prepared(_colour(train_digits.images, val, config), config)
    if sum(map(len, held_out)):
        splits.dfr = prepared(_colour(train_digits.images, held_out, config), config)
    return splits


def _colour(images: np.ndarray, indices: list[np.ndarray], config: Config) -> Split:
    """Pictures (N, C, 28, 28) in [0, 1] of these digits, group by group, in their colours."""
    counts = [len(i) for i in indices]
    y, a = labels(counts)
    order = np.concatenate(indices)
    channels = torch.full((len(order), 3), 0.25)
    channels[:, 0][a > 0] = 1.0
    channels[:, 1][a < 0] = 1.0
    if config.use_grayscale:
        channels = (channels * torch.tensor(LUMA)).sum(1, keepdim=True)
    pictures = torch.empty(len(order), channels.shape[1], mnist.SIDE, mnist.SIDE)
    # In chunks: the whole data set never exists as a second copy.
    for start in range(0, len(order), CHUNK):
        part = slice(start, start + CHUNK)
        gray = torch.from_numpy(images[order[part]]).float().div_(255)
        torch.mul(gray[:, None], channels[part, :, None, None], out=pictures[part])
    return Split(pictures, y, a, counts)
