"""The figures of a sweep: accuracies over seeds, curves with bands, heat map, gap dynamics.

Settings, not groups, are distinguished here, by colours that never mean a group. Of more settings
than colours can distinguish, one panel per value of the first key, or else the best few by
validation accuracy (without a validation split the first few) are drawn, which the figure says.
"""

import math
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.figures.drawing import save
from lab.figures.panels import pair_label
from lab.figures.style import (
    BLACK,
    GREEN,
    GREY,
    RC,
    RED,
    SPLIT_TITLES,
    STYLES,
    curve,
    finite,
    legend_below,
    new_figure,
    rescale,
    share_axis,
    zero_line,
)
from lab.figures.tables import analysis_splits, analysis_values
from lab.folders.reading import read_run
from lab.sweeping import grids

LINES = 8  # curves in a panel
PANELS = 6  # values of the first key, one panel each
ROWS = 60  # settings in the figure of accuracies
ROWS_OF_TERMS = 12  # settings in the figure of gap dynamics
METRICS = {"worst_acc": "worst-group accuracy", "minority_acc": "minority accuracy"}
TRANSFER = {"hidden_dim", "learning_rate", "initialization_method"}
SETTING_STYLES = [
    *({"color": colour, "linestyle": "-", "marker": "o"} for colour in (RED, GREEN, BLACK, GREY)),
    *(
        {"color": colour, "linestyle": "--", "marker": "s", "markerfacecolor": "white"}
        for colour in (RED, GREEN, BLACK, GREY)
    ),
]
# `total` and its terms are of ∇R, the flow of ERM, whatever the method; `method_total` is of the
# setting's own method.
TERMS = {
    "method_total": ("total under the setting's method", STYLES[2] | {"linestyle": "-"}),
    "total": ("total of ERM's flow", STYLES[2] | {"markerfacecolor": "white"}),
    "term1": ("its term 1: without bias", STYLES[1]),
    "term2": ("its term 2: marginal imbalance", STYLES[3]),
    "term3": ("its term 3: spurious correlation", STYLES[0] | {"linestyle": "-."}),
}
# The test gap under the training flow: under the flow of a test split without correlation, term 3
# is 0 by construction.
SIDES = ("train", "test_under_train")


def draw(sweep, ranked: list[int], order: str) -> list[Path]:
    """Draw every figure that the sweep (a `collect.Sweep`) has runs for into `<sweep>/plots/`.

    ranked: the settings with finished runs, the ones to be shown of too many first; order: what
    these are called, such as `best by validation`.
    """
    if not ranked:
        return []
    runs = {
        setting: [read_run(sweep.folder / folder) for folder in sweep.done(setting).folder]
        for setting in ranked
    }
    file_format = runs[ranked[0]][0].config.get("plot_format", "png")
    plots = sweep.folder / "plots"
    plots.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(RC):
        for make in (accuracies, training_curves, heat_map, gap_dynamics, transfer):
            figure = make(sweep, runs, order)
            if figure is not None:
                paths.append(plots / f"{make.__name__}.{file_format}")
                save(figure, paths[-1], file_format)
    return paths


def name(sweep, setting: int, width: int, without: str | None = None) -> str:
    """A setting's name in lines of this many characters; without: a key to leave out."""
    (row,) = [row for row in sweep.settings if row["setting"] == setting]
    text = row["name"]
    if without is not None:
        rest = {key: value for key, value in row["overrides"].items() if key != without}
        text = ", ".join(f"{key}={shown(value)}" for key, value in rest.items())
    return textwrap.fill(text, width, break_on_hyphens=False)


def shown(value) -> str:
    """A value of a key as tables and figures show it."""
    return f"{value:.4g}" if isinstance(value, float) else grids.override_text(value)


def values_of(sweep, key: str) -> dict[int, str]:
    """Setting → its value of a key."""
    return {row["setting"]: shown(row["overrides"].get(key)) for row in sweep.settings}


def few(ranked, limit: int, order: str) -> tuple[list[int], str]:
    """The settings to show, as planned, and what to say when these are not all."""
    ranked = list(ranked)
    note = f" (the {limit} {order} of {len(ranked)} settings)" if len(ranked) > limit else ""
    return sorted(ranked[:limit]), note


def panels(sweep, ranked, order: str) -> tuple[list[tuple[str, list[int]]], str]:
    """([(title, settings of a panel)], what to say when these are not all settings)."""
    if len(ranked) > LINES and len(sweep.keys) > 1:
        value = values_of(sweep, sweep.keys[0])
        parts: dict[str, list[int]] = {}
        for setting in sorted(ranked):
            parts.setdefault(value[setting], []).append(setting)
        if len(parts) <= PANELS and max(map(len, parts.values())) <= LINES:
            return [(f"{sweep.keys[0]}={v}", part) for v, part in parts.items()], ""
    chosen, note = few(ranked, LINES, order)
    return [("", chosen)], note


