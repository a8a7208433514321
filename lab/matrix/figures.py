"""The tables of `spurious_matrix.py` in, figures out.

T and the accuracies of each task as heat maps, the distribution of δ, T and the cosine similarities
in the order of their clusters.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lab.figures.drawing import save
from lab.figures.style import BLACK, GREY, RC

GROUP_NAMES = ("neither", "attribute only", "task only", "both")
DELTA = "δ in percentage points"
INCHES = 0.13  # a row or column of a heat map, so that forty names can be read
LEAST = 1.6  # inches of a side


def draw(folder: str | Path, file_format: str) -> list[Path]:
    """Draw every figure into `<folder>/plots/`, those of tasks into its `tasks/`; the paths."""
    folder = Path(folder)
    plots = folder / "plots"
    (plots / "tasks").mkdir(parents=True, exist_ok=True)
    T = pd.read_csv(folder / "spurious_matrix.csv", index_col="attribute")
    accuracies = pd.read_csv(folder / "group_accuracies.csv")
    found = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
    paths = []
    with matplotlib.rc_context(RC | {"axes.grid": False}):
        for name, figure in _figures(folder, T, accuracies, found):
            paths.append(plots / f"{name}.{file_format}")
            save(figure, paths[-1], file_format)
    return paths


def _figures(
    folder: Path, T: pd.DataFrame, accuracies: pd.DataFrame, found: dict
) -> Iterator[tuple[str, Figure]]:
    """Yields (name, figure)."""
    yield "spurious_matrix", heat_map(T, "task", "attribute", DELTA, lowest=0)
    yield "delta_histogram", histogram(T.to_numpy(), found["eps"])
    for task, rows in accuracies.groupby("task", sort=False):
        table = rows.pivot(index="attribute", columns="group", values="shrunk")
        table = table.loc[T.index].set_axis(GROUP_NAMES, axis=1)
        yield f"tasks/{task}", heat_map(table, "group", "attribute", f"accuracy for {task}", 0, 1)
    cosines = pd.read_csv(folder / "cosine_rows.csv", index_col="attribute")
    for kind, table, text in (
        ("standardised", T, DELTA),
        ("cosine", cosines, "cosine similarity"),
    ):
        clusters = found["coclusters"][kind]
        if clusters:
            sides = [sorted_by(clusters, side) for side in ("attributes", "tasks")]
            signed = (-1, 1) if kind == "cosine" else (0, None)
            figure = heat_map(table.loc[sides[0][0], sides[1][0]], "task", "attribute", text,
                              *signed)  # fmt: skip
            separate(figure, sides[1][1], sides[0][1])
            yield f"coclusters_{kind}", figure
    clusters = found["directions"]["clusters"]
    if clusters:
        order, ends = sorted_by([{"attributes": names} for names in clusters], "attributes")
        table = pd.read_csv(folder / "cosine_directions.csv", index_col="attribute")
        figure = heat_map(table.loc[order, order], "attribute", "attribute", "cosine similarity of "
                          f"{found['directions']['d']} directions", -1, 1)  # fmt: skip
        separate(figure, ends, ends)
        yield "cosine_directions", figure


def sorted_by(clusters: list[dict], side: str) -> tuple[list[str], list[int]]:
    """The names of one side cluster by cluster, and where each cluster but the last ends."""
    names = [name for cluster in clusters for name in cluster[side]]
    return names, np.cumsum([len(cluster[side]) for cluster in clusters])[:-1].tolist()


def heat_map(table: pd.DataFrame, x: str, y: str, text: str, lowest=None, highest=None) -> Figure:
    """A table as colours, with its names; NaN is grey."""
    height, width = (max(LEAST, INCHES * count) for count in table.shape)
    figure = Figure(figsize=(width + 2.6, height + 1.8), layout="constrained")
    ax = figure.subplots()
    colours = matplotlib.colormaps["RdBu_r" if lowest == -1 else "viridis"].with_extremes(bad=GREY)
    image = ax.imshow(
        table, cmap=colours, vmin=lowest, vmax=highest, aspect="auto", interpolation="nearest"
    )
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=6)
    ax.set_yticks(range(table.shape[0]), table.index, fontsize=6)
    ax.set(xlabel=x, ylabel=y)
    figure.colorbar(image, ax=ax, label=text)
    return figure


def separate(figure: Figure, columns: list[int], rows: list[int]) -> None:
    """Lines between the clusters of a heat map."""
    ax = figure.axes[0]
    for place in columns:
        ax.axvline(place - 0.5, color=BLACK, linewidth=0.8)
    for place in rows:
        ax.axhline(place - 0.5, color=BLACK, linewidth=0.8)


def histogram(T: np.ndarray, eps: float) -> Figure:
    """How δ is distributed over the pairs, with the threshold."""
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    ax = figure.subplots()
    values = T[np.isfinite(T)]
    ax.hist(values, bins=np.linspace(0, max(5.0, *values, 0.0), 41).tolist())
    ax.axvline(eps, color=BLACK, linestyle="--", label=f"{eps:g}, above it a pair is listed")
    ax.set(xlabel=DELTA, ylabel="pairs (log)", yscale="log")
    ax.legend()
    return figure
