"""Saved tables of a run in, figures out: `python plotting.py results/<run> [--format png|svg]`.

Reads only the tables in the run's folder and never a model. Every group has one colour, line style
and marker in all figures; groups avoid red and green, because groups are often named after them.
"""

import argparse
import json
import os
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

import groups

FORMATS = ("png", "svg")
TABLES = ("training_history.csv", "analysis.csv", "dfr_results.json", "samples.npz")
SPLIT_TITLES = {
    "train": "train",
    "val": "validation",
    "test": "test",
    "test_under_train": "test gap, training gradient",
}
PICTURES_PER_GROUP = 8
# Beyond any float32; squares and sums of what is below stay finite in float64.
LARGEST = 1e100

# Okabe-Ito; the first four never mean anything but a group.
GROUP_COLOURS = (
    *("#0072B2", "#E69F00", "#56B4E9", "#CC79A7"),
    *("#009E73", "#D55E00", "#F0E442", "#000000"),
)
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
HATCHES = ("", "////", "....", "xxxx")
RED, GREEN, BLACK, GREY = "#D55E00", "#009E73", "#000000", "#7F7F7F"
STYLES = [
    {"color": colour, "linestyle": line, "marker": marker}
    for colour, line, marker in zip((RED, GREEN, BLACK, GREY), LINE_STYLES, MARKERS, strict=True)
]
# Six styles for the pairs among four things, in the order of `combinations`: a pair and its
# complement share the colour, the complement is dashed with open markers.
PAIR_STYLES = [{**style, "linestyle": "-"} for style in STYLES[:3]] + [
    {**style, "linestyle": "--", "markerfacecolor": "white"} for style in STYLES[2::-1]
]
RC = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "plotting",
}


class PlotError(Exception):
    """What the user can fix about a run folder: one line, no traceback."""


@dataclass
class Run:
    """The tables of one run folder; `labels` and `codes` map a group index to its names."""

    folder: Path
    config: dict
    history: pd.DataFrame
    counts: pd.DataFrame
    analysis: pd.DataFrame
    labels: dict[int, str]
    codes: dict[int, str]

    @property
    def method(self) -> str:
        """Name of the training method; no debiasing is ERM."""
        method = self.config.get("debias_method") or "None"
        return "ERM" if method == "None" else str(method)

    def label(self, code: str) -> str:
        """Readable name of a group given as in the tables, such as `G(-1,+1)`."""
        return {self.codes[g]: self.labels[g] for g in self.codes}.get(code, code)


def read_table(path: Path, columns) -> pd.DataFrame:
    """A CSV table that must have these columns; without rows if the file is missing or empty."""
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=list(columns))
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise PlotError(f"{path}: not a readable table: {error}") from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise PlotError(f"{path}: no column {', '.join(missing)}")
    return table


def read_config(path: Path) -> dict:
    """The run's configuration, {} if it was not saved."""
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlotError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(config, dict):
        raise PlotError(f"{path}: not a mapping of settings")
    return config


