"""Saved tables of a run in, figures out: `python plotting.py results/<run> [--format png|svg]`.

Reads only the tables in the run's folder and never a model. With `--gradcam` the tables of
`gradcam.py`, which needs the run's network and data, are made first.
"""

import argparse
import json
import math
import re
import sys
import textwrap
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, cycle, product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from lab.figures.style import (
    BAR_LOOKS,
    GREY,
    HATCHES,
    PAIR_STYLES,
    RC,
    RED,
    SPLIT_TITLES,
    STYLES,
    cosine_axis,
    curve,
    finite,
    group_style,
    legend_below,
    legend_beside,
    new_figure,
    rescale,
    share_axis,
    zero_line,
)
from lab.splits import groups
from lab.system import files, zip_files
from lab.system.errors import UserError, printable

FORMATS = ("png", "svg")
TABLES = ("training_history.csv", "analysis.csv", "dfr_results.json", "samples.npz")
TEXTS = ("split", "name", "analysis", "pair", "quantity", "task")
PICTURES_PER_GROUP = 8
GROUPS_PER_PAGE = 8
SAMPLE_ROWS = 24
MORE_SETS = ("opposite", "clean", "all_main", "shortcut_only")  # than train, val, target and test
MAX_SAMPLES = 2**26  # bytes; 32 pictures of 112 × 112 are 2**22


class PlotError(UserError):
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
    task: str = ""  # of which these are the tables, where there are several

    @property
    def many(self) -> bool:
        """Whether there are more groups than curves that one can tell apart."""
        return len(self.labels) > len(groups.GROUPS)

    @property
    def method(self) -> str:
        """Name of the training method; no debiasing is ERM."""
        method = self.config.get("debias_method") or "None"
        return "ERM" if method == "None" else str(method)

    def label(self, code: str) -> str:
        """Readable name of a group given as in the tables, such as `G(-1,+1)`."""
        return {self.codes[g]: self.labels[g] for g in self.codes}.get(code, code)


@contextmanager
def readable(path: Path):
    """Turn what a damaged file raises while it is read into an error for people."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
        TypeError,
    ) as error:  # fmt: skip
        raise PlotError(f"{path}: not readable: {type(error).__name__}: {error}") from error
    except (ValueError, yaml.YAMLError, zipfile.BadZipFile, zlib.error) as error:
        raise PlotError(f"{path}: not readable: {error}") from error


def present(path: Path) -> bool:
    """Whether a file is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV table that must have these columns; without rows if the file is missing or empty.

    Columns but those of `TEXTS` must hold numbers.
    """
    if not present(path):
        return pd.DataFrame(columns=list(columns))
    with readable(path):
        table = pd.read_csv(path)
        missing = [name for name in columns if name not in table]
        if missing:
            raise PlotError(f"{path}: no column {', '.join(missing)}")
        numbers = [name for name in table.columns if name not in TEXTS] if len(table) else []
        for name in numbers:
            if not pd.api.types.is_numeric_dtype(table[name]):
                raise PlotError(f"{path}: the column {name} holds something else than numbers")
        return table


def read_config(path: Path) -> dict:
    """The run's configuration, {} if it was not saved."""
    if not present(path):
        return {}
    with readable(path):
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def read_run(folder) -> Run:
    """Read the tables of a run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PlotError(f"{folder}: no such run folder")
    if not any((folder / table).is_file() for table in TABLES):
        raise PlotError(f"{folder}: not a run folder, none of {', '.join(TABLES)} is there")
    history = read_table(folder / "training_history.csv", "epoch")
    counts = read_table(folder / "group_counts.csv", "split", "group", "y", "a", "name", "count")
    columns = ("epoch", "split", "analysis", "pair", "quantity", "value")
    analysis = read_table(folder / "analysis.csv", *columns)
    analysis["pair"] = analysis["pair"].astype(object).fillna("")
    config = read_config(folder / "config_used.yaml")
    return Run(folder, config, history, counts, analysis, *group_labels(counts))


def group_labels(counts: pd.DataFrame) -> tuple[dict[int, str], dict[int, str]]:
    """Names and codes of the groups, from the table of their counts."""
    labels = codes = {g: groups.name(g) for g in range(len(groups.GROUPS))}
    if not counts.empty:
        cells = counts.drop_duplicates("group").set_index("group").sort_index()
        labels = cells["name"].astype(str).to_dict()
        signed = "+" if cells[["y", "a"]].isin([-1, 1]).all(axis=None) else ""
        codes = {
            g: f"G({y:{signed}.0f},{a:{signed}.0f})" for g, y, a in cells[["y", "a"]].itertuples()
        }
    return labels, codes


def task_names(run: Run) -> list[str]:
    """The tasks of the run's network, if there are several."""
    names = run.counts["task"].astype(str).unique() if "task" in run.counts else []
    return list(names) if len(names) > 1 else []


