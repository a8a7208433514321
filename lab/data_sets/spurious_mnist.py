"""SpuriousMNIST: digits into which shortcuts are drawn. The digit is the label.

A square covers a corner of the picture, lines show where the digit leaves the background free.
Every label can have a main and a minority shortcut; groups are the cells (label, shortcut).
"""

from fractions import Fraction

import numpy as np
import torch

from lab.config.keys import Lines, NoShortcut, SpuriousFeature, Square
from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.data_sets.drawing import (
    SAMPLES_PER_GROUP,
    Pool,
    hold_out,
    labels,
    prepared,
    shown,
    tensor_of,
)  # fmt: skip
from lab.data_sets.sources import mnist
from lab.splits import groups
from lab.splits.splits import Split, Splits

Shortcut = Square | Lines | NoShortcut
NONE = NoShortcut(kind="none")
WHITE = 255


def mask(shortcut: Shortcut) -> np.ndarray:
    """The pixels that a shortcut covers on an empty picture, (28, 28) bool.

    Squares lie in their corner without a margin; lines are the rows or columns 0, distance, ….
    """
    pixels = np.zeros((mnist.SIDE, mnist.SIDE), dtype=bool)
    if shortcut.kind == "square":
        side, end = slice(shortcut.size), slice(mnist.SIDE - shortcut.size, None)
        horizontal, vertical = shortcut.position.split("_")
        pixels[side if vertical == "top" else end, side if horizontal == "left" else end] = True
    elif shortcut.kind == "lines" and shortcut.orientation == "horizontal":
        pixels[:: shortcut.distance] = True
    elif shortcut.kind == "lines":
        pixels[:, :: shortcut.distance] = True
    return pixels


def draw(digits: np.ndarray, shortcut: Shortcut) -> np.ndarray:
    """Digits (N, 28, 28) uint8 with the shortcut in white: squares in front, lines behind.

    Behind: only where a digit's pixel is 0.
    """
    where = np.broadcast_to(mask(shortcut), digits.shape)
    if shortcut.kind == "lines":
        where = where & (digits == 0)
    return np.where(where, np.uint8(WHITE), digits)


def names(shortcuts: list[Shortcut]) -> list[str]:
    """Names of shortcuts for people; with a square's size where several have the same position."""
    found = []
    for shortcut in shortcuts:
        if shortcut.kind == "square":
            found.append(f"square {shortcut.position.replace('_', ' ')}")
        elif shortcut.kind == "lines":
            found.append(f"{shortcut.orientation} lines {shortcut.distance}")
        else:
            found.append("no shortcut")
    return [
        f"{name} {shortcut.size}" if shortcut.kind == "square" and found.count(name) > 1 else name
        for name, shortcut in zip(found, shortcuts)
    ]


def distinct_shortcuts(*mappings: dict[str, SpuriousFeature] | None) -> list[Shortcut]:
    """Every shortcut in these mappings once: main ones first, no shortcut last."""
    listed = [
        getattr(feature, part)
        for mapping in mappings
        for part in ("main", "minority")
        for feature in (mapping or {}).values()
    ]
    return [s for s in dict.fromkeys(listed) if s not in (None, NONE)] + [NONE]


def shares(feature: SpuriousFeature, n: int) -> list[tuple[Shortcut, int]]:
    """(shortcut, count) for n digits of a label: ⌊n·probability⌋ get the main one, exactly."""
    # The decimal number in the configuration, not the nearest float.
    main = int(n * Fraction(str(feature.probability)))
    return [(feature.main, main), (feature.minority or NONE, n - main)]


def exchanged(feature: SpuriousFeature) -> SpuriousFeature:
    """The feature with main and minority shortcut exchanged."""
    return feature.model_copy(update={"main": feature.minority or NONE, "minority": feature.main})