def read_run(folder) -> Run:
    """Read the tables of a run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PlotError(f"{folder}: no such run folder")
    if not any((folder / table).is_file() for table in TABLES):
        raise PlotError(f"{folder}: not a run folder, none of {', '.join(TABLES)} is there")
    history = read_table(folder / "training_history.csv", ["epoch"])
    counts = read_table(folder / "group_counts.csv", ["split", "group", "y", "a", "name", "count"])
    columns = ["epoch", "split", "analysis", "pair", "quantity", "value"]
    analysis = read_table(folder / "analysis.csv", columns)
    analysis["pair"] = analysis["pair"].astype(object).fillna("")
    if counts.empty:
        labels = codes = {g: groups.name(g) for g in range(len(groups.GROUPS))}
    else:
        cells = counts.drop_duplicates("group").sort_values("group")
        labels = {int(cell.group): str(cell.name) for cell in cells.itertuples(index=False)}
        codes = {
            int(cell.group): f"G({int(cell.y):+d},{int(cell.a):+d})"
            for cell in cells.itertuples(index=False)
        }
    config = read_config(folder / "config_used.yaml")
    return Run(folder, config, history, counts, analysis, labels, codes)


def group_style(group: int) -> dict:
    """Colour, line style and marker of a group, the same in every figure."""
    return {
        "color": GROUP_COLOURS[group % len(GROUP_COLOURS)],
        "linestyle": LINE_STYLES[(group + group // len(GROUP_COLOURS)) % len(LINE_STYLES)],
        "marker": MARKERS[group % len(MARKERS)],
    }


def pair_label(run: Run, first: str, second: str, sign: str = "−") -> str:
    """Two groups (codes) as text, what they share said once: `digit < 5: red − green`."""
    names = [run.label(code).split(", ") for code in (first, second)]
    if len(names[0]) == len(names[1]) == 2:
        for shared, differing in ((0, 1), (1, 0)):
            if names[0][shared] == names[1][shared]:
                return f"{names[0][shared]}: {names[0][differing]} {sign} {names[1][differing]}"
    return f"{run.label(first)} {sign}\n{run.label(second)}"


def finite(values) -> np.ndarray:
    """The values as float64, those of a diverged run as NaN."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """Finite values of a column, all NaN if the table lacks it."""
    return finite(table[name]) if name in table else np.full(len(table), np.nan)


def history_splits(run: Run) -> list[str]:
    """The splits of the training history."""
    return [split for split in ("train", "val", "test") if f"{split}_avg_loss" in run.history]


def analysis_values(run: Run, analysis: str, split: str, pair: str = "") -> pd.DataFrame:
    """One row an epoch (the index), one column a quantity."""
    rows = run.analysis
    rows = rows[(rows.analysis == analysis) & (rows.split == split) & (rows.pair == pair)]
    rows = rows.drop_duplicates(["epoch", "quantity"], keep="last")
    return rows.pivot(index="epoch", columns="quantity", values="value").sort_index()


def analysis_epochs(run: Run, analysis: str) -> pd.Series:
    """The epochs at which an analysis ran."""
    return run.analysis.epoch[run.analysis.analysis == analysis]


def analysis_splits(run: Run, analysis: str) -> list[str]:
    """The splits that an analysis was made for."""
    found = set(run.analysis.split[run.analysis.analysis == analysis])
    return [split for split in SPLIT_TITLES if split in found]


def empty_groups(run: Run, split: str) -> list[str]:
    """Names of the groups without samples in a split."""
    return list(run.counts.name[(run.counts.split == split) & (run.counts["count"] == 0)])


def new_figure(rows: int, splits: list[str]):
    """A figure with these rows of panels and one titled column a split."""
    figure = Figure(figsize=(1 + 2.7 * len(splits), 0.9 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, len(splits), squeeze=False, sharex=True, sharey="row")
    for ax, split in zip(axes[0], splits, strict=True):
        ax.set_title(SPLIT_TITLES[split])
    return figure, axes


def curve(ax, x, y, style: dict, label: str) -> None:
    """Plot one curve with about ten markers; points without neighbours always have one.

    A curve without a finite value is left out, from the legend too.
    """
    x, y = np.asarray(x), finite(y)
    shown = np.isfinite(y)
    if not shown.any():
        return
    isolated = shown & ~np.r_[False, shown[:-1]] & ~np.r_[shown[1:], False]
    step = max(1, round(len(x) / 10))
    marked = isolated | (np.arange(len(x)) % step == 0) | (style["linestyle"] == "none")
    ax.plot(x, y, label=label, markevery=np.flatnonzero(marked).tolist(), **style)


def rescale(axes, text: str, signed: bool) -> None:
    """Label the y axis of a row of panels, logarithmic if the curves span two decades or more.

    Signed values get a symlog axis, linear below the 10th percentile of the magnitudes, not
    counting rounding errors (a millionth of the median).
    """
    sizes = np.concatenate([[], *(line.get_ydata() for ax in axes for line in ax.lines)])
    sizes = np.abs(sizes[np.isfinite(sizes) & (sizes != 0)])
    if sizes.size:
        sizes = sizes[sizes > 1e-6 * np.median(sizes)] if signed else sizes
        low = np.log10(np.percentile(sizes, 10, method="lower") if signed else sizes.min())
        if np.log10(sizes.max()) - low >= 2:
            text += " (symlog)" if signed else " (log)"
            for ax in axes:
                if signed:
                    ax.set_yscale("symlog", linthresh=10 ** np.floor(low))
                    locator = SymmetricalLogLocator(ax.yaxis.get_transform())
                    locator.set_params(numticks=7)
                    ax.yaxis.set_major_locator(locator)
                else:
                    ax.set_yscale("log")
    axes[0].set_ylabel(text)


def zero_line(axes) -> None:
    """Mark zero in panels whose sign matters."""
    for ax in axes:
        if ax.has_data():
            ax.axhline(0, color=BLACK, linewidth=0.6, zorder=1)


def share_axis(axes, text: str) -> None:
    """Label a row of panels that show accuracies or shares."""
    axes[0].set(ylabel=text, ylim=(-0.03, 1.03))


def unique_handles(axes, order=()) -> dict:
    """Legend label → handle over several panels, in the given order where there is one."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return {label: found[label] for label in dict.fromkeys([*order, *found]) if label in found}