def of_task(run: Run, task: str) -> Run:
    """The run as if the network had this task only."""
    start = re.compile(rf"^([a-z_]+?)_{re.escape(task)}_")
    own = [name for name in run.history if start.match(name)]
    history = run.history[["epoch", *own]].rename(columns=lambda name: start.sub(r"\1_", name))
    counts = run.counts[run.counts["task"].astype(str) == task]
    labels, codes = group_labels(counts)
    return replace(run, history=history, counts=counts, labels=labels, codes=codes, task=task)


def pair_label(run: Run, first: str, second: str, sign: str = "−") -> str:
    """Two groups (codes) as text, what they share said once: `digit < 5: red − green`."""
    names = [run.label(code).split(", ") for code in (first, second)]
    if len(names[0]) == len(names[1]) == 2:
        for shared, differing in ((0, 1), (1, 0)):
            if names[0][shared] == names[1][shared]:
                return f"{names[0][shared]}: {names[0][differing]} {sign} {names[1][differing]}"
    return f"{run.label(first)} {sign}\n{run.label(second)}"


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """Finite values of a column, all NaN if the table lacks it."""
    return finite(table[name]) if name in table else np.full(len(table), np.nan)


def history_splits(run: Run) -> list[str]:
    """The splits of the training history."""
    splits = ("train", "val", "target", "test")
    return [split for split in splits if f"{split}_avg_loss" in run.history]


def analysis_values(run: Run, analysis: str, split: str, pair: str = "") -> pd.DataFrame:
    """One row an epoch (the index), one column a quantity."""
    rows = run.analysis
    rows = rows[(rows.analysis == analysis) & (rows.split == split) & (rows.pair == pair)]
    rows = rows.drop_duplicates(["epoch", "quantity"], keep="last")
    return rows.pivot(index="epoch", columns="quantity", values="value").sort_index()


def analysis_splits(run: Run, analysis: str) -> list[str]:
    """The splits that an analysis was made for."""
    found = set(run.analysis.split[run.analysis.analysis == analysis])
    return [split for split in SPLIT_TITLES if split in found]


def title(run: Run, subject: str) -> str:
    """Subject, run and method, and where the training diverged."""
    subject = f"{subject}, {run.task}" if run.task else subject
    text = f"{subject}: {run.config.get('experiment_name', run.folder.resolve().name)}"
    text += f", {run.method}" if run.config else ""
    if "train_avg_loss" in run.history:
        lost = run.history.epoch[np.isnan(finite(run.history.train_avg_loss))]
        text += f" (diverged at epoch {lost.min()})" if len(lost) else ""
    return text


def finish(run: Run, figure: Figure, axes, subject: str, epochs) -> Figure:
    """Title, whole epochs on the shared x axis, and a word in panels without a curve."""
    first, last = min(epochs), max(epochs)
    margin = 0.5 if first == last else 0.04 * (last - first)
    axes[0, 0].set_xlim(first - margin, last + margin)
    ticks = MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    axes[0, 0].xaxis.set_major_locator(ticks)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    for ax in axes.flat:
        if not ax.has_data():
            ax.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=ax.transAxes)
    figure.suptitle(title(run, subject))
    return figure


def name_empty_groups(run: Run, axes, splits: list[str]) -> None:
    """Say below the title of a split which groups have no samples there."""
    for ax, split in zip(axes[0], splits, strict=True):
        empty = run.counts.name[(run.counts.split == split) & (run.counts["count"] == 0)]
        if run.many and len(empty):
            empty = [f"{len(empty)} of {len(run.labels)} groups"]
        if len(empty):
            # Lines break between names only.
            names = "; ".join(name.replace(" ", "\xa0") for name in empty)
            note = textwrap.fill(f"no samples: {names}", 36).replace("\xa0", " ")
            ax.set_title(f"{SPLIT_TITLES[split]}\n{note}", fontsize=8)


