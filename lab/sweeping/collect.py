"""A sweep's tables and figures from its runs: mean, deviation and interval over seeds.

The best setting is chosen by validation accuracy, never by test accuracy; without a validation
split none is named.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lab.config.seeds import derive_seed
from lab.evaluation import selection
from lab.folders import creating, reading
from lab.folders import status as run_status
from lab.sweeping import figures, manifests
from lab.system import files
from lab.system.command import print_lines
from lab.system.errors import UserError

RESAMPLES = 10_000
# Columns of `runs.csv`; the swept keys come after the setting, the final metrics at the end.
RUN_COLUMNS = ("job", "setting", "seed", "state", "folder")
METRICS = {
    "avg_acc": "average",
    "adjusted_acc": "adjusted",
    "worst_acc": "worst group",
    "minority_acc": "minority",
}
STATISTICS = ("mean", "std", "low", "high")
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&",
    "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
}  # fmt: skip


@dataclass
class Sweep:
    """What is known of a sweep.

    keys: the swept ones. settings: {"setting", "name", "overrides"}, in order. runs: a row per job
    (`RUN_COLUMNS`, then the final metrics of finished runs, else NaN). metric: by what settings are
    judged, `worst_acc`, or `minority_acc` as soon as any run has more than four groups (see
    `selection.selection_metric`). notes: further lines of the caption.
    """

    folder: Path
    name: str
    keys: list[str]
    settings: list[dict]
    runs: pd.DataFrame
    metric: str
    notes: list[str]

    def done(self, setting: int) -> pd.DataFrame:
        """The rows of a setting's finished runs."""
        return self.runs[(self.runs.setting == setting) & (self.runs.state == "done")]


def collect(folder: Path) -> None:
    """Write `runs.csv`, `summary.csv`, `summary.md`, `summary.tex` and `plots/` of a sweep.

    Raises `UserError` when the folder is no sweep, or a table of a run is damaged.
    """
    sweep = read(Path(folder))
    summary = summarise(sweep)
    best = best_setting(sweep, summary)
    for name, table in (("runs", sweep.runs), ("summary", summary)):
        text = with_keys(sweep, table).to_csv(index=False, na_rep="nan", lineterminator="\n")
        files.write_text(sweep.folder / f"{name}.csv", text)
    notes = caption(sweep, summary, best)
    files.write_text(sweep.folder / "summary.md", markdown(sweep, summary, best, notes))
    files.write_text(sweep.folder / "summary.tex", latex(sweep, summary, best, notes))
    order = "first" if best is None else "best by validation"
    figures.draw(sweep, ranked(sweep, summary), order)
    print_lines(*notes)
    print_lines(f"Tables and plots: {sweep.folder}", stream="stdout")


def read(folder: Path) -> Sweep:
    """The manifest and the final metrics of every finished run of a sweep."""
    manifest = manifests.read_manifest(folder)
    notes: list[str] = []
    if manifest["optuna"]:
        from lab.sweeping import journal  # with optuna, slow to import

        manifest, notes = journal.with_trials(folder, manifest)
    rows, metric = [], "worst_acc"
    for job in manifest["jobs"]:
        row = {name: job.get(name) for name in RUN_COLUMNS} | {"state": "waiting"}
        run = manifests.run_folder(folder, job)
        if run is not None:
            status = run_status.read_status(run)
            row |= {"state": status["state"], "folder": str(run.relative_to(folder))}
            if status["state"] == "done":
                row |= {
                    name: value
                    for name, value in status["summary"].items()
                    if not (name.startswith("dfr_val_") and _fitted_on_validation(run))
                }
                own = selection.metric_between_runs(status["summary"])
                metric = own if own != "worst_acc" else metric
        if row["state"] != "done":
            row["state"] = _last_attempt(folder / job["folder"] / "job.json", row["state"])
        rows.append(row)
    columns = dict.fromkeys([*RUN_COLUMNS, *(name for row in rows for name in row)])
    runs = pd.DataFrame(rows, columns=list(columns))
    settings = manifest["settings"]
    return Sweep(folder, manifest["name"], manifest["keys"], settings, runs, metric, notes)


def _fitted_on_validation(run: Path) -> bool:
    """Whether DFR was fitted on the validation split, so that its accuracy there says nothing."""
    config = reading.read_config(run / creating.CONFIG)
    return config.get("dfr_val_split_strategy") == "original"