def legend_below(figure: Figure, order=()) -> None:
    """One legend for all panels, below them, in as many columns as fit."""
    found = unique_handles(figure.axes, order)
    if found:
        width = 0.6 + 0.075 * max(len(label) for label in found)
        columns = max(1, min(len(found), int(figure.get_figwidth() / width)))
        place = "outside lower center"
        figure.legend(list(found.values()), list(found), loc=place, ncols=columns)


def legend_beside(axes, order=()) -> None:
    """One legend for a row of panels, to the right of it."""
    found = unique_handles(axes, order)
    if found:
        place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "borderaxespad": 0}
        axes[-1].legend(list(found.values()), list(found), **place)


def title(run: Run, subject: str) -> str:
    """Subject, run and method, and where the training diverged."""
    text = f"{subject}: {run.config.get('experiment_name', run.folder.resolve().name)}"
    text += f", {run.method}" if run.config else ""
    if "train_avg_loss" in run.history:
        lost = run.history.epoch[np.isnan(finite(run.history.train_avg_loss))]
        text += f" (diverged at epoch {lost.min()})" if len(lost) else ""
    return text


def finish_epochs(run: Run, figure: Figure, axes, subject: str, epochs) -> Figure:
    """Title, whole epochs on the shared x axis, and a word in panels without a curve."""
    first, last = min(epochs), max(epochs)
    margin = 0.5 if first == last else 0.04 * (last - first)
    axes[0, 0].set_xlim(first - margin, last + margin)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    for ax in axes.flat:
        if not ax.has_data():
            ax.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=ax.transAxes)
    figure.suptitle(title(run, subject))
    return figure


def training_history(run: Run) -> Figure | None:
    """Average, adjusted and worst-group loss and accuracy of every split."""
    splits = history_splits(run)
    if run.history.empty or not splits:
        return None
    figure, axes = new_figure(2, splits)
    kinds = (
        ("avg", "average"),
        ("adjusted", "adjusted (training shares)"),
        ("worst", "worst group"),
    )
    for (kind, label), style in zip(kinds, (STYLES[2], STYLES[1], STYLES[0]), strict=True):
        for row, metric in enumerate(("loss", "acc")):
            for ax, split in zip(axes[row], splits, strict=True):
                values = column(run.history, f"{split}_{kind}_{metric}")
                curve(ax, run.history.epoch, values, style, label)
    rescale(axes[0], "loss", signed=False)
    share_axis(axes[1], "accuracy")
    legend_below(figure)
    return finish_epochs(run, figure, axes, "Training history", run.history.epoch)


def name_empty_groups(run: Run, axes, splits: list[str]) -> None:
    """Say below the title of a split which groups have no samples there."""
    for ax, split in zip(axes[0], splits, strict=True):
        empty = "; ".join(empty_groups(run, split))
        if empty:
            note = textwrap.fill(f"no samples: {empty}", 42)
            ax.set_title(f"{SPLIT_TITLES[split]}\n{note}", fontsize=8)


def group_curves(run: Run) -> Figure | None:
    """Loss and accuracy of every group."""
    splits = history_splits(run)
    if run.history.empty or not splits:
        return None
    figure, axes = new_figure(2, splits)
    for group, label in run.labels.items():
        for row, metric in enumerate(("loss", "acc")):
            for ax, split in zip(axes[row], splits, strict=True):
                values = column(run.history, f"{split}_group_{group}_{metric}")
                curve(ax, run.history.epoch, values, group_style(group), label)
    name_empty_groups(run, axes, splits)
    rescale(axes[0], "loss", signed=False)
    share_axis(axes[1], "accuracy")
    legend_below(figure, run.labels.values())
    return finish_epochs(run, figure, axes, "Groups", run.history.epoch)


