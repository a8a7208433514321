"""The figure of `dfr_results.json`: what retraining the last layer does to the accuracies."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from lab.figures.panels import title
from lab.figures.style import BAR_LOOKS, GREY, RED, SPLIT_TITLES, STYLES, curve, group_style
from lab.figures.tables import read_dfr
from lab.folders.reading import RunTables


def before_and_after(ax, run: RunTables, before: pd.Series, after: pd.Series) -> None:
    """Two bars for every accuracy: pale and hatched before, full after."""
    bars = [("avg_acc", "average", GREY), ("adjusted_acc", "adjusted", GREY)]
    bars.append(("worst_acc", "worst\ngroup", GREY))
    if run.many:
        bars += [("minority_acc", "minority", GREY), ("majority_acc", "majority", GREY)]
    else:
        for g, label in run.labels.items():
            bars.append((f"group_{g}_acc", label.replace(", ", ",\n"), group_style(g)["color"]))
    table = pd.DataFrame({"before": before, "after": after}).dropna(how="all") * 100
    bars = [bar for bar in bars if bar[0] in table.index]
    for x, (key, _, colour) in enumerate(bars):
        for offset, time in ((-0.2, "before"), (0.2, "after")):
            value = table.loc[key, time]
            if np.isfinite(value):
                ax.bar(x + offset, value, 0.38, facecolor=colour, **BAR_LOOKS[time])
                ax.text(x + offset, value + 1, f"{value:.1f}", ha="center", fontsize=7)
    ax.set_xticks(range(len(bars)), [label for _, label, _ in bars])
    ax.set(ylabel="accuracy (%)", ylim=(0, 110), yticks=range(0, 101, 20))
    ax.grid(False, axis="x")


def tuning_curve(ax, points, chosen, score: str) -> None:
    """Accuracy on held-out tuning data for every C, the chosen one marked."""
    c, accuracy = np.transpose(points)
    curve(ax, c, accuracy, STYLES[2] | {"linestyle": "-"}, "tuning")
    if chosen is not None:
        ax.axvline(chosen, color=RED, linestyle="--", linewidth=1)
    if c.min() > 0:
        ax.set_xscale("log")
        # The options themselves, as many as have room.
        shown = sorted(c)[:: math.ceil(len(c) / 6)]
        ax.set_xticks(shown, [f"{value:g}" for value in shown], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title("tuning (dashed: chosen C)")
    ax.set(xlabel="inverse regularisation C", ylabel=score)


def dfr(run: RunTables) -> Figure | None:
    """Accuracies before and after retraining, and the tuning of its regularisation."""
    result = read_dfr(run.folder / "dfr_results.json")
    before, after = result.get("before", {}), result.get("after", {})
    splits = [split for split in SPLIT_TITLES if split in before and split in after]
    if not splits:
        return None
    points = result["tuning"]
    figure = Figure(figsize=(9 if points else 6.6, 1 + 2.1 * len(splits)), layout="constrained")
    widths = [3, 1] if points else [1]
    grid = figure.add_gridspec(len(splits), len(widths), width_ratios=widths)
    for row, split in enumerate(splits):
        ax = figure.add_subplot(grid[row, 0])
        before_and_after(ax, run, before[split], after[split])
        fitted = " (DFR was fitted on it)" if split == result.get("fitted_on") else ""
        ax.set_title(SPLIT_TITLES[split] + fitted)
    if points:
        on_minority = result.get("tuned_for") == "minority_acc"
        score = "validation\nminority accuracy" if on_minority else "worst-group accuracy"
        tuning_curve(figure.add_subplot(grid[0, 1]), points, result.get("c"), score)
    handles = [Patch(facecolor=GREY, label=time, **look) for time, look in BAR_LOOKS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    settings = [
        f"{key} {result[key]}" for key in ("split_strategy", "solver", "reg", "c") if key in result
    ]
    subject = f"DFR of {result.get('target_layer', 'the last layer')} ({', '.join(settings)})"
    figure.suptitle(title(run, subject))
    return figure
