"""The list of figures, and drawing those that a run has tables for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lab.figures import analyses, history, pictures, retraining
from lab.figures.style import RC
from lab.figures.tables import (
    PlotError,
    Run,
    analysis_splits,
    history_splits,
    of_task,
    read_run,
    task_names,
)
from lab.system import files

FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Drawing:
    """One figure: its name, which is that of its files, and how it is drawn.

    make: Run → a figure, a list of them (pages), or None where the run has nothing to show.
    table: of what it is drawn, "history" or "analysis:<name>"; "": `make` looks for its own file.
    by_task: of a run with several tasks, each task has its own.
    """

    name: str
    make: Callable[[Run], Figure | list[Figure] | None]
    table: str = ""
    by_task: bool = False


FIGURES = {
    drawing.name: drawing
    for drawing in (
        Drawing("training_history", history.training_history, "history"),
        Drawing("group_curves", history.group_curves, "history", by_task=True),
        Drawing("group_accuracies", history.group_accuracies, "history", by_task=True),
        Drawing("evaluation_sets", history.evaluation_sets, "history"),
        Drawing("gaps", history.gaps, "history", by_task=True),
        Drawing("misclassification", history.misclassification, "history", by_task=True),
        Drawing("gradient_basis", analyses.gradient_basis, "analysis:gradient_basis"),
        Drawing(
            "gap_dynamics_factors", analyses.gap_dynamics_factors, "analysis:gap_dynamics_factors"
        ),
        Drawing(
            "static_dynamic_decomposition",
            analyses.static_dynamic_decomposition,
            "analysis:static_dynamic_decomposition",
        ),
        Drawing("jacobian_norm", analyses.jacobian_norm, "analysis:jacobian_norm"),
        Drawing(
            "model_output_expectation",
            analyses.model_output_expectation,
            "analysis:model_output_expectation",
        ),
        Drawing("scale", analyses.scale, "analysis:SCALE"),
        Drawing("dfr", retraining.dfr),
        Drawing("samples", pictures.samples),
        Drawing("gradcam", pictures.gradcam),
    )
}


def draw(folder: str | Path, file_format: str | None = None) -> list[Path]:
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
        for part, drawing in parts(run):
            made = drawing.make(part) if has_rows(part, drawing.table) else None
            if made is None:
                continue
            pages = made if isinstance(made, list) else [made]
            for number, figure in enumerate(pages, 1):
                stem = f"{drawing.name}_{part.task}" if part.task else drawing.name
                page = f"{stem}_{number}" if number > 1 else stem
                paths.append(plots / f"{page}.{file_format}")
                save(figure, paths[-1], file_format)
    return paths


def parts(run: Run) -> Iterator[tuple[Run, Drawing]]:
    """What to draw: the figures of the whole run, then, where it has several tasks, of each."""
    tasks = [of_task(run, task) for task in task_names(run)]
    for drawing in FIGURES.values():
        if not (tasks and drawing.by_task):
            yield run, drawing
    for task in tasks:
        for drawing in FIGURES.values():
            if drawing.by_task:
                yield task, drawing


def has_rows(run: Run, table: str) -> bool:
    """Whether a table (see `Drawing`) has rows to draw; True of figures with their own files."""
    if table == "history":
        return len(run.history) > 0 and len(history_splits(run)) > 0
    if table.startswith("analysis:"):
        return len(analysis_splits(run, table.removeprefix("analysis:"))) > 0
    return True


def save(figure: Figure, path: Path, file_format: str) -> None:
    """Write a picture without dates, under a temporary name until it is whole."""
    metadata = {"Software": None} if file_format == "png" else {"Date": None}
    files.save(path, partial(figure.savefig, format=file_format, dpi=150, metadata=metadata))