def history_figure(run: Run, subject: str, curves, gap: str = "") -> Figure:
    """Losses above accuracies, one column a split.

    curves: (label, style, what) where what is a middle part of column names, such as `avg` or
    `group_0`; for gaps a pair of them, to be subtracted.
    """
    splits, history = history_splits(run), run.history
    figure, axes = new_figure(2, splits)
    for row, metric in zip(axes, ("loss", "acc"), strict=True):
        for ax, split in zip(row, splits, strict=True):
            for label, style, what in curves:
                parts = what if gap else (what,)
                values = [column(history, f"{split}_{part}_{metric}") for part in parts]
                curve(ax, history.epoch, values[0] - values[1] if gap else values[0], style, label)
    rescale(axes[0], f"loss{gap}", signed=bool(gap))
    if gap:
        axes[1, 0].set_ylabel(f"accuracy{gap}")
        zero_line(axes.flat)
    else:
        share_axis(axes[1], "accuracy")
    name_empty_groups(run, axes, splits)
    legend_below(figure, [label for label, _, _ in curves])
    return finish(run, figure, axes, subject, history.epoch)


def training_history(run: Run) -> Figure:
    """Average, adjusted and worst-group loss and accuracy of every split."""
    curves = [
        ("average", STYLES[2], "avg"),
        ("adjusted (training shares)", STYLES[1], "adjusted"),
        ("worst group", STYLES[0], "worst"),
    ]
    return history_figure(run, "Training history", curves)


def group_curves(run: Run) -> Figure:
    """Loss and accuracy of every group; of many, accuracies over those with and without shortcut.

    The shortcut: a minority sample's attribute is not its label.
    """
    if run.many:
        curves = [
            ("average", STYLES[2], "avg"),
            ("majority", STYLES[1], "majority"),
            ("minority", STYLES[0], "minority"),
            ("worst group", STYLES[3], "worst"),
        ]
        return history_figure(run, "Majority and minority", curves)
    curves = [(label, group_style(g), f"group_{g}") for g, label in run.labels.items()]
    return history_figure(run, "Groups", curves)


def group_accuracies(run: Run) -> Figure | None:
    """Where there are many groups: their test accuracies at the last epoch, class × attribute."""
    if not run.many or run.counts.empty or "test" not in history_splits(run):
        return None
    cells = run.counts.drop_duplicates("group")
    last = run.history.iloc[-1:]
    values = [column(last, f"test_group_{g}_acc")[0] for g in cells.group]
    table = cells.assign(value=values).pivot(index="y", columns="a", values="value")
    names = cells.name.astype(str).str.rpartition(", ")
    rows = names[0].groupby(cells.y).first()
    columns = names[2].groupby(cells.a).first()
    slanted = columns.str.len().max() > 4
    # The title has room.
    size = (max(6.8, 2.6 + 0.45 * len(columns)), 1.5 + 0.38 * len(rows) + 0.9 * slanted)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.grid(False)
    ax.set_facecolor("lightgrey")  # shows where there is no value
    picture = ax.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, y), (j, a) in product(enumerate(table.index), enumerate(table.columns)):
        value = table.loc[y, a]
        if np.isfinite(value):
            colour = "white" if value < 0.6 else "black"
            ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    ax.set_xticks(range(len(columns)), columns)
    if slanted:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel="attribute", ylabel="class")
    bar = figure.colorbar(picture, ax=ax)
    bar.set_label("accuracy")
    missing = " (grey: no samples)" if table.isna().any(axis=None) else ""
    epoch = f"Test accuracy in % of every group at epoch {last.epoch.iloc[0]}{missing}"
    figure.suptitle(title(run, epoch))
    return figure


def evaluation_sets(run: Run) -> Figure | None:
    """Where there are further evaluation sets: worst-group and average accuracy on each."""
    more = [name for name in MORE_SETS if f"{name}_avg_acc" in run.history]
    if not more:
        return None
    history = run.history
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False, sharex=True, sharey=True)
    for ax, kind, text in zip(axes[0], ("worst", "avg"), ("worst group", "average")):
        for style, name in zip(PAIR_STYLES, ["test", *more]):
            label = "test, as trained" if name == "test" else SPLIT_TITLES[name]
            curve(ax, history.epoch, column(history, f"{name}_{kind}_acc"), style, label)
        ax.set_title(text)
    share_axis(axes[0], "accuracy")
    legend_below(figure)
    return finish(run, figure, axes, "Evaluation sets", history.epoch)


