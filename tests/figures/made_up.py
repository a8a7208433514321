"""Run folders with small made-up tables, for figures."""

import json

import numpy as np
import pandas as pd

from lab.splits import groups

NAMES = ["digit < 5, red", "digit < 5, green", "digit ≥ 5, red", "digit ≥ 5, green"]
PAIRS = ((1, 0), (2, 3))
CONFIG = """\
experiment_name: colored_mnist
debias_method: GroupDRO
plot_format: png
gap_dynamics_factors:
  group_pairs: [[[-1, 1], [-1, -1]], [[1, -1], [1, 1]]]
"""


def group_counts(empty=()):
    """Counts with a strong correlation in train; the groups in `empty` have no training samples."""
    rows = []
    for split, counts in (("train", [2400, 100, 110, 2390]), ("test", [490, 510, 520, 480])):
        counts = [0 if split == "train" and g in empty else n for g, n in enumerate(counts)]
        for g, (n, (y, a)) in enumerate(zip(counts, groups.GROUPS, strict=True)):
            share = n / sum(counts)
            rows.append((split, g, y, a, NAMES[g], n, share))
    columns = ["split", "group", "y", "a", "name", "count", "share"]
    return pd.DataFrame(rows, columns=columns)


def training_history(counts, epochs):
    """Exponential learning curves: majority groups are learnt at once, minority groups late."""
    time = np.arange(epochs + 1)
    table = {"epoch": time}
    for split in ("train", "test"):
        n = counts[counts.split == split]["count"].to_numpy()
        shares = counts[counts.split == "train"]["share"].to_numpy()
        losses, accuracies = [], []
        for g in range(4):
            slow = g in (1, 2)
            floor = 0.1 if split == "train" else 0.3 + 0.3 * slow
            bump = 1.2 * slow * time / 3 * np.exp(-time / 4)
            losses.append(floor + (0.69 - floor) * np.exp(-time / (9 if slow else 1.5)) + bump)
            accuracies.append(np.clip(1.02 - 0.85 * losses[g], 0, 1))
            if n[g] == 0:
                losses[g] = accuracies[g] = np.full(len(time), np.nan)
            table[f"{split}_group_{g}_loss"] = losses[g]
            table[f"{split}_group_{g}_acc"] = accuracies[g]
        weights = n / n.sum()
        table[f"{split}_avg_loss"] = np.nansum(weights[:, None] * losses, axis=0)
        table[f"{split}_worst_loss"] = np.nanmax(losses, axis=0)
        table[f"{split}_avg_acc"] = np.nansum(weights[:, None] * accuracies, axis=0)
        table[f"{split}_worst_acc"] = np.nanmin(accuracies, axis=0)
        table[f"{split}_adjusted_acc"] = np.nansum(shares[:, None] * accuracies, axis=0)
    return pd.DataFrame(table | {f"flow_weight_{g}": np.full(len(time), 0.25) for g in range(4)})


def analysis(epochs, empty=(), every=1):
    """Smooth made-up values of every quantity; NaN where an empty group of train is involved."""
    rows, names = [], [groups.name(g) for g in range(4)]

    def add(epoch, split, kind, pair, **values):
        rows.extend((epoch, split, kind, pair, key, value) for key, value in values.items())

    for epoch in range(0, epochs + 1, every):
        decay = np.exp(-epoch / 6)
        for split in ("train", "test", "test_under_train"):
            nan = np.nan if empty and split != "test" else 1.0
            for number, (one, two) in enumerate(PAIRS):
                pair = groups.pair_name(one, two)
                scale = 1 - 0.3 * number
                terms = {
                    "term1": nan * -0.06 * decay * (1 - decay) * scale,
                    "term2": nan * 0.0004 * np.cos(epoch / 3),
                    "term3": nan * 0.8 * decay * np.cos(epoch / 8) * scale,
                }
                total = sum(terms.values())
                measured = np.nan if split == "test" or epoch == epochs else 0.97 * 0.4 * total
                terms |= {"total": total, "method_total": 0.4 * total, "measured": measured}
                add(epoch, split, "gap_dynamics_factors", pair, **terms)
                parts = {"TermA": 0.5 * decay, "TermB": -0.2 * decay, "TermC": 0.1 * (1 - decay)}
                parts = {key: nan * value for key, value in parts.items()}
                kind = "static_dynamic_decomposition"
                add(epoch, split, kind, pair, **parts, total=sum(parts.values()))
        for split in ("train", "test"):
            nan = np.nan if empty and split == "train" else 1.0
            basis = {"inv": 0.5, "Y": 0.9, "A": 0.6, "AY": 1.4}
            norms = {f"norm_{k}": nan * v * (0.02 + decay) for k, v in basis.items()}
            add(epoch, split, "gradient_basis", "", **norms)
            keys = ("inv_Y", "inv_A", "inv_AY", "Y_A", "Y_AY", "A_AY")
            cosines = {f"cosine_{k}": nan * np.sin(i + epoch / 9) for i, k in enumerate(keys)}
            add(epoch, split, "gradient_basis", "", **cosines)
            jacobian, outputs = {}, {}
            for g, code in enumerate(names):
                known = np.nan if g in empty and split == "train" else 1.0
                y, a = groups.GROUPS[g]
                jacobian[f"norm_sq_{code}"] = known * (2 + g / 3 + epoch * (1 + g / 4))
                outputs[f"mean_{code}"] = known * (1 - decay) * (1.5 * y + 1.2 * a)
                outputs[f"std_{code}"] = known * (0.1 + 0.8 * (1 - decay))
                for h in range(g + 1, 4):
                    pair = groups.pair_name(g, h)
                    cosine = nan * (1 - 0.9 * (1 - decay) * (0.5 + 0.25 * (h - g)))
                    jacobian |= {f"dot_{pair}": cosine, f"cosine_{pair}": cosine}
                    jacobian[f"dist_sq_{pair}"] = 1 - cosine
            jacobian |= {"norm_Delta_S": nan * (1 + epoch), "norm_Delta_L": nan * (2 + epoch / 4)}
            jacobian["ratio_Delta_S_L"] = nan * (1 + epoch) / (2 + epoch / 4)
            add(epoch, split, "jacobian_norm", "", **jacobian)
            add(epoch, split, "model_output_expectation", "", **outputs)
    return pd.DataFrame(rows, columns=["epoch", "split", "analysis", "pair", "quantity", "value"])