def load(config: Config) -> Splits:
    """Digits with shortcuts, in splits with equally many digits of every label.

    `train`, `val` and `test` follow `spurious_features`. Further evaluation sets hold the digits of
    `test`: `opposite`, with main and minority shortcut exchanged or as configured; `clean`, with
    none; `all_main`, with the main one on all; `shortcut_only`, the same without the digits.
    `dfr`: digits set aside, or those of training, with every shortcut of training and none equally
    often on every label, or as configured. No digit is in two of the other splits.
    """
    digits = dict(zip(("training", "test"), mnist.load(config.mnist_source, config.data_dir)))
    pools = {part: _pool(part, found.labels, config) for part, found in digits.items()}
    train = _take(pools["training"], "num_train_samples", config)
    val = _take(pools["training"], "num_val_samples", config)
    test = _take(pools["test"], "num_test_samples", config)
    held_out = train
    if not config.dfr_reuse_train:
        train, held_out = hold_out(train, config)

    features = config.spurious_features
    main = {label: f.model_copy(update={"probability": 1.0}) for label, f in features.items()}
    opposite = config.opposite_spurious_features
    if opposite is None:
        opposite = {label: exchanged(f) for label, f in features.items()}
    # Digits by label, what is drawn on them, and whether the digits themselves are left out.
    training = {
        "train": (train, features, config.only_spurious),
        "val": (val, features, config.only_spurious),
        "dfr": (held_out, config.dfr_spurious_features, False),
    }
    evaluation = {
        "test": (test, features, False),
        "opposite": (test, opposite, False),
        "clean": (test, {}, False),
        "all_main": (test, main, False),
        "shortcut_only": (test, main, True),
    }
    drawing = _Drawing(config)
    made = {}
    for part, sets in (("training", training), ("test", evaluation)):
        for name, (rows, mapping, blank) in sets.items():
            if sum(map(len, rows)):
                # The evaluation sets consist of the same digits in the same order.
                purpose = name if part == "training" else part
                members = drawing.members(rows, mapping, purpose)
                made[name] = drawing.split(digits[part].images, members, blank)
                if name == "train":
                    few = [group[:SAMPLES_PER_GROUP] for group in members]
                    examples = drawing.split(digits[part].images, few, blank)
    called = names(drawing.shortcuts)
    return Splits.from_named(
        {name: prepared(split, config) for name, split in made.items()},
        group_names=[f"{config.labels[y]}, {called[a]}" for y, a in drawing.cells],
        cells=drawing.cells,
        num_classes=len(config.labels),
        masks=torch.from_numpy(np.stack([mask(drawing.shortcuts[a]) for _, a in drawing.cells])),
        samples=shown(examples, tensor_of(examples)),
        facts={"mnist": config.mnist_source},
    )


class _Drawing:
    """The groups of a configuration, and splits of digits with their shortcuts."""

    def __init__(self, config: Config):
        self.config = config
        self.shortcuts = distinct_shortcuts(
            config.spurious_features,
            config.opposite_spurious_features,
            config.dfr_spurious_features,
        )
        self.cells = groups.class_cells(len(config.labels), len(self.shortcuts))
        main = [config.spurious_features.get(str(label)) for label in config.labels]
        main = [feature.main if feature else NONE for feature in main]
        self.minority = tuple(self.shortcuts[a] != main[y] for y, a in self.cells)

    def members(self, rows: list[np.ndarray], mapping, purpose: str) -> list[np.ndarray]:
        """Which of these digits (rows of each label) are in each group.

        mapping: {label: feature}; None = every label has each shortcut of training equally often.
        """
        rng = np.random.default_rng(derive_seed(self.config.seed, "shortcuts", purpose))
        found = [np.empty(0, dtype=int) for _ in self.cells]
        for y, (label, of_label) in enumerate(zip(self.config.labels, rows)):
            order, start = rng.permutation(of_label), 0
            for shortcut, count in self._shares(mapping, str(label), len(order)):
                g = y * len(self.shortcuts) + self.shortcuts.index(shortcut)
                found[g] = np.concatenate([found[g], order[start : start + count]])
                start += count
        return found

    def _shares(self, mapping, label: str, n: int) -> list[tuple[Shortcut, int]]:
        if mapping is None:
            own = distinct_shortcuts(self.config.spurious_features)
            return list(zip(own, groups.split_counts(n, [1 / len(own)] * len(own))))
        return shares(mapping[label], n) if label in mapping else [(NONE, n)]

    def split(self, images: np.ndarray, members: list[np.ndarray], blank: bool) -> Split:
        """Pictures (N, 1, 28, 28) in [0, 1] of these digits of each group, or without them."""
        counts = [len(rows) for rows in members]
        y, a = labels(counts, self.cells)
        pictures = torch.empty(len(y), 1, mnist.SIDE, mnist.SIDE)
        split = Split(pictures, y, a, counts, self.minority)
        for (_, shortcut), rows, place in zip(self.cells, members, split.slices):
            group = draw(images[rows] * (not blank), self.shortcuts[shortcut])
            pictures[place, 0] = torch.from_numpy(group).float().div_(255)
        return split


def _pool(part: str, found: np.ndarray, config: Config) -> Pool:
    place = f"the {part} part of mnist_source {config.mnist_source}"
    digits = {label: f"digits {label}" for label in config.labels}
    return Pool(
        found,
        digits,
        place,
        derive_seed(config.seed, "digits", part),
        mnist.hint(config.mnist_source),
    )


def _take(pool: Pool, key: str, config: Config) -> list[np.ndarray]:
    """Digits of each label, equally many (up to one); null: as many as possible."""
    n, number = getattr(config, key), len(config.labels)
    if n is None:
        n = number * min(map(len, pool.left.values()))
    counts = groups.split_counts(n, [1 / number] * number)
    return list(pool.take(key, dict(zip(config.labels, counts))).values())
