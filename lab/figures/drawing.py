"""The list of figures, and drawing those that a run has tables for."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lab.config import records
from lab.config.registry import Figure as FigureRecord
from lab.figures.style import RC
from lab.figures.tables import analysis_splits, history_splits, of_task, task_names
from lab.folders.reading import RunTables, UnreadableRun, read_run
from lab.system import files

FORMATS = ("png", "svg")


FIGURES = records.BUILT_IN.of(FigureRecord)


def draw(
    folder: str | Path, file_format: str | None = None, further: Iterable[FigureRecord] = ()
) -> list[Path]:
    """Draw every figure that the run has a table for into `<folder>/plots/`; return the paths.

    file_format: png or svg, by default the run's `plot_format`; further: figures of plugins, beside
    the built-in ones. Raises `UnreadableRun` if the folder is no run's or a table is damaged.
    """
    run = read_run(folder)
    file_format = file_format or run.config.get("plot_format", "png")
    if file_format not in FORMATS:
        raise UnreadableRun(f"plot_format: given {file_format!r}; allowed: {', '.join(FORMATS)}")
    plots = run.folder / "plots"
    plots.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(RC):
        for part, drawing in parts(run, [*FIGURES.values(), *further]):
            made = drawing.load()(part) if has_rows(part, drawing.table) else None
            if made is None:
                continue
            pages = made if isinstance(made, list) else [made]
            for number, figure in enumerate(pages, 1):
                stem = f"{drawing.name}_{part.task}" if part.task else drawing.name
                page = f"{stem}_{number}" if number > 1 else stem
                paths.append(plots / f"{page}.{file_format}")
                save(figure, paths[-1], file_format)
    return paths


def without_figure(folder: str | Path, further: Iterable[FigureRecord] = ()) -> list[str]:
    """The analyses in the run's table that none of these figures draws."""
    drawn = {figure.table.removeprefix("analysis:") for figure in (*FIGURES.values(), *further)}
    return [str(name) for name in read_run(folder).analysis.analysis.unique() if name not in drawn]


def parts(run: RunTables, figures: list[FigureRecord]) -> Iterator[tuple[RunTables, FigureRecord]]:
    """What to draw: the figures of the whole run, then, where it has several tasks, of each."""
    tasks = [of_task(run, task) for task in task_names(run)]
    for drawing in figures:
        if not (tasks and drawing.by_task):
            yield run, drawing
    for task in tasks:
        for drawing in figures:
            if drawing.by_task:
                yield task, drawing


def has_rows(run: RunTables, table: str) -> bool:
    """Whether the table of a figure's record has rows; True of figures with files of their own."""
    if table == "history":
        return len(run.history) > 0 and len(history_splits(run)) > 0
    if table.startswith("analysis:"):
        return len(analysis_splits(run, table.removeprefix("analysis:"))) > 0
    return True


def save(figure: Figure, path: Path, file_format: str) -> None:
    """Write a picture without dates, under a temporary name until it is whole."""
    metadata = {"Software": None} if file_format == "png" else {"Date": None}
    files.save(path, partial(figure.savefig, format=file_format, dpi=150, metadata=metadata))
