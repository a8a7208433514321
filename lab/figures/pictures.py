"""Figures of pictures: training samples, and where the network looks."""

import numpy as np
from matplotlib.figure import Figure

from lab.figures.panels import title
from lab.figures.style import GREY
from lab.figures.tables import read_pictures
from lab.folders.reading import RunTables, present, readable

PICTURES_PER_GROUP = 8
GROUPS_PER_PAGE = 8
SAMPLE_ROWS = 24


def show_picture(ax, picture: np.ndarray) -> None:
    """A picture (H, W, 1 or 3) with values in [0, 1], in a thin frame without ticks."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=GREY, linewidth=0.5)  # white shortcuts, white page
    picture = np.clip(np.nan_to_num(picture.astype(float)), 0, 1)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def samples(run: RunTables) -> Figure | None:
    """Training pictures, one row a group; of too many groups, one row a class."""
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


def gradcam(run: RunTables) -> list[Figure]:
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


def _gradcam_page(run: RunTables, pictures, heat: dict, group, page: list[int]) -> Figure:
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