def gap_pairs(run: Run) -> list[tuple[str, str]]:
    """Codes of the configured pairs of groups, else of the pairs that were analysed."""
    section = run.config.get("gap_dynamics_factors")
    configured = section.get("group_pairs") if isinstance(section, dict) else None
    if configured:
        return [tuple(f"G({y:+d},{a:+d})" for y, a in pair) for pair in configured]
    return [tuple(pair.split("_vs_")) for pair in dict.fromkeys(run.analysis.pair) if pair]


def gaps(run: Run) -> Figure | None:
    """Loss and accuracy of the first group minus those of the second, for every pair."""
    parts = {code: f"group_{g}" for g, code in run.codes.items()}
    pairs = [pair for pair in gap_pairs(run) if set(pair) <= set(parts)]
    if not pairs:
        return None
    curves = []
    for (first, second), number in zip(pairs, cycle((0, 4, 2, 3, 1, 5)), strict=False):
        label = pair_label(run, first, second)
        curves.append((label, PAIR_STYLES[number], (parts[first], parts[second])))
    return history_figure(run, "Gaps between groups", curves, gap=" gap")


def gradient_basis(run: Run) -> Figure:
    """Norms of the four basis gradients and the cosines between them."""
    splits = analysis_splits(run, "gradient_basis")
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
    name_empty_groups(run, axes, splits)
    for row in axes:
        legend_beside(row)
    return finish(run, figure, axes, "Gradient basis", table.index)


def term_panels(run: Run, analysis: str, terms: dict, subject: str) -> Figure:
    """What moves the loss gap of every pair on every split; terms: quantity → (label, style)."""
    splits = analysis_splits(run, analysis)
    rows = run.analysis[run.analysis.analysis == analysis]
    pairs = [pair for pair in dict.fromkeys(rows.pair) if pair]
    figure, axes = new_figure(len(pairs), splits)
    for row, pair in zip(axes, pairs, strict=True):
        for ax, split in zip(row, splits, strict=True):
            table = analysis_values(run, analysis, split, pair)
            total = column(table, "total")
            for quantity, (label, style) in terms.items():
                values = column(table, quantity)
                # Under ERM the two totals are the same curve: the second would only hide the first.
                same = np.allclose(values, total, rtol=1e-4, equal_nan=True)
                # What is measured on test is what the training gradient does: it has that panel.
                elsewhere = quantity == "measured" and split == "test"
                if not elsewhere and (quantity != "method_total" or not same):
                    curve(ax, table.index, values, style, label)
        names = pair_label(run, *pair.split("_vs_")) if "_vs_" in pair else pair
        rescale(row, f"{names}\nd(loss gap)/dt", signed=True)
        zero_line(row)
    name_empty_groups(run, axes, splits)
    legend_below(figure, [label for label, _ in terms.values()])
    return finish(run, figure, axes, subject, rows.epoch)


def gap_dynamics_factors(run: Run) -> Figure:
    """Time derivative of the loss gap, split by what causes it."""
    # Open, large and on top: where theory holds the dots lie on the curve and still show.
    dots = {"color": GREY, "linestyle": "none", "marker": "o", "markerfacecolor": "none"}
    dots |= {"markersize": 6, "zorder": 5}
    terms = {
        "total": ("total (gradient flow)", STYLES[2] | {"linestyle": "-"}),
        "method_total": (f"total under {run.method}", STYLES[2] | {"markerfacecolor": "white"}),
        "term1": ("term 1: without bias", STYLES[1]),
        "term2": ("term 2: marginal imbalance", STYLES[3]),
        "term3": ("term 3: spurious correlation", STYLES[0] | {"linestyle": "-."}),
        "measured": ("measured: Δgap / learning rate", dots),
    }
    return term_panels(run, "gap_dynamics_factors", terms, "Gap dynamics")


def static_dynamic_decomposition(run: Run) -> Figure:
    """Time derivative of the loss gap, split into static and dynamic parts of the gradients."""
    terms = {
        "total": ("total", STYLES[2] | {"linestyle": "-"}),
        "TermA": ("A: static", STYLES[1]),
        "TermB": ("B: mixed", STYLES[3]),
        "TermC": ("C: dynamic", STYLES[0] | {"linestyle": "-."}),
    }
    analysis = "static_dynamic_decomposition"
    return term_panels(run, analysis, terms, "Static and dynamic parts")


