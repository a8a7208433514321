"""Deep feature reweighting: retrain the last layer of a trained run, without training again.

    python dfr.py --run results/<run> [dfr_key=value ...]     once more, without training
    python dfr.py --run results/<run> --compare               with both solvers, in one table

How it works is in `lab/retraining/`: `dfr.py` retrains on a run's splits, by `regressions.py` (with
scikit-learn, `logistic.py`) or `descent.py`; `subsets.py` draws the samples, `head.py` is the layer
that results, `report.py` writes the results.
"""

import logging
import sys
from pathlib import Path

from lab.config import effects
from lab.folders import creating
from lab.retraining.dfr import SOLVERS, check, retrain, save
from lab.retraining.report import comparison, comparison_text, text
from lab.runs.opening import OpenedRun, open_run
from lab.system import files
from lab.system.errors import ConfigError

log = logging.getLogger("spurious.dfr")

# What of DFR decides about the training data, and so about the network.
SPLITTING = (
    "dfr_val_split_strategy", "dfr_val_ratio", "dfr_reuse_train", "dfr_spurious_features",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """`python dfr.py --run results/<run>`: retrain a trained run again; returns the exit code."""
    from lab.system.command import Parser, console_log, exit_code, folder_name, print_lines

    parser = Parser(
        prog="python dfr.py",
        description="Deep feature reweighting of a trained run, without training it again.",
    )
    parser.add_argument(
        "--run", required=True, type=folder_name, metavar="FOLDER", help="results/<run>"
    )
    parser.add_argument(
        "--compare", action="store_true", help="retrain with both solvers, results in one table"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dfr_key=value",
        help="settings of DFR that replace the run's",
    )

    def again() -> None:
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        retrain_as_asked = compare_solvers if arguments.compare else retrain_run
        with console_log():
            place = retrain_as_asked(Path(arguments.run), arguments.overrides)
            print_lines(f"Results: {place}", stream="stdout")

    return exit_code(again)


def retrain_run(folder: Path, overrides=()) -> Path:
    """Retrain the network of a run's last (or best) checkpoint with other settings of DFR.

    Writes `config_used.yaml` and what `save` writes into a new folder `<run>/dfr/<time>`, and
    returns that. Raises `ConfigError` for overrides that are not of DFR, `DataError` when the data
    are not the run's: test or training data must never be what DFR retrains on.
    """
    run = _open(folder, overrides)
    idle = effects.without_effect(run.config, _names(overrides))
    if idle:
        log.info("Given, but without effect here: %s", "; ".join(idle))
    check(run.splits, run.config.dfr_solver)
    head, results = retrain(run.network(), run.splits, run.config)
    place = creating.new_folder(folder / "dfr")
    files.write_text(place / "config_used.yaml", creating.config_yaml(run.config))
    save(place, head, results, run.splits.group_names)
    log.info("%s", text(results, run.splits.group_names))
    return place


def compare_solvers(folder: Path, overrides=()) -> Path:
    """As `retrain_run`, with every solver, each into a folder of its name in `<run>/dfr/<time>`.

    Beside them `dfr_comparison.csv` and `.txt`: accuracies before and after, side by side.
    """
    if "dfr_solver" in _names(overrides):
        raise ConfigError(f"dfr_solver: given with --compare, which takes {', '.join(SOLVERS)}")
    configs = {
        solver: _open(folder, [*overrides, f"dfr_solver={solver}"]).config for solver in SOLVERS
    }
    run = OpenedRun(folder, configs[SOLVERS[0]])
    network, splits = run.network(), run.splits
    for solver in SOLVERS:
        check(splits, solver)
    found = {solver: retrain(network, splits, config) for solver, config in configs.items()}
    place = creating.new_folder(folder / "dfr")
    for solver, (head, results) in found.items():
        (place / solver).mkdir()
        configuration = creating.config_yaml(configs[solver])
        files.write_text(place / solver / "config_used.yaml", configuration)
        save(place / solver, head, results, splits.group_names)
    rows = comparison({solver: results for solver, (_, results) in found.items()})
    files.write_csv(place / "dfr_comparison.csv", rows)
    files.write_text(place / "dfr_comparison.txt", comparison_text(rows))
    log.info("%s", comparison_text(rows))
    return place


def _open(folder: Path, overrides) -> OpenedRun:
    """A run with other settings of DFR. Raises `ConfigError` for other keys."""
    wrong = [
        given
        for given in overrides
        if not given.startswith(("dfr_", "plugins="))
        or given.partition("=")[0].partition(".")[0] in SPLITTING
    ]
    if wrong:
        raise ConfigError(
            *(f"{given}: allowed: keys of DFR, but not {', '.join(SPLITTING)}" for given in wrong)
        )
    plugins = [given for given in overrides if given.startswith("plugins=")]
    trained = open_run(folder, plugins).config
    split_off = trained.dfr_val_split_strategy == "split_from_train"
    if split_off and not trained.dfr_val_ratio and not trained.data_set.retrains_on_train:
        raise ConfigError(
            f"dfr_val_ratio: is 0 in {folder}, so that nothing was set aside for DFR; allowed: a "
            "run trained with use_dfr=true or dfr_val_ratio=0.2"
        )
    return open_run(folder, [*overrides, "use_dfr=true"])


def _names(overrides) -> list[str]:
    return [given.partition("=")[0].strip() for given in overrides]


if __name__ == "__main__":
    sys.exit(main())