def gap_pairs(run: Run) -> list[tuple[str, str]]:
    """Codes of the configured pairs of groups, else of the pairs that were analysed."""
    section = run.config.get("gap_dynamics_factors")
    configured = section.get("group_pairs") if isinstance(section, dict) else None
    if configured:
        return [tuple(f"G({y:+d},{a:+d})" for y, a in pair) for pair in configured]
    return [tuple(pair.split("_vs_")) for pair in dict.fromkeys(run.analysis.pair) if pair]


def gaps(run: Run) -> Figure | None:
    """Loss and accuracy of the first group minus those of the second, for every pair."""
    splits, pairs = history_splits(run), gap_pairs(run)
    index = {code: group for group, code in run.codes.items()}
    pairs = [pair for pair in pairs if set(pair) <= set(index)]
    if run.history.empty or not splits or not pairs:
        return None
    figure, axes = new_figure(2, splits)
    for number, (first, second) in enumerate(pairs):
        style = PAIR_STYLES[(0, 4, 2, 3, 1, 5)[number % 6]]
        for row, metric in enumerate(("loss", "acc")):
            for ax, split in zip(axes[row], splits, strict=True):
                minuend = column(run.history, f"{split}_group_{index[first]}_{metric}")
                subtrahend = column(run.history, f"{split}_group_{index[second]}_{metric}")
                label = pair_label(run, first, second)
                curve(ax, run.history.epoch, minuend - subtrahend, style, label)
    name_empty_groups(run, axes, splits)
    rescale(axes[0], "loss gap", signed=True)
    axes[1, 0].set_ylabel("accuracy gap")
    zero_line(axes.flat)
    legend_below(figure)
    return finish_epochs(run, figure, axes, "Gaps between groups", run.history.epoch)


def gradient_basis(run: Run) -> Figure | None:
    """Norms of the four basis gradients and the cosines between them."""
    splits = analysis_splits(run, "gradient_basis")
    if not splits:
        return None
    names = {"inv": "$v_{inv}$", "Y": "$v_Y$", "A": "$v_A$", "AY": "$v_{AY}$"}
    figure, axes = new_figure(2, splits)
    for column_axes, split in zip(axes.T, splits, strict=True):
        table = analysis_values(run, "gradient_basis", split)
        for style, name in zip(STYLES, names, strict=True):
            values = column(table, f"norm_{name}")
            curve(column_axes[0], table.index, values, style, names[name])
        for style, (one, two) in zip(PAIR_STYLES, combinations(names, 2), strict=True):
            values = column(table, f"cosine_{one}_{two}")
            curve(column_axes[1], table.index, values, style, f"{names[one]}, {names[two]}")
    rescale(axes[0], "norm", signed=False)
    cosine_axis(axes[1])
    for row in axes:
        legend_beside(row)
    epochs = analysis_epochs(run, "gradient_basis")
    return finish_epochs(run, figure, axes, "Gradient basis", epochs)


def cosine_axis(axes) -> None:
    """Label a row of panels that show cosines."""
    axes[0].set(ylabel="cosine", ylim=(-1.08, 1.08))
    zero_line(axes)


def term_panels(run: Run, analysis: str, terms: dict, subject: str) -> Figure | None:
    """What moves the loss gap of every pair on every split; terms: quantity → (label, style)."""
    splits = analysis_splits(run, analysis)
    rows = run.analysis[run.analysis.analysis == analysis]
    pairs = [pair for pair in dict.fromkeys(rows.pair) if pair]
    if not splits or not pairs:
        return None
    figure, axes = new_figure(len(pairs), splits)
    for row, pair in zip(axes, pairs, strict=True):
        for ax, split in zip(row, splits, strict=True):
            table = analysis_values(run, analysis, split, pair)
            total = column(table, "total")
            for quantity, (label, style) in terms.items():
                values = column(table, quantity)
                # Under ERM the two totals are the same curve: the second would only hide the first.
                same = np.allclose(values, total, rtol=1e-4, equal_nan=True)
                if quantity != "method_total" or not same:
                    curve(ax, table.index, values, style, label)
        names = pair_label(run, *pair.split("_vs_")) if "_vs_" in pair else pair
        rescale(row, f"{names}\nd(loss gap)/dt", signed=True)
        zero_line(row)
    legend_below(figure, [label for label, _ in terms.values()])
    return finish_epochs(run, figure, axes, subject, analysis_epochs(run, analysis))