def _last_attempt(path: Path, state: str) -> str:
    """The state in an unfinished job's `job.json`, else the given state."""
    if not path.exists():
        return state
    try:
        return json.loads(path.read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None


def quantities(sweep: Sweep) -> list[str]:
    """The accuracies in the tables, by their names in the runs' summaries.

    Those of the test split before and after DFR, always; where any run has them, those of the
    validation split, and of the test split at the best validation epoch. `minority_acc` only where
    settings are judged by it.
    """
    names = [name for name in METRICS if name != "minority_acc" or sweep.metric == name]
    test = [f"{prefix}test_{name}" for prefix in ("", "dfr_") for name in names]
    validation = [f"val_{sweep.metric}", f"dfr_val_{sweep.metric}"]
    best = [f"best_test_{name}" for name in names]
    optional = {name: _available(sweep, name) for name in (*validation, *best)}
    return [name for name in (*validation, *test, *best) if optional.get(name, True)]


def _available(sweep: Sweep, column: str) -> bool:
    return column in sweep.runs and bool(sweep.runs[column].notna().any())


def bootstrap(values, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron, 1979), over seeds drawn with replacement.

    NaN for fewer than two values, or where one is NaN. The same draws for equally many values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.isnan(values).any():
        return math.nan, math.nan
    generator = np.random.default_rng(derive_seed(0, "bootstrap"))
    drawn = generator.integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def statistics(values) -> dict[str, float]:
    """Mean, sample standard deviation (n - 1), and the ends of the bootstrap interval.

    A NaN among the values makes all NaN; one value has no deviation and no interval.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean() if len(values) else math.nan
    std = values.std(ddof=1) if len(values) > 1 else math.nan
    return dict(zip(STATISTICS, (float(mean), float(std), *bootstrap(values))))


def summarise(sweep: Sweep) -> pd.DataFrame:
    """One row per setting: `setting`, `seeds` (finished runs), `jobs`, `<quantity>_<statistic>`."""
    rows = []
    for setting in sweep.settings:
        number = setting["setting"]
        done = sweep.done(number)
        jobs = int((sweep.runs.setting == number).sum())
        row = {"setting": number, "seeds": len(done), "jobs": jobs}
        for name in quantities(sweep):
            values = done[name] if name in done else [math.nan] * len(done)
            row |= {f"{name}_{key}": value for key, value in statistics(values).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def best_setting(sweep: Sweep, summary: pd.DataFrame) -> int | None:
    """The setting with the highest mean validation accuracy at the last epoch; the first of equals.

    None unless every setting with finished runs has that number: what has no validation split
    cannot be compared, and test accuracy must not choose.
    """
    finished = summary[summary.seeds > 0]
    column = f"val_{sweep.metric}_mean"
    if finished.empty or column not in finished or finished[column].isna().any():
        return None
    return int(finished.setting[finished[column].idxmax()])


def ranked(sweep: Sweep, summary: pd.DataFrame) -> list[int]:
    """The settings with finished runs, the best first where there is a best, else as planned."""
    finished = summary[summary.seeds > 0]
    if best_setting(sweep, summary) is not None:
        finished = finished.sort_values(f"val_{sweep.metric}_mean", ascending=False, kind="stable")
    return finished.setting.tolist()


def caption(sweep: Sweep, summary: pd.DataFrame, best: int | None) -> list[str]:
    """What the tables are, how the best setting was chosen, what is missing; one line each."""
    judged = {"worst_acc": "worst-group", "minority_acc": "minority"}[sweep.metric]
    lines = [
        f"Sweep {sweep.name}: mean ± standard deviation over seeds (n - 1), and the 95% bootstrap "
        "interval of the mean."
    ]
    if best is not None:
        lines.append(
            f"Best setting: {_name(sweep, best)}, with the highest mean validation {judged} "
            "accuracy at the last epoch. Test accuracy had no part in the choice."
        )
        means = summary[f"val_{sweep.metric}_mean"]
        equal = int((means == means.max()).sum())
        if equal > 1:
            lines.append(f"{equal} settings are equally good by that; this is the first of them.")
    elif (summary.seeds > 0).any():
        lines.append(
            "No best setting is named: not every setting has validation accuracies "
            "(num_val_samples, val_target_size), and test accuracy must not choose."
        )
    if sweep.metric == "minority_acc":
        lines.append("More than four groups: settings are judged by the minority, not the worst.")
    lines += sweep.notes
    missing = sweep.runs[sweep.runs.state != "done"]
    if len(missing):
        each = [f"{job} {state}" for job, state in zip(missing.job, missing.state)]
        lines.append(
            f"Not in the numbers: {len(missing)} of {len(sweep.runs)} jobs ({', '.join(each)})."
        )
    return lines


def _name(sweep: Sweep, setting: int) -> str:
    return next(row["name"] for row in sweep.settings if row["setting"] == setting)


def with_keys(sweep: Sweep, table: pd.DataFrame) -> pd.DataFrame:
    """The table with the name and the swept keys of each row's setting after its number."""
    settings = {row["setting"]: row for row in sweep.settings}
    keys = {"name": [settings[number]["name"] for number in table.setting]}
    for key in sweep.keys:
        values = [settings[number]["overrides"].get(key) for number in table.setting]
        keys[key] = [v if type(v) in (int, float) else figures.shown(v) for v in values]
    place = list(table.columns).index("setting") + 1
    parts = [table.iloc[:, :place], pd.DataFrame(keys, table.index), table.iloc[:, place:]]
    return pd.concat(parts, axis=1)


def _columns(sweep: Sweep) -> list[str]:
    """The quantities of the readable tables, one column each; those after DFR go below these."""
    names = [name for name in quantities(sweep) if not name.startswith("dfr_")]
    return [n for n in names if not n.startswith("best_") or n == f"best_test_{sweep.metric}"]


def heading(quantity: str) -> list[str]:
    """What a quantity is called: `best_test_worst_acc` is test, worst group, best epoch."""
    best = quantity.startswith("best_")
    split, _, metric = quantity.removeprefix("best_").partition("_")
    split = {"val": "validation"}.get(split, split)
    return [split, METRICS[metric], *["best epoch"] * best]


def _lines(sweep: Sweep, summary: pd.DataFrame):
    """The readable tables: headings (each a list), (setting, words, (mean ± std, interval)s)."""
    after = [name for name in quantities(sweep) if name.startswith("dfr_")]
    retrained = any(_available(sweep, name) for name in after)
    stages = {"": "before", "dfr_": "after"} if retrained else {"": ""}
    overrides = {row["setting"]: row["overrides"] for row in sweep.settings}
    words = [*sweep.keys, "seeds", *["DFR"] * retrained]
    heads = [*([word] for word in words), *map(heading, _columns(sweep))]
    lines = []
    for row in summary.to_dict("records"):
        first = [figures.shown(overrides[row["setting"]].get(key)) for key in sweep.keys]
        first.append(f"{row['seeds']}" + f" of {row['jobs']}" * (row["seeds"] < row["jobs"]))
        for prefix, stage in stages.items():
            cells = [_cell(row, prefix + name) for name in _columns(sweep)]
            lines.append((row["setting"], [*first, *[stage] * retrained], cells))
    return heads, lines


def _cell(row: dict, quantity: str) -> tuple[str, str]:
    mean, std, low, high = (row.get(f"{quantity}_{key}", math.nan) for key in STATISTICS)
    text = "" if math.isnan(mean) else f"{mean:.3f}"
    text += "" if math.isnan(std) else f" ± {std:.3f}"
    return text, "" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"


def markdown(sweep: Sweep, summary: pd.DataFrame, best: int | None, notes: list[str]) -> str:
    """The summary in Markdown: caption, then the table with the best setting in bold."""
    heads, rows = _lines(sweep, summary)
    lines = ["  \n".join(map(_markdown, notes)), ""]
    lines += [_line(_markdown(" ".join(head)) for head in heads), _line(["---"] * len(heads))]
    for setting, first, cells in rows:
        texts = [_markdown(text) for text in [*first, *map(" ".join, cells)]]
        lines.append(
            _line(f"**{t.strip()}**" if setting == best and t.strip() else t for t in texts)
        )
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", text)


def latex(sweep: Sweep, summary: pd.DataFrame, best: int | None, notes: list[str]) -> str:
    """The table for papers: a `table` that needs no package, the interval below each mean."""
    heads, rows = _lines(sweep, summary)
    words = len(heads) - len(_columns(sweep))
    lines = [
        "% made by python sweep.py --collect",
        r"\begin{table}",
        rf"\caption{{{escape(' '.join(notes))}}}",
        r"\centering\scriptsize\setlength{\tabcolsep}{2pt}",
        r"\renewcommand{\arraystretch}{1.2}\makebox[\linewidth]{%",
        rf"\begin{{tabular}}{{{'l' * words + 'c' * len(_columns(sweep))}}}",
        r"\hline",
    ]
    for depth in range(max(map(len, heads))):
        parts = (head[depth] if depth < len(head) else "" for head in heads)
        lines.append(" & ".join(map(escape, parts)) + r" \\")
    before = None
    for setting, first, cells in rows:
        if setting != before:
            lines.append(r"\hline")
        shown = [escape(text) for text in [*first, *(mean for mean, _ in cells)]]
        bold = setting == best
        lines.append(" & ".join(rf"\textbf{{{t}}}" if bold and t else t for t in shown) + r" \\")
        if any(interval for _, interval in cells):
            # {}: a row that begins with [ would be an option of the line break before it.
            below = ["{}"] * words + [interval for _, interval in cells]
            lines.append(" & ".join(below) + r" \\")
        before = setting
    return "\n".join([*lines, r"\hline", r"\end{tabular}}", r"\end{table}"]) + "\n"


def escape(text: str) -> str:
    """The text for LaTeX; characters beyond Latin-1 as `[U+number]`."""
    printed = (c if c.isascii() or "À" <= c <= "ÿ" else f"[U+{ord(c):04X}]" for c in text)
    return "".join(LATEX.get(c) or t for c, t in zip(text, printed))
