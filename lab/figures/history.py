"""Figures of `training_history.csv`: losses and accuracies over the epochs."""

from itertools import cycle, product

import numpy as np
from matplotlib.figure import Figure

from lab.figures.panels import finish, history_figure, name_empty_groups, pair_label, title
from lab.figures.style import (
    HATCHES,
    PAIR_STYLES,
    SPLIT_TITLES,
    STYLES,
    curve,
    group_style,
    legend_below,
    new_figure,
    share_axis,
)
from lab.figures.tables import column, history_splits
from lab.folders.reading import RunTables

EVALUATION_SETS = ("opposite", "clean", "all_main", "shortcut_only")  # besides the usual splits


def training_history(run: RunTables) -> Figure:
    """Average, adjusted and worst-group loss and accuracy of every split."""
    curves = [
        ("average", STYLES[2], "avg"),
        ("adjusted (training shares)", STYLES[1], "adjusted"),
        ("worst group", STYLES[0], "worst"),
    ]
    return history_figure(run, "Training history", curves)


def group_curves(run: RunTables) -> Figure:
    """Loss and accuracy of every group; of many groups, of the majority and the minority.

    A minority sample is one whose attribute is not the shortcut of its label.
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


def group_accuracies(run: RunTables) -> Figure | None:
    """Of many groups: their test accuracies at the last epoch, class × attribute."""
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
    # Wide enough for the title.
    size = (max(6.8, 2.6 + 0.45 * len(columns)), 1.5 + 0.38 * len(rows) + 0.9 * slanted)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.grid(False)
    ax.set_facecolor("lightgrey")  # shows through where there is no value
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


def evaluation_sets(run: RunTables) -> Figure | None:
    """Worst-group and average accuracy on each further evaluation set, if the run has any."""
    further = [name for name in EVALUATION_SETS if f"{name}_avg_acc" in run.history]
    if not further:
        return None
    history = run.history
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False, sharex=True, sharey=True)
    for ax, kind, text in zip(axes[0], ("worst", "avg"), ("worst group", "average")):
        for style, name in zip(PAIR_STYLES, ["test", *further]):
            label = "test, as trained" if name == "test" else SPLIT_TITLES[name]
            curve(ax, history.epoch, column(history, f"{name}_{kind}_acc"), style, label)
        ax.set_title(text)
    share_axis(axes[0], "accuracy")
    legend_below(figure)
    return finish(run, figure, axes, "Evaluation sets", history.epoch)


def gap_pairs(run: RunTables) -> list[tuple[str, str]]:
    """Codes of the configured pairs of groups, else of the pairs that were analysed."""
    section = run.config.get("gap_dynamics_factors")
    configured = section.get("group_pairs") if isinstance(section, dict) else None
    if configured:
        codes = ([f"G({y:+d},{a:+d})" for y, a in pair] for pair in configured)
        return [(first, second) for first, second in codes]
    analysed = (pair.partition("_vs_") for pair in dict.fromkeys(run.analysis.pair) if pair)
    return [(first, second) for first, _, second in analysed]


def gaps(run: RunTables) -> Figure | None:
    """Loss and accuracy of the first group minus those of the second, for every pair."""
    parts = {code: f"group_{g}" for g, code in run.codes.items()}
    pairs = [pair for pair in gap_pairs(run) if set(pair) <= set(parts)]
    if not pairs:
        return None
    curves = []
    for (first, second), number in zip(pairs, cycle((0, 4, 2, 3, 1, 5)), strict=False):
        label = pair_label(run, first, second)
        curves.append((label, PAIR_STYLES[number], (parts[first], parts[second])))
    return history_figure(run, "Gaps between groups", curves, gap=True)


def misclassification(run: RunTables) -> Figure | None:
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