def gap_dynamics_factors(run: Run) -> Figure | None:
    """Time derivative of the loss gap, split by what causes it."""
    dots = {"color": GREY, "linestyle": "none", "marker": "o", "markerfacecolor": "none"}
    terms = {
        "measured": ("measured: Δgap / learning rate", dots | {"markersize": 5.5}),
        "total": ("total (gradient flow)", STYLES[2] | {"linestyle": "-"}),
        "method_total": (f"total under {run.method}", STYLES[2] | {"markerfacecolor": "white"}),
        "term1": ("term 1: without bias", STYLES[1]),
        "term2": ("term 2: marginal imbalance", STYLES[3]),
        "term3": ("term 3: spurious correlation", STYLES[0] | {"linestyle": "-."}),
    }
    return term_panels(run, "gap_dynamics_factors", terms, "Gap dynamics")


def static_dynamic_decomposition(run: Run) -> Figure | None:
    """Time derivative of the loss gap, split into static and dynamic parts of the gradients."""
    terms = {
        "total": ("total", STYLES[2] | {"linestyle": "-"}),
        "TermA": ("A: static", STYLES[1]),
        "TermB": ("B: mixed", STYLES[3]),
        "TermC": ("C: dynamic", STYLES[0] | {"linestyle": "-."}),
    }
    analysis = "static_dynamic_decomposition"
    return term_panels(run, analysis, terms, "Static and dynamic parts")


def jacobian_norm(run: Run) -> Figure | None:
    """Mean Jacobians of the groups: squared norms, cosines, attribute against label direction."""
    splits = analysis_splits(run, "jacobian_norm")
    if not splits:
        return None
    figure, axes = new_figure(4, splits)
    differences = {"norm_Delta_S": "attribute, $||Δ_S||$", "norm_Delta_L": "label, $||Δ_L||$"}
    for column_axes, split in zip(axes.T, splits, strict=True):
        table = analysis_values(run, "jacobian_norm", split)
        norms, cosines, directions, ratio = column_axes
        for group, code in run.codes.items():
            values = column(table, f"norm_sq_{code}")
            curve(norms, table.index, values, group_style(group), run.labels[group])
        for number, (one, two) in enumerate(combinations(run.codes.values(), 2)):
            values = column(table, f"cosine_{one}_vs_{two}")
            style = PAIR_STYLES[number % len(PAIR_STYLES)]
            curve(cosines, table.index, values, style, pair_label(run, one, two, "×"))
        for style, (quantity, label) in zip(STYLES, differences.items(), strict=False):
            curve(directions, table.index, column(table, quantity), style, label)
        values = column(table, "ratio_Delta_S_L")
        curve(ratio, table.index, values, STYLES[2], "$||Δ_S||\\,/\\,||Δ_L||$")
    rescale(axes[0], "squared norm $||m_g||^2$", signed=False)
    cosine_axis(axes[1])
    rescale(axes[2], "norm", signed=False)
    rescale(axes[3], "ratio", signed=False)
    for row in axes:
        legend_beside(row)
    epochs = analysis_epochs(run, "jacobian_norm")
    return finish_epochs(run, figure, axes, "Mean Jacobians", epochs)


def model_output_expectation(run: Run) -> Figure | None:
    """Mean output per group in a band of one standard deviation."""
    splits = analysis_splits(run, "model_output_expectation")
    if not splits:
        return None
    figure, axes = new_figure(1, splits)
    for ax, split in zip(axes[0], splits, strict=True):
        table = analysis_values(run, "model_output_expectation", split)
        for group, code in run.codes.items():
            style, mean = group_style(group), column(table, f"mean_{code}")
            std = column(table, f"std_{code}")
            curve(ax, table.index, mean, style, run.labels[group])
            if np.isfinite(mean + std).any():
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                ax.fill_between(table.index, mean - std, mean + std, **band)
                # A band of one epoch has no width: bars show it.
                if len(table) == 1:
                    ax.errorbar(table.index, mean, std, color=style["color"], capsize=3)
    rescale(axes[0], "output f, mean ± std", signed=True)
    zero_line(axes[0])
    legend_below(figure, run.labels.values())
    epochs = analysis_epochs(run, "model_output_expectation")
    return finish_epochs(run, figure, axes, "Model output", epochs)


