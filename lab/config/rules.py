"""Checks across keys of single data sets, networks and methods, and what null stands for in them.

Part of their records, see `lab.config.records`. `c` has the settings as attributes, those of a
configuration or, before it is valid, those that are valid by themselves.
"""

from typing import Any

from lab.config.keys import SpuriousFeature
from lab.config.strict_yaml import show
from lab.system import memory

# Pictures that Dominoes has for training, and into how many equal parts its target set is cut:
# validation and target, each with as many of every group or class.
DOMINOES_PICTURES = {"binary": 10_000, "ten": 50_000}
DOMINOES_PARTS = {"binary": 8, "ten": 20}
CELEBA_PARTS = 8  # of val_target_size: half of it is the target set, of four equal groups

# The i-th label's own shortcut where `spurious_features` is null.
SHORTCUTS: tuple[Any, ...] = (
    *({"kind": "square", "position": corner, "size": 4} for corner in (
        "left_top", "right_bottom", "right_top", "left_bottom")),
    *({"kind": "lines", "orientation": orientation, "distance": distance}
      for distance in (7, 5, 9) for orientation in ("vertical", "horizontal")),
)  # fmt: skip


def mnist_sizes(c):
    """All digits of the full MNIST; of the embedded ones what leaves some for other splits."""
    return (3000, 0, 1000) if c.mnist_source == "embedded" else (None, 0, None)


def own_shortcuts(labels) -> dict[str, SpuriousFeature]:
    """A main shortcut of its own for every label, and the next label's as the minority's."""
    own = SHORTCUTS[: len(labels)]
    return {
        str(label): SpuriousFeature(main=main, minority=minority, probability=0.99)
        for label, main, minority in zip(labels, own, (*own[1:], own[0]))
    }


def check_spurious_features(c):
    """SpuriousMNIST: different labels, and shortcuts for these only."""
    labels = c.labels
    if len(set(labels)) < len(labels):
        yield f"labels: given {show(labels)}; allowed: a list of 2 to 10 different digits"
    for name in ("spurious_features", "opposite_spurious_features", "dfr_spurious_features"):
        unknown = [label for label in getattr(c, name) or {} if int(label) not in labels]
        if unknown:
            yield (
                f"{name}: given for {', '.join(unknown)}; allowed: the labels, "
                f"{', '.join(map(str, labels))}"
            )


def check_dominoes(c):
    """Dominoes: a target set that can be cut into equal parts."""
    classes, size = c.dominoes_classes, c.val_target_size
    parts, available = DOMINOES_PARTS[classes], DOMINOES_PICTURES[classes]
    allowed = f"multiples of {parts} {{}} below {available}"
    if size % parts or size >= available:
        yield (
            f"val_target_size: given {size}; allowed with dominoes_classes {classes}: "
            + allowed.format("from 0")
        )
    elif needs_target_for_dfr(c):
        yield without_target_for_dfr(allowed.format("above 0,"))


def celeba_splits(c) -> str:
    """`celeba_splits`, or what null stands for."""
    return c.celeba_splits or ("drawn" if c.method.needs_target else "official")


def are_drawn(c) -> bool:
    """Whether CelebA's splits are drawn."""
    return celeba_splits(c) == "drawn"


def celeba_at(c) -> dict:
    """CelebA's facts at these settings."""
    drawn = are_drawn(c)
    return {
        "target_size": "val_target_size" if drawn else "",
        "tasks": len(c.groupings),
        "four_groups": "," not in "".join(c.groupings),
        "variant": "" if drawn else "celeba_splits: official",
    }


def check_celeba(c):
    """CelebA: attributes once each, and what drawn splits need."""
    labels = []
    for text in c.groupings:
        label, _, shortcuts = text.partition(":")
        names = [label, *shortcuts.split(",")]
        labels.append(label)
        if len(set(names)) < len(names):
            yield f"groupings: given {text}, in which an attribute occurs twice"
    if len(set(labels)) < len(labels):
        yield "groupings: given two tasks with the same label; allowed: different ones"
    if not are_drawn(c):
        return
    if len(c.groupings) > 1 or "," in c.groupings[0]:
        yield (
            f"groupings: given {show(c.groupings)}; allowed with drawn splits: one task with "
            "one shortcut"
        )
    if not c.spurious_strength:
        yield "spurious_strength: given 0; allowed with drawn splits of CelebA: above 0, up to 1"
    if c.val_target_size % CELEBA_PARTS:
        yield (
            f"val_target_size: given {c.val_target_size}; allowed: multiples of {CELEBA_PARTS} "
            "from 0"
        )
    elif needs_target_for_dfr(c):
        yield without_target_for_dfr(f"multiples of {CELEBA_PARTS} above 0")


def needs_target_for_dfr(c) -> bool:
    """Whether DFR retrains on a target set that has no samples."""
    return c.use_dfr and c.dfr_val_split_strategy == "target" and not c.val_target_size


def without_target_for_dfr(allowed: str) -> str:
    """The line on DFR without its target set."""
    return (
        "val_target_size: given 0, but dfr_val_split_strategy: target needs a target set; "
        f"allowed: {allowed}"
    )


def check_jtt(c):
    """JTT: validation losses, where several tasks are joined by them."""
    size = c.data_set.validation_size
    if c.data_set.tasks > 1 and c.jtt_join == "task" and getattr(c, size) == 0:
        yield f"{size}: given 0, but jtt_join: task needs validation data"


def check_mlp(c):
    """MLP: hidden layers that fit into the memory."""
    available = memory.available()
    width, depth = c.hidden_dim, c.num_hidden_layers
    needed = memory.training_bytes((depth - 1) * width**2, c.optimizer, c.momentum)
    if c.device != "cuda" and available and needed > available:
        yield (
            f"hidden_dim, num_hidden_layers: given {width}, {depth}, which is at least "
            f"{memory.shown(needed)} for parameters, gradients and optimizer, but "
            f"{memory.shown(available)} are available; allowed: less"
        )
