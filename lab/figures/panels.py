"""What several figures share: titles, the epoch axis, panels of a history, panels of terms."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.figures.style import (
    SPLIT_TITLES,
    curve,
    finite,
    legend_below,
    new_figure,
    rescale,
    share_axis,
    zero_line,
)
from lab.figures.tables import analysis_splits, analysis_values, column, history_splits
from lab.folders.reading import RunTables


def pair_label(run: RunTables, first: str, second: str, sign: str = "−") -> str:
    """Two groups (codes) as text, what they share written once: `digit < 5: red − green`."""
    names = [run.label(code).split(", ") for code in (first, second)]
    if len(names[0]) == len(names[1]) == 2:
        for shared, differing in ((0, 1), (1, 0)):
            if names[0][shared] == names[1][shared]:
                return f"{names[0][shared]}: {names[0][differing]} {sign} {names[1][differing]}"
    return f"{run.label(first)} {sign}\n{run.label(second)}"


def title(run: RunTables, subject: str) -> str:
    """Subject, run and method, and where the training diverged."""
    subject = f"{subject}, {run.task}" if run.task else subject
    text = f"{subject}: {run.config.get('experiment_name', run.folder.resolve().name)}"
    text += f", {run.method}" if run.config else ""
    if "train_avg_loss" in run.history:
        lost = run.history.epoch[np.isnan(finite(run.history.train_avg_loss))]
        text += f" (diverged at epoch {lost.min()})" if len(lost) else ""
    return text


def finish(run: RunTables, figure: Figure, axes, subject: str, epochs) -> Figure:
    """Adds the title, whole epochs on the shared x axis, and a note in panels without a curve."""
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


def name_empty_groups(run: RunTables, axes, splits: list[str]) -> None:
    """Names below the title of each split the groups that have no samples in it."""
    for ax, split in zip(axes[0], splits, strict=True):
        empty = run.counts.name[(run.counts.split == split) & (run.counts["count"] == 0)]
        if run.many and len(empty):
            empty = [f"{len(empty)} of {len(run.labels)} groups"]
        if len(empty):
            # Lines break between names only.
            names = "; ".join(name.replace(" ", "\xa0") for name in empty)
            note = textwrap.fill(f"no samples: {names}", 36).replace("\xa0", " ")
            ax.set_title(f"{SPLIT_TITLES[split]}\n{note}", fontsize=8)


def history_figure(run: RunTables, subject: str, curves: Sequence, gap: bool = False) -> Figure:
    """Losses above accuracies, one column a split.

    curves: (label, style, part) where part is the middle of column names, such as `avg` or
    `group_0`; gap: each part is a pair of them, to be subtracted.
    """
    splits, history = history_splits(run), run.history
    figure, axes = new_figure(2, splits)
    for row, metric in zip(axes, ("loss", "acc"), strict=True):
        for ax, split in zip(row, splits, strict=True):
            for label, style, part in curves:
                parts = part if gap else (part,)
                values = [column(history, f"{split}_{name}_{metric}") for name in parts]
                curve(ax, history.epoch, values[0] - values[1] if gap else values[0], style, label)
    rescale(axes[0], "loss gap" if gap else "loss", signed=gap)
    if gap:
        axes[1, 0].set_ylabel("accuracy gap")
        zero_line(axes.flat)
    else:
        share_axis(axes[1], "accuracy")
    name_empty_groups(run, axes, splits)
    legend_below(figure, [label for label, _, _ in curves])
    return finish(run, figure, axes, subject, history.epoch)


def term_panels(
    run: RunTables, analysis: str, terms: dict[str, tuple[str, dict[str, Any]]], subject: str
) -> Figure:
    """Terms of d(loss gap)/dt for every pair on every split; terms: quantity → (label, style)."""
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
                # The measured test gap follows the training gradient: it is shown in that panel.
                elsewhere = quantity == "measured" and split == "test"
                if not elsewhere and (quantity != "method_total" or not same):
                    curve(ax, table.index, values, style, label)
        names = pair_label(run, *pair.split("_vs_")) if "_vs_" in pair else pair
        rescale(row, f"{names}\nd(loss gap)/dt", signed=True)
        zero_line(row)
    name_empty_groups(run, axes, splits)
    legend_below(figure, [label for label, _ in terms.values()])
    return finish(run, figure, axes, subject, rows.epoch)