def misclassification(run: Run) -> Figure | None:
    """Error rate of every group and its share among all errors of the split."""
    splits = history_splits(run)
    if run.history.empty or not splits:
        return None
    epochs = run.history.epoch.to_numpy()
    # Bars one epoch wide, without gaps where epochs are missing.
    edges = np.r_[epochs[0] - 0.5, (epochs[1:] + epochs[:-1]) / 2, epochs[-1] + 0.5]
    figure, axes = new_figure(1 if run.counts.empty else 2, splits)
    for column_axes, split in zip(axes.T, splits, strict=True):
        counts = run.counts[run.counts.split == split].set_index("group")["count"]
        rates = {g: 1 - column(run.history, f"{split}_group_{g}_acc") for g in run.labels}
        for group, rate in rates.items():
            curve(column_axes[0], epochs, rate, group_style(group), run.labels[group])
        errors = {g: np.nan_to_num(rate) * counts.get(g, 0) for g, rate in rates.items()}
        total = sum(errors.values())
        total = np.where(total > 0, total, np.nan)
        if len(axes) == 1 or np.isnan(total).all():
            continue
        base = np.zeros(len(epochs))
        for group, values in errors.items():
            top = base + np.nan_to_num(values / total)
            fill = {"facecolor": group_style(group)["color"], "edgecolor": "white"}
            fill["hatch"] = HATCHES[group % len(HATCHES)]
            column_axes[1].stairs(top, edges, baseline=base, fill=True, linewidth=0, **fill)
            base = top
    name_empty_groups(run, axes, splits)
    share_axis(axes[0], "error rate")
    if len(axes) == 2:
        share_axis(axes[1], "share of all errors")
    legend_below(figure, run.labels.values())
    return finish_epochs(run, figure, axes, "Errors by group", epochs)


def read_dfr(path: Path) -> dict:
    """The results of retraining, accuracies as floats; {} if the file is missing or empty."""
    if not path.is_file() or not path.read_bytes().strip():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for time in ("before", "after"):
            result[time] = {
                split: {key: float("nan" if value is None else value) for key, value in row.items()}
                for split, row in result[time].items()
            }
        points = [(float(p["c"]), float(p["worst_acc"])) for p in result.get("tuning") or []]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise PlotError(f"{path}: not the results of a DFR run: {problem}") from error
    return result | {"tuning": sorted(points)}