def over_seeds(tables: list[pd.DataFrame], column: str) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) of a column over runs, the index is the epoch."""
    series = [pd.Series(finite(table[column]), table.index) for table in tables if column in table]
    if not series:
        return pd.DataFrame({"mean": [], "std": []})
    seeds = pd.concat(series, axis=1)
    return pd.DataFrame({"mean": seeds.mean(axis=1), "std": seeds.std(axis=1, ddof=1)})


def banded_curve(ax, over: pd.DataFrame, style: dict, label: str) -> None:
    """A mean over seeds in a band of one standard deviation."""
    curve(ax, over.index, over["mean"], style, label)
    low, high = over["mean"] - over["std"], over["mean"] + over["std"]
    if low.notna().any():
        ax.fill_between(over.index, low, high, color=style["color"], alpha=0.15, linewidth=0)


def epoch_axis(axes) -> None:
    """Whole epochs on the shared x axis."""
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")


def accuracies(sweep, runs: dict, order: str) -> Figure:
    """Test accuracy of every setting before and after DFR: a dot per seed, mean ± deviation."""
    settings, note = few(runs, ROWS, order)
    names = [name(sweep, setting, 40) for setting in settings]
    lines = np.array([max(2, text.count("\n") + 1) for text in names])
    figure = Figure(figsize=(7.5, 1.3 + 0.2 * lines.sum()), layout="constrained")
    ax = figure.subplots()
    middles = np.cumsum(lines) - lines / 2
    # The dots of the seeds lie below the bar, where it does not hide them.
    times = {"": ("before DFR", BLACK, "white", -0.6), "dfr_": ("after DFR", RED, RED, 0.25)}
    if f"dfr_test_{sweep.metric}" not in sweep.runs:
        times = {"": ("mean ± standard deviation", BLACK, "white", -0.15)}
    for prefix, (label, colour, fill, offset) in times.items():
        for y, setting in zip(middles + offset, settings, strict=True):
            values = finite(sweep.done(setting)[f"{prefix}test_{sweep.metric}"])
            spread = values.std(ddof=1) if len(values) > 1 else 0
            look: dict[str, Any] = {
                "color": colour,
                "markerfacecolor": fill,
                "marker": "D",
                "linestyle": "",
            }
            ax.errorbar(values.mean(), y, xerr=spread, capsize=3, label=label, **look)
            dots: dict[str, Any] = {
                "color": colour,
                "alpha": 0.5,
                "markeredgewidth": 0,
                "linestyle": "none",
            }
            ax.plot(values, np.full(len(values), y + 0.35), marker="o", **dots)
    ax.set_yticks(middles, names)
    ax.set(ylim=(lines.sum(), 0), xlim=(-0.03, 1.03), xlabel=f"test {METRICS[sweep.metric]}")
    ax.grid(False, axis="y")
    legend_below(figure)
    figure.suptitle(f"{sweep.name}: every seed, mean ± standard deviation{note}")
    return figure


def training_curves(sweep, runs: dict, order: str) -> Figure | None:
    """Accuracy over the epochs on every split, mean over seeds with bands, a line per setting."""
    parts, note = panels(sweep, runs, order)
    tables = {s: [run.history.set_index("epoch") for run in runs[s]] for s in runs}
    columns = {column for each in tables.values() for table in each for column in table}
    splits = [split for split in SPLIT_TITLES if f"{split}_{sweep.metric}" in columns]
    if not splits:
        return None
    figure, axes = new_figure(len(parts), splits)
    styles: dict[str, dict] = {}  # the same for what differs in the other keys only
    for row, (title, settings) in zip(axes, parts, strict=True):
        for setting in settings:
            label = name(sweep, setting, 45, sweep.keys[0] if title else None)
            style = styles.setdefault(label, SETTING_STYLES[len(styles) % LINES])
            for ax, split in zip(row, splits, strict=True):
                over = over_seeds(tables[setting], f"{split}_{sweep.metric}")
                banded_curve(ax, over, style, label)
        share_axis(row, textwrap.fill(title, 26) + "\n" * bool(title) + METRICS[sweep.metric])
    epoch_axis(axes)
    legend_below(figure, list(styles))
    lines = sum(label.count("\n") + 1 for label in styles)
    figure.set_figheight(figure.get_figheight() + 0.1 * lines)
    figure.suptitle(f"{sweep.name}: mean over seeds, band: ± standard deviation{note}")
    return figure


def heat_map(sweep, runs: dict, order: str) -> Figure | None:
    """Mean test accuracy in every cell of a grid of exactly two keys, before and after DFR."""
    if len(sweep.keys) != 2:
        return None
    first, second = (values_of(sweep, key) for key in sweep.keys)
    rows, columns = list(dict.fromkeys(first.values())), list(dict.fromkeys(second.values()))
    cells = {(first[s], second[s]): s for s in first}
    if not len(cells) == len(sweep.settings) == len(rows) * len(columns):
        return None
    titles = {"": "before DFR", "dfr_": "after DFR"}
    titles = {k: v for k, v in titles.items() if f"{k}test_{sweep.metric}" in sweep.runs}
    width = max(3.0, 0.6 * len(columns) + 1.2)
    size = (1.4 + width * len(titles), 1.6 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for ax, (prefix, title) in zip(axes, titles.items(), strict=True):
        column = f"{prefix}test_{sweep.metric}"
        table = [[finite(sweep.done(cells[r, c])[column]) for c in columns] for r in rows]
        means = np.array([[v.mean() if len(v) else math.nan for v in row] for row in table])
        ax.grid(False)
        ax.set_facecolor("lightgrey")  # shows where there is no value
        picture = ax.imshow(means, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for i, j in product(range(len(rows)), range(len(columns))):
            if np.isfinite(means[i, j]):
                colour = "white" if means[i, j] < 0.6 else "black"
                ax.text(j, i, f"{means[i, j]:.3f}", ha="center", va="center", color=colour)
        ax.set_xticks(range(len(columns)), [textwrap.fill(c, 12) for c in columns])
        ax.set_yticks(range(len(rows)), [textwrap.fill(r, 20) for r in rows])
        ax.set(xlabel=sweep.keys[1], title=title if len(titles) > 1 else "")
    axes[0].set_ylabel(sweep.keys[0])
    figure.colorbar(picture, ax=axes).set_label(f"test {METRICS[sweep.metric]}")
    missing = " (grey: none)" if len(runs) < len(sweep.settings) else ""
    figure.suptitle(f"{sweep.name}: mean over seeds{missing}")
    return figure


def gap_dynamics(sweep, runs: dict, order: str) -> Figure | None:
    """What moves the loss gap, mean over seeds: a row per setting, two columns per pair."""
    analysis = "gap_dynamics_factors"
    analysed = [s for s in runs if any((r.analysis.analysis == analysis).any() for r in runs[s])]
    if not analysed:
        return None
    settings, note = few(analysed, ROWS_OF_TERMS, order)
    every = [run for setting in settings for run in runs[setting]]
    pairs = [p for run in every for p in run.analysis.pair[run.analysis.analysis == analysis]]
    present = {side for run in every for side in analysis_splits(run, analysis)}
    sides = [side for side in SIDES if side in present] or ["test"]  # analysis_target: test
    columns = list(product(dict.fromkeys(pairs), sides))
    size = (1 + 2.7 * len(columns), 1.2 + 2.1 * len(settings))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(settings), len(columns), squeeze=False, sharex=True, sharey="row")
    for ax, (pair, split) in zip(axes[0], columns, strict=True):
        ax.set_title(f"{pair_label(every[0], *pair.split('_vs_'))}\n{SPLIT_TITLES[split]}")
    for row, setting in zip(axes, settings, strict=True):
        for ax, (pair, split) in zip(row, columns, strict=True):
            tables = [analysis_values(run, analysis, split, pair) for run in runs[setting]]
            for term, (label, style) in TERMS.items():
                banded_curve(ax, over_seeds(tables, term), style, label)
        rescale(row, f"{name(sweep, setting, 28)}\nd(loss gap)/dt", signed=True)
        row[0].yaxis.label.set_size(8)
        zero_line(row)
    epoch_axis(axes)
    legend_below(figure, [label for label, _ in TERMS.values()])
    figure.suptitle(
        f"{sweep.name}: gap dynamics, mean over seeds, band: ± standard deviation{note}"
    )
    return figure


def transfer(sweep, runs: dict, order: str) -> Figure | None:
    """Final training loss over the learning rate: a line per width, a panel per parametrisation.

    Under muP the learning rate that is best at one width stays best at all (Yang et al., 2021).
    """
    if set(sweep.keys) != TRANSFER or "train_avg_loss" not in sweep.runs:
        return None
    keys = pd.DataFrame([row["overrides"] for row in sweep.settings])
    losses = [finite(sweep.done(row["setting"])["train_avg_loss"]) for row in sweep.settings]
    keys["mean"] = [v.mean() if len(v) else math.nan for v in losses]
    keys["std"] = [v.std(ddof=1) if len(v) > 1 else math.nan for v in losses]
    keys = keys.sort_values("learning_rate").set_index("learning_rate")
    widths = sorted(keys.hidden_dim.unique())
    methods = list(
        dict.fromkeys(row["overrides"]["initialization_method"] for row in sweep.settings)
    )
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(widths)))
    figure = Figure(figsize=(1 + 3.2 * len(methods), 4), layout="constrained")
    axes = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)
    for ax, method in zip(axes[0], methods, strict=True):
        for width, colour in zip(widths, colours, strict=True):
            over = keys[(keys.hidden_dim == width) & (keys.initialization_method == method)]
            banded_curve(
                ax, over, {"color": colour, "linestyle": "-", "marker": "."}, f"width {width}"
            )
            if over["mean"].notna().any():
                best = over["mean"].idxmin()
                star = {"marker": "*", "markersize": 11, "markeredgecolor": BLACK, "zorder": 5}
                ax.plot(best, over["mean"][best], color=colour, linestyle="none", **star)
        ax.set(title=method, xlabel="learning rate", xscale="log")
    rescale(axes[0], "final training loss", signed=False)
    legend_below(figure, [f"width {width}" for width in widths])
    figure.suptitle(f"{sweep.name}: final training loss per width (star: best learning rate)")
    return figure
