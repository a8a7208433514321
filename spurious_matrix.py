"""Which attributes are shortcuts for which: one ERM network an attribute, and δ of every pair.

    python spurious_matrix.py --config FILE [key=value ...]             all attributes
    python spurious_matrix.py --config FILE --task NAME [key=value ...] one network, as main.py runs
    python spurious_matrix.py --collect FOLDER ...                      of networks trained so
    python spurious_matrix.py --resume FOLDER                           continue, or draw again

Every attribute of CelebA is a task once. The groups of a task with another attribute are (task,
attribute) = 00, 01, 10, 11 with the accuracies g0 … g3; δ = |g0 + g3 - g1 - g2| in percentage
points is large where the network relies on that attribute. In the order of the work:

    lab/matrix/settings.py    options of the command, the configuration of every task
    lab/matrix/heads.py       K networks on features, trained as one
    lab/matrix/training.py    all networks: on features at once, on pictures one after the other
    lab/matrix/collecting.py  finished runs, and what their networks predict
    lab/matrix/tables.py      group accuracies, T (δ, attribute × task), pairs with a large δ
    lab/matrix/clusters.py    co-clusters of T, clusters of its directions
    lab/matrix/figures.py     the figures of these tables

Exit codes are those of main.py.
"""

import argparse
import json
import shlex
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import main as experiment
from lab.config import loading
from lab.config.schema import Config
from lab.matrix import settings
from lab.system import files
from lab.system.command import DEFAULT_CONFIG_FILE, Parser, console_log, exit_code, print_lines
from lab.system.errors import ConfigError, UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command from its arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    task: list[str] = []

    def command() -> None:
        given = _arguments(argv)
        if given.task:
            file = given.config or DEFAULT_CONFIG_FILE
            task.extend(settings.task_arguments(file, given.overrides, given.task))
            return
        with console_log() as early_log:
            if given.collect:
                folder = collect(given)
            else:
                folder = matrix(given, ["spurious_matrix.py", *argv], early_log)
        print_lines(f"Results: {folder}", stream="stdout")

    code = exit_code(command)
    return experiment.main(task) if task else code


def matrix(given: argparse.Namespace, command: list[str], early_log: MemoryHandler) -> Path:
    """Train a network for every attribute, write tables and figures; returns the results folder.

    Raises `UserError` for what the user can fix.
    """
    # Imported here: `--help` and errors in the configuration need not wait for torch.
    from lab.runs import resuming, starting

    resume = None
    if given.resume:
        resume = resuming.load_to_resume(Path(given.resume), None, given.overrides)
        config = resume.config
        options = settings.read_options(resume.folder) | given.options
    else:
        config = loading.load_config(given.config or DEFAULT_CONFIG_FILE, given.overrides)
        options = settings.OPTIONS | given.options
    settings.check(config)
    names = settings.source(config).attribute_names
    if problems := settings.wrong_options(options, len(names)):
        raise ConfigError(*problems)
    from lab.system import devices

    device = devices.choose_device(config.device)
    if resume:
        results = resuming.resume(resume, device, command)
    else:
        results = starting.start(config, device, command, {})
    folder = results.folder
    try:
        with results:
            results.keep_log(early_log)
            files.write_text(folder / settings.OPTIONS_FILE, json.dumps(options) + "\n")
            if resume is None or resume.phase == "training":
                _train(config, names, device, folder, given.overrides)
                results.enter("plots")
            conclude(folder, options, config)
            results.enter("done")
    except BaseException as error:
        # In place of the advice of a run inside: what is to be resumed is the matrix.
        error.__notes__ = []
        if not getattr(error, "final", False):
            error.add_note("To resume:")
            error.add_note(f"python spurious_matrix.py --resume {shlex.quote(str(folder))}")
        raise
    return folder


def _train(
    config: Config, names: list[str], device: str, folder: Path, overrides: list[str]
) -> None:
    """Train all networks, then write the accuracies of their groups."""
    from lab.matrix import collecting, tables, training

    if config.use_feature_extractor:
        tallies = training.train_heads(config, names, device, folder)
    else:
        training.train_runs(config, names, folder, overrides, experiment.run)
        tallies = collecting.predict(collecting.find_runs([folder / "runs"]), names, config)
    tables.write_accuracies(folder, names, *tallies)


def collect(given: argparse.Namespace) -> Path:
    """Tables and figures of runs that were trained apart; returns the results folder.

    It is `spurious_matrix/<time>` in the first of the folders. Raises `UserError` for what the
    user can fix.
    """
    from lab.folders import creating
    from lab.matrix import collecting, tables

    runs = collecting.find_runs(given.collect)
    if not runs:
        raise UserError(f"{', '.join(given.collect)}: no finished run of CelebA with one task")
    file = given.config or next(iter(runs.values()))[0] / creating.CONFIG
    config = loading.load_config(file, given.overrides)
    settings.check(config)
    names, options = settings.source(config).attribute_names, settings.OPTIONS | given.options
    if problems := settings.wrong_options(options, len(names)):
        raise ConfigError(*problems)
    tallies = collecting.predict(runs, names, config)
    folder = creating.new_folder(Path(given.collect[0]) / "spurious_matrix")
    files.write_text(folder / creating.CONFIG, creating.config_yaml(config))
    tables.write_accuracies(folder, names, *tallies)
    conclude(folder, options, config)
    return folder


def conclude(folder: Path, options: dict[str, Any], config: Config) -> None:
    """Everything that follows from `group_accuracies.csv`: tables, clusters, figures."""
    from lab.matrix import clusters, figures, tables  # with pandas and matplotlib, slow to import

    names, T = tables.write_deltas(folder, options["eps"])
    clusters.write_clusters(folder, names, T, options, config.seed)
    figures.draw(folder, config.plot_format)


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Parsed arguments. Raises `ConfigError` for what does not go together."""
    parser = Parser(
        prog="python spurious_matrix.py", description="Which attributes are shortcuts for which."
    )
    parser.add_config_arguments()
    parser.add_argument("--task", metavar="NAME", help="train the network of this attribute only")
    parser.add_argument(
        "--collect", nargs="+", metavar="FOLDER", help="sweeps, or folders with runs of all tasks"
    )
    parser.add_argument("--resume", metavar="FOLDER", help="continue an interrupted matrix")
    parser.add_argument("--eps", type=float, help="δ above which a pair is listed (default: 33)")
    parser.add_argument("--k", type=int, help="number of clusters (default: 10)")
    parser.add_argument(
        "--gamma", type=float, help="share of T's squares that directions reach (default: 0.9)"
    )
    given = parser.parse_intermixed_args(argv)
    if given.collect:  # takes the overrides after it, too
        given.overrides += [text for text in given.collect if "=" in text]
        given.collect = [text for text in given.collect if "=" not in text]
    problems = []
    if sum(bool(way) for way in (given.task, given.collect, given.resume)) > 1:
        problems.append("command line: allowed: one of --task, --collect and --resume")
    if given.resume and given.config:
        problems.append(
            f"--config: given {given.config}, but a matrix is resumed with its own configuration; "
            "allowed: without --resume"
        )
    options = {name: getattr(given, name) for name in settings.OPTIONS}
    given.options = {name: value for name, value in options.items() if value is not None}
    problems += settings.wrong_options(given.options)
    if problems:
        raise ConfigError(*problems)
    return given


if __name__ == "__main__":
    sys.exit(main())