def jacobian_norm(run: Run) -> Figure:
    """Mean Jacobians of the groups: squared norms, cosines, attribute against label direction."""
    splits = analysis_splits(run, "jacobian_norm")
    figure, axes = new_figure(4, splits)
    differences = {
        "norm_Delta_S": r"attribute, $\|\Delta_S\|$",
        "norm_Delta_L": r"label, $\|\Delta_L\|$",
    }
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
        curve(ratio, table.index, column(table, "ratio_Delta_S_L"), STYLES[2], "ratio")
    rescale(axes[0], r"squared norm $\|m_g\|^2$", signed=False)
    cosine_axis(axes[1])
    rescale(axes[2], "norm", signed=False)
    rescale(axes[3], r"ratio $\|\Delta_S\|\,/\,\|\Delta_L\|$", signed=False)
    for row in axes[:3]:
        legend_beside(row, run.labels.values())
    return finish(run, figure, axes, "Mean Jacobians", table.index)


def model_output_expectation(run: Run) -> Figure:
    """Mean output per group in a band of one standard deviation."""
    splits = analysis_splits(run, "model_output_expectation")
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
    return finish(run, figure, axes, "Model output", table.index)


def scale(run: Run) -> Figure:
    """SCALE: how far the train gradient agrees with the target gradient, tensor × epoch."""
    table = analysis_values(run, "SCALE", "train").filter(like="cosine_")
    order = run.analysis.quantity[run.analysis.analysis == "SCALE"].unique()  # from input to output
    table = table[order].astype(float)
    figure = Figure(figsize=(7, 1.6 + 0.17 * table.shape[1]), layout="constrained")
    ax = figure.subplots()
    ax.grid(False)
    ax.set_facecolor("lightgrey")
    first, last = table.index.min(), table.index.max()
    picture = ax.imshow(
        table.T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest",
        extent=(first - 0.5, last + 0.5, table.shape[1] - 0.5, -0.5),
    )  # fmt: skip
    names = [name.removeprefix("cosine_").removeprefix("body.") for name in order]
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    figure.colorbar(picture, ax=ax).set_label("mean cosine")
    figure.suptitle(title(run, "Train against target gradient"))
    return figure


def misclassification(run: Run) -> Figure | None:
    """Error rate of every group and its share among all errors of the split; not of many groups."""
    if run.many:
        return None
    splits, epochs = history_splits(run), run.history.epoch.to_numpy()
    # Bars one epoch wide, without gaps where epochs are missing.
    edges = np.r_[epochs[0] - 0.5, (epochs[1:] + epochs[:-1]) / 2, epochs[-1] + 0.5]
    figure, axes = new_figure(1 if run.counts.empty else 2, splits)
    for column_axes, split in zip(axes.T, splits, strict=True):
        counts = run.counts[run.counts.split == split].set_index("group")["count"]
        rates = {g: 1 - column(run.history, f"{split}_group_{g}_acc") for g in run.labels}
        for g, rate in rates.items():
            curve(column_axes[0], epochs, rate, group_style(g), run.labels[g])
        errors = np.array([np.nan_to_num(rate) * counts.get(g, 0) for g, rate in rates.items()])
        tops = np.cumsum(errors, axis=0) / np.maximum(errors.sum(axis=0), 1e-12)
        if len(axes) == 2 and errors.any():
            for g, base, top in zip(rates, [np.zeros(len(epochs)), *tops], tops, strict=False):
                fill = {"facecolor": group_style(g)["color"], "hatch": HATCHES[g % len(HATCHES)]}
                fill |= {"fill": True, "edgecolor": "white", "linewidth": 0}
                column_axes[1].stairs(top, edges, baseline=base, **fill)
    name_empty_groups(run, axes, splits)
    share_axis(axes[0], "error rate")
    if len(axes) == 2:
        share_axis(axes[1], "share of all errors")
    legend_below(figure, run.labels.values())
    return finish(run, figure, axes, "Errors by group", epochs)


