"""The look of the figures: colours, line styles, axes, legends.

Every group has one colour, line style and marker in all figures; groups avoid red and green,
because groups are often named after them.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

SPLIT_TITLES = {
    "train": "train",
    "val": "validation",
    "target": "target set",
    "test": "test",
    "opposite": "test, opposite shortcuts",
    "clean": "test, no shortcuts",
    "all_main": "test, main shortcut on all",
    "shortcut_only": "test, main shortcut without digits",
    "test_under_train": "test gap, training gradient",
}
# Beyond any float32; squares and sums of smaller values stay finite in float64.
LARGEST = 1e100
# Okabe-Ito; the first four never mean anything but a group.
GROUP_COLOURS = (
    *("#0072B2", "#E69F00", "#56B4E9", "#CC79A7"),
    *("#009E73", "#D55E00", "#F0E442", "#000000"),
)
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
BAR_LOOKS: dict[str, dict[str, Any]] = {
    "before": {"alpha": 0.45, "hatch": "////", "edgecolor": "white"},
    "after": {},
}
HATCHES = ("", "////", "....", "xxxx")
RED, GREEN, BLACK, GREY = "#D55E00", "#009E73", "#000000", "#7F7F7F"
STYLES: list[dict[str, Any]] = [
    {"color": RED, "linestyle": "-", "marker": "o"},
    {"color": GREEN, "linestyle": "--", "marker": "s"},
    {"color": BLACK, "linestyle": "-.", "marker": "^"},
    {"color": GREY, "linestyle": ":", "marker": "D"},
]
# Six styles for the pairs among four things, in the order of `combinations`: a pair and its
# complement share the colour, the complement is dashed with open markers.
PAIR_STYLES: list[dict[str, Any]] = [
    *({**style, "linestyle": "-"} for style in STYLES[:3]),
    *({**style, "linestyle": "--", "markerfacecolor": "white"} for style in STYLES[2::-1]),
]
RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "plotting",
}


def group_style(group: int) -> dict[str, Any]:
    """Colour, line style and marker of a group, the same in every figure."""
    return {
        "color": GROUP_COLOURS[group % len(GROUP_COLOURS)],
        "linestyle": LINE_STYLES[(group + group // len(GROUP_COLOURS)) % len(LINE_STYLES)],
        "marker": MARKERS[group % len(MARKERS)],
    }


def finite(values) -> np.ndarray:
    """The values as float64, those of a diverged run as NaN."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def new_figure(rows: int, splits: list[str]):
    """A figure with these rows of panels and one titled column a split."""
    figure = Figure(figsize=(1 + 2.7 * len(splits), 0.9 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, len(splits), squeeze=False, sharex=True, sharey="row")
    for ax, split in zip(axes[0], splits, strict=True):
        ax.set_title(SPLIT_TITLES[split])
    return figure, axes


def curve(ax, x, y, style: dict, label: str) -> None:
    """Plot one curve with about ten markers, one without a line with about forty.

    Points without neighbours always have a marker. A curve without a finite value is left out,
    from the legend too.
    """
    x, y = np.asarray(x), finite(y)
    shown = np.isfinite(y)
    if not shown.any():
        return
    isolated = shown & ~np.r_[False, shown[:-1]] & ~np.r_[shown[1:], False]
    step = max(1, round(len(x) / (40 if style["linestyle"] == "none" else 10)))
    marked = isolated | (np.arange(len(x)) % step == 0)
    ax.plot(x, y, label=label, markevery=np.flatnonzero(marked).tolist(), **style)


def rescale(axes, text: str, signed: bool) -> None:
    """Label the y axis of a row of panels, logarithmic if the curves span two decades or more.

    Signed values get a symlog axis that is linear below the lower quartile of the magnitudes;
    neither rounding errors (a millionth of the median) nor a diverged last epoch move it.
    """
    sizes = np.concatenate([[], *(line.get_ydata() for ax in axes for line in ax.lines)])
    sizes = np.abs(sizes[np.isfinite(sizes) & (sizes != 0)])
    axes[0].set_ylabel(text)
    if not sizes.size:
        return
    sizes = sizes[sizes > 1e-6 * np.median(sizes)] if signed else sizes
    low = np.log10(np.percentile(sizes, 25, method="lower") if signed else sizes.min())
    if np.log10(sizes.max()) - low < 2:
        return
    axes[0].set_ylabel(f"{text} (symlog)" if signed else f"{text} (log)")
    for ax in axes:
        if signed:
            ax.set_yscale("symlog", linthresh=10 ** np.floor(low))
            ax.yaxis.set_major_locator(SymmetricalLogLocator(ax.yaxis.get_transform()))
            ax.yaxis.get_major_locator().set_params(numticks=7)
        else:
            ax.set_yscale("log")


def zero_line(axes) -> None:
    """Mark zero in panels whose sign matters."""
    for ax in axes:
        if ax.has_data():
            ax.axhline(0, color=BLACK, linewidth=0.6, zorder=1)


def share_axis(axes, text: str) -> None:
    """Label a row of panels that show accuracies or shares."""
    axes[0].set(ylabel=text, ylim=(-0.03, 1.03))


def cosine_axis(axes) -> None:
    """Label a row of panels that show cosines."""
    axes[0].set(ylabel="cosine", ylim=(-1.08, 1.08))
    zero_line(axes)


def unique_handles(axes, order=()) -> dict[str, Any]:
    """Legend label → handle over several panels, labels in `order` first."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return {label: found[label] for label in dict.fromkeys([*order, *found]) if label in found}


def legend_below(figure: Figure, order=()) -> None:
    """One legend for all panels, below them, in rows as even as the width allows."""
    found = unique_handles(figure.axes, order)
    if found:
        lengths = [max(map(len, label.split("\n"))) for label in found]
        widths = 0.55 + 0.065 * np.array(lengths)
        fits = max(1, int(figure.get_figwidth() / widths.max()))
        rows = 1 if widths.sum() < figure.get_figwidth() else -(-len(found) // fits)
        columns = -(-len(found) // rows)
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def legend_beside(axes, order=()) -> None:
    """One legend for a row of panels, to the right of it."""
    found = unique_handles(axes, order)
    if found:
        place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "borderaxespad": 0}
        axes[-1].legend(list(found.values()), list(found), **place)
