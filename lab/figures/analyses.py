"""Figures of `analysis.csv`, each with the name of its analysis."""

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.figures.panels import finish, name_empty_groups, pair_label, term_panels, title
from lab.figures.style import (
    GREY,
    PAIR_STYLES,
    STYLES,
    cosine_axis,
    curve,
    group_style,
    legend_below,
    legend_beside,
    new_figure,
    rescale,
    zero_line,
)
from lab.figures.tables import analysis_splits, analysis_values, column
from lab.folders.reading import RunTables


def gradient_basis(run: RunTables) -> Figure:
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


def gap_dynamics_factors(run: RunTables) -> Figure:
    """Time derivative of the loss gap, split by what causes it."""
    # Open, large and on top: the dots stay visible where they lie on the curve, as theory predicts.
    dots: dict[str, Any] = {"color": GREY, "linestyle": "none", "marker": "o", "markersize": 6}
    dots |= {"markerfacecolor": "none", "zorder": 5}
    terms = {
        "total": ("total (gradient flow)", STYLES[2] | {"linestyle": "-"}),
        "method_total": (f"total under {run.method}", STYLES[2] | {"markerfacecolor": "white"}),
        "term1": ("term 1: without bias", STYLES[1]),
        "term2": ("term 2: marginal imbalance", STYLES[3]),
        "term3": ("term 3: spurious correlation", STYLES[0] | {"linestyle": "-."}),
        "measured": ("measured: Δgap / learning rate", dots),
    }
    return term_panels(run, "gap_dynamics_factors", terms, "Gap dynamics")


def static_dynamic_decomposition(run: RunTables) -> Figure:
    """Time derivative of the loss gap, split into static and dynamic parts of the gradients."""
    terms = {
        "total": ("total", STYLES[2] | {"linestyle": "-"}),
        "TermA": ("A: static", STYLES[1]),
        "TermB": ("B: mixed", STYLES[3]),
        "TermC": ("C: dynamic", STYLES[0] | {"linestyle": "-."}),
    }
    analysis = "static_dynamic_decomposition"
    return term_panels(run, analysis, terms, "Static and dynamic parts")


def jacobian_norm(run: RunTables) -> Figure:
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


def model_output_expectation(run: RunTables) -> Figure:
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


def scale(run: RunTables) -> Figure:
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