def accuracies(values):
    """One split's metrics in dfr_results.json."""
    row = {f"group_{g}_acc": value for g, value in enumerate(values)}
    average = float(np.mean(values))
    return row | {"avg_acc": average, "adjusted_acc": average, "worst_acc": min(values)}


def write_run(folder, epochs=6, empty=(), every=1):
    """A run folder with every table; returns the folder."""
    folder.mkdir()
    counts = group_counts(empty)
    counts.to_csv(folder / "group_counts.csv", index=False)
    training_history(counts, epochs).to_csv(folder / "training_history.csv", index=False)
    analysis(epochs, empty, every).to_csv(folder / "analysis.csv", index=False)
    (folder / "config_used.yaml").write_text(CONFIG, encoding="utf-8")
    before, after = accuracies([0.97, 0.62, 0.58, 0.96]), accuracies([0.88, 0.83, 0.8, 0.87])
    result = {"target_layer": "last_hidden", "split_strategy": "balanced", "reg": "l1", "c": 0.1}
    result["tuning"] = [{"c": 10.0**-k, "worst_acc": 0.8 - 0.02 * (k - 1) ** 2} for k in range(4)]
    result |= {
        key: {"train": row, "test": row} for key, row in (("before", before), ("after", after))
    }
    (folder / "dfr_results.json").write_text(json.dumps(result), encoding="utf-8")
    generator = np.random.default_rng(0)
    members = np.repeat(np.arange(4), 5)
    pictures = generator.random((20, 28, 28, 3), dtype=np.float32)
    pictures *= np.where(members % 2, 0, 1)[:, None, None, None] * [1, 0, 0] + [0, 0.3, 0]
    signs = {"y": np.where(members > 1, 1, -1), "a": np.where(members % 2, 1, -1)}
    np.savez(folder / "samples.npz", pictures=pictures.astype(np.float32), group=members, **signs)
    few = np.arange(20) % 5 < 2
    heat = {when: generator.random((8, 28, 28)) for when in ("before_dfr", "after_dfr")}
    np.savez(folder / "gradcam.npz", pictures=pictures[few], group=members[few], **heat)
    return folder


def write_many(folder, classes=4, epochs=3, empty=()):
    """A run folder of classes × classes groups, without analyses; returns the folder."""
    folder.mkdir()
    cells = groups.class_cells(classes, classes)
    rows = [
        (split, g, y, a, f"class {y}, {a}", 0 if g in empty and split == "test" else 5 + g)
        for split in ("train", "val", "target", "test")
        for g, (y, a) in enumerate(cells)
    ]
    columns = ["split", "group", "y", "a", "name", "count"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "group_counts.csv", index=False)
    table, time = {"epoch": np.arange(epochs + 1)}, np.arange(epochs + 1)
    for split in ("train", "val", "target", "test"):
        for g in range(len(cells)):
            gone = np.nan if g in empty and split == "test" else 1.0
            table[f"{split}_group_{g}_acc"] = gone * (g + time) / (len(cells) + epochs)
            table[f"{split}_group_{g}_loss"] = gone * np.exp(-time)
        for number, name in enumerate(("avg", "worst", "adjusted", "minority", "majority")):
            table[f"{split}_{name}_acc"] = 0.1 + 0.1 * number + 0.02 * time
        for name in ("avg", "worst"):
            table[f"{split}_{name}_loss"] = np.exp(-time)
    pd.DataFrame(table).to_csv(folder / "training_history.csv", index=False)
    (folder / "config_used.yaml").write_text(CONFIG, encoding="utf-8")
    row = {f"group_{g}_acc": 0.5 for g in range(len(cells))}
    row |= {f"{name}_acc": 0.4 for name in ("avg", "worst", "adjusted", "minority", "majority")}
    tuning = [{"c": 0.1, "minority_acc": 0.3}, {"c": 1.0, "minority_acc": None}]
    result = {"split_strategy": "target", "reg": "l1", "c": 0.1, "tuning": tuning}
    result |= {"tuned_for": "minority_acc", "before": {"test": row}, "after": {"test": row}}
    (folder / "dfr_results.json").write_text(json.dumps(result), encoding="utf-8")
    y = np.repeat(np.arange(classes), 3)
    pictures = np.random.default_rng(0).random((len(y), 64, 32, 3), dtype=np.float32)
    np.savez(folder / "samples.npz", pictures=pictures, group=y * classes, y=y, a=0 * y)
    return folder


def labels_of(figure):
    """The texts of all legends of a figure."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]