def read_dfr(path: Path) -> dict:
    """The results of retraining, accuracies as floats; {} if the file is missing or empty."""
    if not present(path):
        return {}
    with readable(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        for time in ("before", "after"):
            rows = result[time].items()
            result[time] = {split: pd.Series(row, dtype=float) for split, row in rows}
        score = result.get("tuned_for") or "worst_acc"
        # JSON has null for NaN.
        points = [(p["c"], p[score]) for p in result.get("tuning") or []]
        tuning = [(float(c), math.nan if value is None else float(value)) for c, value in points]
        return result | {"tuning": sorted(tuning)}


def before_and_after(ax, run: Run, before: pd.Series, after: pd.Series) -> None:
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
        # The options themselves, thinned to what has room.
        shown = sorted(c)[:: math.ceil(len(c) / 6)]
        ax.set_xticks(shown, [f"{value:g}" for value in shown], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title("tuning (dashed: chosen C)")
    ax.set(xlabel="inverse regularisation C", ylabel=score)


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


def read_pictures(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file: `pictures` (M, H, W, 1 or 3), `group`, `y`, `a` (M,), others (M, H, W).

    Raises `PlotError` for other shapes and what is not numbers.
    """
    with readable(path):
        unpacked = sum(member.file_size for member in zip_files.members(path))
        if unpacked > MAX_SAMPLES:
            raise PlotError(f"{path}: {unpacked} bytes unpacked; allowed: up to {MAX_SAMPLES}")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        pictures, _ = arrays["pictures"], arrays["group"]
        if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
            raise ValueError(f"pictures of shape {pictures.shape}")
        for name, values in arrays.items():
            expected = pictures.shape[: {"pictures": 4, "group": 1, "y": 1, "a": 1}.get(name, 3)]
            if values.shape != expected or values.dtype.kind not in "fiu":
                raise ValueError(
                    f"{len(pictures)} pictures, {name} of shape {values.shape}, {values.dtype}"
                )
    return arrays


def show_picture(ax, picture: np.ndarray) -> None:
    """A picture (H, W, 1 or 3) with values in [0, 1], in a thin frame without ticks."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=GREY, linewidth=0.5)  # white shortcuts, white page
    picture = np.clip(np.nan_to_num(picture.astype(float)), 0, 1)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def samples(run: Run) -> Figure | None:
    """Training pictures, one row a group; where these are too many, one row a class."""
    path = run.folder / "samples.npz"
    if not present(path):
        return None
    arrays = read_pictures(path)
    by_class = len(np.unique(arrays["group"])) > SAMPLE_ROWS
    with readable(path):
        pictures, members = arrays["pictures"], arrays["y" if by_class else "group"]
    labels = run.labels
    if by_class:
        names = run.counts.drop_duplicates("y").set_index("y").name
        labels = names.astype(str).str.rpartition(", ")[0].to_dict()
    shown = [g for g in labels if (members == g).any()]
    if not shown:
        return None
    width = min(PICTURES_PER_GROUP, max(int((members == g).sum()) for g in shown))
    ratio = pictures.shape[1] / pictures.shape[2]
    across, down = 0.75 / ratio**0.5, 0.05 + 0.75 * ratio**0.5  # inches of a picture
    size = (1.5 + across * width, 0.5 + down * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(shown), width, squeeze=False)
    for row, g in zip(axes, shown, strict=True):
        own = pictures[members == g]
        for ax, picture in zip(row, own, strict=False):
            show_picture(ax, picture)
        for ax in row[len(own) :]:
            ax.set_axis_off()
        row[0].set_ylabel(
            labels[g].replace(", ", ",\n"), rotation=0, ha="right", va="center", labelpad=8
        )
    figure.suptitle(title(run, "Samples"))
    return figure


def gradcam(run: Run) -> list[Figure]:
    """Where the network looks: for each group (rows) pictures, and their heat before and after DFR.

    Eight groups on a page.
    """
    path = run.folder / "gradcam.npz"
    if not present(path):
        return []
    arrays = read_pictures(path)
    pictures, group = arrays["pictures"], arrays["group"]
    heat = {name: arrays[name] for name in ("before_dfr", "after_dfr") if name in arrays}
    shown = [g for g in run.labels if (group == g).any()]
    pages = [shown[i : i + GROUPS_PER_PAGE] for i in range(0, len(shown), GROUPS_PER_PAGE)]
    return [_gradcam_page(run, pictures, heat, group, page) for page in pages]


def _gradcam_page(run: Run, pictures, heat: dict, group, page: list[int]) -> Figure:
    """The groups of one page as blocks, up to four side by side."""
    across, down = min(4, len(page)), -(-len(page) // 4)
    number = max(int((group == g).sum()) for g in page)
    columns = {"input": None, **{name.replace("_dfr", ""): maps for name, maps in heat.items()}}
    ratio = pictures.shape[1] / pictures.shape[2]
    width = max(4, across * (0.2 + 0.8 * len(columns)))  # for the title
    size = (width, 0.3 + down * (0.5 + 0.8 * ratio * number))
    figure = Figure(figsize=size, layout="constrained")
    blocks = figure.subfigures(down, across, squeeze=False, wspace=0.04).flat
    for block, g in zip(blocks, page, strict=False):
        block.suptitle(run.labels[g], fontsize=9)
        axes = block.subplots(number, len(columns), squeeze=False)
        for ax, name in zip(axes[0], columns, strict=True):
            ax.set_title(name, fontsize=8)
        members = np.flatnonzero(group == g)
        for row in axes[len(members) :]:
            for ax in row:
                ax.set_axis_off()
        for row, i in zip(axes, members, strict=False):
            for ax, maps in zip(row, columns.values(), strict=True):
                show_picture(ax, pictures[i])
                if maps is not None:
                    alpha = np.clip(np.nan_to_num(maps[i].astype(float)), 0, 1)
                    ax.imshow(alpha, cmap="autumn_r", vmin=0, vmax=1, alpha=0.85 * alpha)
    figure.suptitle(title(run, "Grad-CAM, test pictures"))
    return figure


# An analysis and its figure have the same name.
ANALYSIS_FIGURES = (
    gradient_basis,
    gap_dynamics_factors,
    static_dynamic_decomposition,
    jacobian_norm,
    model_output_expectation,
)
METHOD_FIGURES = {"SCALE": scale}  # by what they are called in the table
HISTORY_FIGURES = (
    training_history,
    group_curves,
    group_accuracies,
    evaluation_sets,
    gaps,
    misclassification,
)
TASK_FIGURES = (group_curves, group_accuracies, gaps, misclassification)
FIGURES = {
    make.__name__: make
    for make in (
        *HISTORY_FIGURES,
        *ANALYSIS_FIGURES,
        *METHOD_FIGURES.values(),
        dfr,
        samples,
        gradcam,
    )
}


def has_rows(run: Run, make) -> bool:
    """Whether the table of a figure has rows; other figures look for their own files."""
    if make in HISTORY_FIGURES:
        return len(run.history) > 0 and len(history_splits(run)) > 0
    for method, figure in METHOD_FIGURES.items():
        if make is figure:
            return len(analysis_splits(run, method)) > 0
    return make not in ANALYSIS_FIGURES or len(analysis_splits(run, make.__name__)) > 0


def save(figure: Figure, path: Path, file_format: str) -> None:
    """Write a picture without dates, under a temporary name until it is whole."""
    metadata = {"Software": None} if file_format == "png" else {"Date": None}
    files.save(path, partial(figure.savefig, format=file_format, dpi=150, metadata=metadata))


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
        for task, name in _wanted(run):
            part, make = of_task(run, task) if task else run, FIGURES[name]
            made = make(part) if has_rows(part, make) else None
            pages = made if isinstance(made, list) else [made] * (made is not None)
            for number, figure in enumerate(pages, 1):
                stem = f"{name}_{task}" if task else name
                page = f"{stem}_{number}" if number > 1 else stem
                paths.append(plots / f"{page}.{file_format}")
                save(figure, paths[-1], file_format)
    return paths


def _wanted(run: Run) -> list[tuple[str, str]]:
    """(task, figure): of several tasks each has the figures about groups, else task is ''."""
    tasks, by_task = task_names(run), [make.__name__ for make in TASK_FIGURES]
    if not tasks:
        return [("", name) for name in FIGURES]
    whole = [("", name) for name in FIGURES if name not in by_task]
    return whole + [(task, name) for task in tasks for name in by_task]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise PlotError(f"{message} (see --help)")


def main(argv=None) -> int:
    """Redraw the figures of a run; exit code 2 with one line if that is not possible."""
    parser = Parser(prog="plotting.py", description="Redraw the figures of a run from its tables.")
    parser.add_argument("folder", help="results/<run>")
    parser.add_argument("--format", choices=FORMATS, help="default: the run's plot_format")
    parser.add_argument(
        "--gradcam",
        action="store_true",
        help="first find out where the network looks, from the run's checkpoint and data",
    )
    try:
        arguments = parser.parse_args(argv)
        if arguments.gradcam:
            from lab.analyses.gradcam import explain  # with torch and the networks

            explain(Path(arguments.folder))
        paths = draw(arguments.folder, arguments.format)
    except (UserError, OSError) as error:
        print(f"plotting.py: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