def before_and_after(ax, run: Run, before: dict, after: dict) -> None:
    """Two bars for every accuracy: pale and hatched before, full after."""
    bars = [("avg_acc", "average", GREY), ("adjusted_acc", "adjusted", GREY)]
    bars.append(("worst_acc", "worst\ngroup", GREY))
    for group, label in run.labels.items():
        bars.append((f"group_{group}_acc", label.replace(", ", ",\n"), group_style(group)["color"]))
    shown = []
    looks = ({"alpha": 0.45, "hatch": "////", "edgecolor": "white"}, {})
    for key, label, colour in bars:
        values = finite([before.get(key, np.nan), after.get(key, np.nan)])
        if np.isnan(values).all():
            continue
        for offset, value, look in zip((-0.2, 0.2), values, looks, strict=True):
            if np.isfinite(value):
                x = len(shown) + offset
                ax.bar(x, value, 0.38, facecolor=colour, **look)
                ax.text(x, value + 0.01, f"{100 * value:.1f}", ha="center", fontsize=7)
        shown.append(label)
    ax.set_xticks(range(len(shown)), shown)
    ax.set(ylabel="accuracy (bars: %)", ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
    ax.grid(False, axis="x")


def tuning_curve(ax, points, chosen) -> None:
    """Worst-group accuracy on held-out tuning data for every C, the chosen one marked."""
    c, accuracy = np.transpose(points)
    curve(ax, c, accuracy, STYLES[2] | {"linestyle": "-"}, "tuning")
    if chosen is not None:
        ax.axvline(chosen, color=RED, linestyle="--", linewidth=1)
    if c.min() > 0:
        ax.set_xscale("log")
    ax.set_title("tuning (dashed: chosen C)")
    ax.set(xlabel="inverse regularisation C", ylabel="worst-group accuracy")


def dfr(run: Run) -> Figure | None:
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
        ax.set_title(SPLIT_TITLES[split])
    if points:
        tuning_curve(figure.add_subplot(grid[0, 1]), points, result.get("c"))
    looks = {"before": {"alpha": 0.45, "hatch": "////", "edgecolor": "white"}, "after": {}}
    handles = [Patch(facecolor=GREY, label=label, **look) for label, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    settings = [f"{key} {result[key]}" for key in ("split_strategy", "reg", "c") if key in result]
    subject = f"DFR of {result.get('target_layer', 'the last layer')} ({', '.join(settings)})"
    figure.suptitle(title(run, subject))
    return figure


def samples(run: Run) -> Figure | None:
    """Training pictures, one row a group."""
    path = run.folder / "samples.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pictures, members = arrays["pictures"], arrays["group"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise PlotError(f"{path}: not readable sample pictures: {error}") from error
    present = [group for group in run.labels if (members == group).any()]
    if not present:
        return None
    width = min(PICTURES_PER_GROUP, max(int((members == group).sum()) for group in present))
    figure = Figure(figsize=(1.5 + 0.75 * width, 0.5 + 0.8 * len(present)), layout="constrained")
    axes = figure.subplots(len(present), width, squeeze=False)
    for row, group in zip(axes, present, strict=True):
        for ax in row:
            ax.set_axis_off()
        for ax, picture in zip(row, pictures[members == group], strict=False):
            picture = np.clip(np.nan_to_num(picture), 0, 1)
            shown = picture[..., 0] if picture.shape[-1] == 1 else picture
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        # Hidden axes have no label: text beside the first picture stands in for it.
        label = run.labels[group].replace(", ", ",\n")
        place = {"ha": "right", "va": "center", "transform": row[0].transAxes}
        row[0].text(-0.12, 0.5, label, **place)
    figure.suptitle(title(run, "Samples"))
    return figure


FIGURES = {
    "training_history": training_history,
    "group_curves": group_curves,
    "gaps": gaps,
    "gradient_basis": gradient_basis,
    "gap_dynamics_factors": gap_dynamics_factors,
    "static_dynamic_decomposition": static_dynamic_decomposition,
    "jacobian_norm": jacobian_norm,
    "model_output_expectation": model_output_expectation,
    "misclassification": misclassification,
    "dfr": dfr,
    "samples": samples,
}


def save(figure: Figure, path: Path, file_format: str) -> None:
    """Write a picture without dates, under a temporary name until it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"Software": None} if file_format == "png" else {"Date": None}
    try:
        figure.savefig(temporary, format=file_format, dpi=150, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def draw(folder, file_format: str | None = None) -> list[Path]:
    """Draw every figure that the run has a table for into `<folder>/plots/`; return the paths.

    file_format: png or svg, by default the run's `plot_format`. Raises PlotError if the folder is
    not a run folder or a table is damaged.
    """
    run = read_run(folder)
    file_format = file_format or run.config.get("plot_format", "png")
    if file_format not in FORMATS:
        raise PlotError(f"plot_format: given {file_format!r}; allowed: {', '.join(FORMATS)}")
    plots = run.folder / "plots"
    plots.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(RC):
        for name, make in FIGURES.items():
            figure = make(run)
            if figure is not None:
                paths.append(plots / f"{name}.{file_format}")
                save(figure, paths[-1], file_format)
    return paths


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise PlotError(f"{message} (see --help)")


def main(argv=None) -> int:
    """Redraw the figures of a run; exit code 2 with one line if that is not possible."""
    parser = Parser(prog="plotting.py", description="Redraw the figures of a run from its tables.")
    parser.add_argument("folder", help="results/<run>")
    parser.add_argument("--format", choices=FORMATS, help="default: the run's plot_format")
    try:
        arguments = parser.parse_args(argv)
        paths = draw(arguments.folder, arguments.format)
    except (PlotError, OSError) as error:
        print(f"plotting.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
