"""Which attributes are shortcuts for which: one ERM network an attribute, and δ of every pair.

    python spurious_matrix.py --config FILE [key=value ...]             all attributes
    python spurious_matrix.py --config FILE --task NAME [key=value ...] one network, as main.py runs
    python spurious_matrix.py --collect FOLDER ...                      of networks trained so
    python spurious_matrix.py --resume FOLDER                           go on, or draw again

On features all networks are trained at once, on pictures one after the other. Exit codes are those
of main.py.
"""

import csv
import hashlib
import io
import json
import logging
import shlex
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

import numpy as np
import pandas as pd

from lab.config import comparing, loading, messages
from lab.config.registry import DataSet
from lab.config.schema import Config, layout
from lab.config.seeds import derive_seed
from lab.config.strict_yaml import show
from lab.evaluation import shortcuts
from lab.runs import run as tracking
from lab.splits import groups
from lab.system import files
from lab.system.command import DEFAULT_CONFIG_FILE, Parser, console_log, exit_code, tell
from lab.system.errors import ConfigError, DataError, UserError

log = logging.getLogger(f"spurious.{__name__}")

OPTIONS = {"eps": 33.0, "k": 10, "gamma": 0.9}
OPTIONS_FILE = "options.json"
ACCURACIES = "group_accuracies.csv"
# What a task's own run has besides the common settings. Nothing is set aside for DFR: what would be
# differs from task to task.
OWN = {"use_dfr": False, "dfr_val_split_strategy": "original"}
# Where things are and how fast they go: what may be other when networks are collected.
PLACE = ("data_dir", "device", "num_workers", "eval_batch_size", "features_cache_dir")
MAY_DIFFER = (*comparing.FREE_TO_CHANGE, *PLACE, "groupings", "experiment_name", "use_dfr")


def main(experiment, argv: list[str] | None = None) -> int:
    """Run the command from its arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    task: list[str] = []

    def command() -> None:
        given = _arguments(argv)
        if given.task:
            task.extend(task_arguments(given))
        elif given.collect:
            with console_log():
                folder = collect(given)
            tell(f"Results: {folder}", stream="stdout")
        else:
            with console_log() as early_log:
                folder = matrix(given, ["spurious_matrix.py", *argv], early_log, experiment.run)
            tell(f"Results: {folder}", stream="stdout")

    code = exit_code(command)
    if task:
        return experiment.main(task)
    return code


def _arguments(argv: list[str]):
    """Parsed arguments. Raises `ConfigError` for what does not go together."""
    parser = Parser(
        prog="python spurious_matrix.py", description="Which attributes are shortcuts for which."
    )
    parser.add_config_arguments()
    parser.add_argument("--task", metavar="NAME", help="train the network of this attribute only")
    parser.add_argument(
        "--collect", nargs="+", metavar="FOLDER", help="sweeps, or folders with runs of all tasks"
    )
    parser.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted matrix")
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
        problems.append("--config: a matrix goes on with its own; allowed: without --resume")
    given.options = {name: getattr(given, name) for name in OPTIONS}
    given.options = {name: value for name, value in given.options.items() if value is not None}
    problems += _wrong_options(given.options)
    if problems:
        raise ConfigError(*problems)
    return given


def _wrong_options(options: dict, count: int | None = None) -> list[str]:
    """Problems of `--eps`, `--k`, `--gamma`; count: of attributes, if known."""
    eps, k, gamma = (options.get(name, default) for name, default in OPTIONS.items())
    problems = []
    if not 0 <= eps <= 200:
        problems.append(f"--eps: given {eps:g}; allowed: 0 to 200")
    if not 0 < gamma <= 1:
        problems.append(f"--gamma: given {gamma:g}; allowed: above 0, up to 1")
    if k < 2 or (count is not None and k > count):
        problems.append(f"--k: given {k}; allowed: 2 to {count or 'the number of attributes'}")
    return problems


def check(config: Config) -> None:
    """Raises `ConfigError` for settings with which the networks would not be comparable."""
    problems = [
        f"{name}: given {getattr(config, name)}; allowed here: {allowed}"
        for name, allowed in (
            ("debias_method", "None"),
            ("celeba_splits", "official"),
        )
        if getattr(config, name) != allowed
    ]
    if not config.data_set.any_task:
        known = [n for n, record in config.catalogue.of(DataSet).items() if record.any_task]
        problems.insert(
            0, f"dataset_name: given {config.dataset_name}; allowed here: {', '.join(known)}"
        )
    if config.remove_minority_groups_train:
        problems.append("remove_minority_groups_train: given true; allowed here: false")
    if config.num_val_samples == 0:
        problems.append("num_val_samples: given 0, but δ is of validation; allowed here: above 0")
    if problems:
        raise ConfigError(*problems)
    if config.use_feature_extractor:
        from lab.matrix import heads as batched_heads

        batched_heads.check(config)


def grouping(names: list[str], label: str) -> str:
    """What a task's run is told: its label, and as the shortcut the next attribute, in a circle."""
    return f"{label}:{names[(names.index(label) + 1) % len(names)]}"


def task_config(config: Config, text: str, **changes) -> Config:
    """The configuration of the run of one task."""
    return loading.validate(config.resolved() | OWN | {"groupings": [text]} | changes)


def task_arguments(given) -> list[str]:
    """The command line of main.py that trains the network of `--task`. Raises `UserError`."""
    file = given.config or DEFAULT_CONFIG_FILE
    config = loading.load_config(file, given.overrides)
    check(config)
    source = _source(config)
    source.attribute(given.task)
    text = grouping(source.attribute_names, given.task)
    own = {**OWN, "groupings": [text]}
    kept = [o for o in given.overrides if o.partition("=")[0].strip() not in own]
    return ["--config", file, *kept, *(f"{key}={json.dumps(own[key])}" for key in own)]


def _source(config: Config):
    """The faces and their attributes. Raises `DataError` if they are too few for pairs."""
    from lab.data_sets.sources import celeba

    source = celeba.load(config.data_dir, config.target_resolution)
    if len(source.attribute_names) < 2:
        raise DataError(f"{source.metadata}: one attribute; pairs need two")
    return source


def matrix(given, command: list[str], early_log: MemoryHandler, run_experiment) -> Path:
    """Train a network for every attribute and tell what follows; returns the results folder.

    Raises `UserError` for what the user can fix.
    """
    resume = None
    if given.resume:
        resume = tracking.load_to_resume(Path(given.resume), None, given.overrides)
        config = resume.config
        options = _read_options(resume.folder) | given.options
    else:
        config = loading.load_config(given.config or DEFAULT_CONFIG_FILE, given.overrides)
        options = OPTIONS | given.options
    check(config)
    names = _source(config).attribute_names
    if problems := _wrong_options(options, len(names)):
        raise ConfigError(*problems)
    from lab.system import devices

    device = devices.choose_device(config.device)
    if resume:
        results = tracking.resume(resume, device, command)
    else:
        results = tracking.start(config, device, command, {})
    folder = results.folder
    try:
        with results:
            results.keep_log(early_log)
            files.write_text(folder / OPTIONS_FILE, json.dumps(options) + "\n")
            if resume is None or resume.phase == tracking.PHASES[0]:
                train = _train_heads if config.use_feature_extractor else _train_runs
                write_accuracies(
                    folder, names, *train(config, names, device, folder, given, run_experiment)
                )
                results.enter("plots")
            conclude(folder, options, config)
            results.enter("done")
    except BaseException as error:
        # The runs inside tell how to resume themselves; what is to be resumed is all of it.
        error.__notes__ = []
        if not getattr(error, "final", False):
            error.add_note("To resume:")
            error.add_note(f"python spurious_matrix.py --resume {shlex.quote(str(folder))}")
        raise
    return folder


def _read_options(folder: Path) -> dict:
    path = folder / OPTIONS_FILE
    try:
        return {name: type(OPTIONS[name])(v) for name, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not readable, so this is no matrix to resume ({error})") from None


def _train_runs(config: Config, names: list[str], device: str, folder: Path, given, run_experiment):
    """(right, samples) (K, K, 4), after the runs of main.py that are not done yet."""
    for number, name in enumerate(names, 1):
        place = folder / "runs" / name
        before = [path.parent for path in place.glob("[!.]*/status.json")]
        own, resume = None, None
        if before:
            resume = tracking.load_to_resume(before[0], None, given.overrides)
            own = resume.config
            if resume.phase == "done":
                continue
        else:
            own = task_config(config, grouping(names, name), results_dir=str(place))
        log.info("Network %d of %d: %s", number, len(names), name)
        run_experiment(own, ["main.py"], MemoryHandler(0), resume)
    runs = find_runs([folder / "runs"])
    return predict(runs, names, config)


def _train_heads(
    config: Config, names: list[str], device: str, folder: Path, given, run_experiment
):
    """(right, samples) (K, K, 4) of networks on features, trained all at once."""
    import torch

    from lab import data_sets as data_loader
    from lab.features import extraction as feature_extractor
    from lab.matrix import heads as batched_heads

    own = task_config(config, grouping(names, names[0]))
    extractor = feature_extractor.Extractor(own, device)
    splits = data_loader.load(own)
    pictures = {name: splits.named()[name].inputs for name in ("train", "val")}
    splits = extractor.extract(splits)
    attributes = {name: _attributes(inputs) for name, inputs in pictures.items()}
    labels = {n: torch.from_numpy(values).float().to(device) for n, values in attributes.items()}
    data = hashlib.sha256(splits.fingerprint().encode())
    for values in attributes.values():
        data.update(np.ascontiguousarray(values))
    blocks = batched_heads.train(
        splits.train.inputs.to(device),
        labels["train"],
        torch.from_numpy(storage_orders(pictures["train"].rows, attributes["train"])),
        config,
        folder,
        data.hexdigest(),
        names,
    )
    right = batched_heads.right(
        blocks, splits.val.inputs.to(device), labels["val"], config.eval_batch_size
    )
    right = right.cpu().numpy()
    return _stacked(
        shortcuts.tallies(right[:, t], attributes["val"][:, t], attributes["val"])
        for t in range(len(names))
    )


def _attributes(pictures) -> np.ndarray:
    """All attributes (N, K) int8 of CelebA's pictures."""
    return pictures.source.attributes[pictures.rows]


def storage_orders(rows: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Where the samples of a split are that each task's own run would store, in its order (K, N).

    rows: (N,) of the samples in the source; attributes: (N, K). A run stores them group by group,
    of its label and the next attribute, and in the order of the source within each.
    """
    following = np.roll(attributes, -1, axis=1)
    return np.stack(
        [np.lexsort((rows, groups.index(y, a))) for y, a in zip(attributes.T, following.T)]
    )


def _stacked(tallies) -> tuple[np.ndarray, np.ndarray]:
    correct, counts = zip(*tallies)
    return np.stack(correct), np.stack(counts)


def find_runs(folders) -> dict[str, tuple[Path, Config]]:
    """{label: (folder, configuration)} of the finished runs of CelebA with one task in folders.

    Raises `UserError` for two runs of the same label.
    """
    found: dict[str, tuple[Path, Config]] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--collect: given {folder}; allowed: folders with runs")
        for path in sorted(Path(folder).rglob("status.json")):
            run = path.parent
            hidden = any(part.startswith(".") for part in run.relative_to(folder).parts)
            if hidden or not (run / "model.pt").is_file():
                continue
            if tracking.read_status(run)["phase"] != "done":
                log.warning("%s: not finished, left out", run)
                continue
            config = loading.load_config(run / tracking.CONFIG)
            if not config.data_set.any_task or len(config.groupings) != 1:
                continue
            label = config.groupings[0].partition(":")[0]
            if label in found:
                raise UserError(f"two finished runs of {label}: {found[label][0]} and {run}")
            found[label] = run, config
    return found


def predict(runs: dict, names: list[str], base: Config) -> tuple[np.ndarray, np.ndarray]:
    """(right, samples) (K, K, 4) of the runs' networks: task × attribute × group.

    One pass of each network over the validation faces serves all attributes. Raises `UserError`
    for a missing run, or one with other settings than base but for `MAY_DIFFER`.
    """
    from lab import data_sets as data_loader
    from lab.evaluation import metrics, predictions
    from lab.networks import building
    from lab.system import devices
    from lab.training import checkpoints

    base = loading.validate(base.resolved() | OWN)
    problems = [f"no finished run of {name}" for name in names if name not in runs]
    for run, config in runs.values():
        problems += [
            f"{run}: {name} is {show(getattr(config, name))}, elsewhere {show(getattr(base, name))}"
            for name in layout(base.catalogue)
            if name not in MAY_DIFFER and getattr(config, name) != getattr(base, name)
        ]
    if problems:
        raise UserError(*problems[: messages.PROBLEMS])
    device = devices.choose_device(base.device)
    tallies = []
    for name in names:
        run, config = runs[name]
        place = {key: getattr(base, key) for key in PLACE}
        config = loading.validate(config.resolved() | place)
        splits = data_loader.load(config)
        attributes = _attributes(splits.val.inputs)
        if config.use_feature_extractor:
            from lab.features import extraction as feature_extractor

            splits = feature_extractor.Extractor(config, device).extract(splits)
        network = building.build_for(config, splits)
        checkpoints.load_network(network, run, "last", splits.fingerprint())
        val = splits.val.to(device)
        f = predictions.outputs(network.to(device), val, config.eval_batch_size)
        right = metrics.correct(f, val.y).cpu().numpy()
        tallies.append(shortcuts.tallies(right, splits.val.y.numpy(), attributes))
        log.info("%s: %.3f of %d right", name, right.mean(), len(right))
    return _stacked(tallies)


def collect(given) -> Path:
    """What follows from runs that were trained apart, in a new folder `spurious_matrix/<time>`.

    It is made in the first of the folders. Raises `UserError` for what the user can fix.
    """
    runs = find_runs(given.collect)
    if not runs:
        raise UserError(f"{', '.join(given.collect)}: no finished run of CelebA with one task")
    file = given.config or next(iter(runs.values()))[0] / tracking.CONFIG
    config = loading.load_config(file, given.overrides)
    check(config)
    names, options = _source(config).attribute_names, OPTIONS | given.options
    if problems := _wrong_options(options, len(names)):
        raise ConfigError(*problems)
    tallies = predict(runs, names, config)
    folder = tracking.new_folder(Path(given.collect[0]) / "spurious_matrix")
    files.write_text(folder / tracking.CONFIG, tracking.config_yaml(config))
    write_accuracies(folder, names, *tallies)
    conclude(folder, options, config)
    return folder


def write_accuracies(folder: Path, names: list[str], correct, counts) -> None:
    """Write `group_accuracies.csv`: a row for each group of each task with each attribute."""
    accuracy = correct / np.where(counts > 0, counts, np.nan)
    shrunk = shortcuts.shrunk(correct, counts)
    rows = [
        [names[t], names[a], g, *(table[t, a, g].item() for table in (counts, correct))]
        + [table[t, a, g].item() for table in (accuracy, shrunk)]
        for t, a, g in np.ndindex(correct.shape)
    ]
    header = ["task", "attribute", "group", "count", "correct", "accuracy", "shrunk"]
    _write_table(folder / ACCURACIES, header, rows)


def _write_table(path: Path, header: list[str], rows) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    files.write_text(path, text.getvalue())


def conclude(folder: Path, options: dict, config: Config) -> None:
    """Everything that follows from `group_accuracies.csv`: tables, clusters, figures."""
    eps, k, gamma = (options[name] for name in OPTIONS)
    table = pd.read_csv(folder / ACCURACIES)
    names = table["task"].drop_duplicates().tolist()
    shape = (len(names), len(names), 4)
    correct, counts = (table[column].to_numpy().reshape(shape) for column in ("correct", "count"))
    T = shortcuts.deltas(correct, counts).T  # attribute × task
    write = _square_writer(folder, names)
    write("spurious_matrix.csv", T)
    found = shortcuts.pairs(T, eps)
    _write_table(
        folder / "spurious_pairs.csv",
        ["task", "attribute", "delta"],
        [[names[t], names[a], T[a, t]] for t, a in found],
    )
    Z = shortcuts.standardised(T)
    cosines = shortcuts.cosines(Z, Z.T)
    write("cosine_rows.csv", cosines)
    vectors, sigma, d = shortcuts.directions(T, gamma)
    write("cosine_directions.csv", shortcuts.cosines(vectors, vectors))
    seeds = {name: derive_seed(config.seed, "clusters", name) for name in ("rows", "cosine", "svd")}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = shortcuts.coclusters(Z, k, seeds["rows"])
        similar = shortcuts.coclusters(cosines, k, seeds["cosine"])
        apart = shortcuts.clusters(vectors, k, seeds["svd"])
    for warning in told:
        log.warning("Clusters: %s", warning.message)
    described = {
        "eps": eps,
        "k": k,
        "gamma": gamma,
        "coclusters": {
            "standardised": _named_pair(rows, names, k),
            "cosine": _named_pair(similar, names, k),
        },
        "directions": {
            "d": d,
            "singular_values": sigma.tolist(),
            "clusters": _named(apart, names, k),
        },
    }
    text = json.dumps(described, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(folder / "clusters.json", text + "\n")
    log.info("%d of %d pairs have δ above %g", len(found), len(names) * (len(names) - 1), eps)
    for t, a in found[:10]:
        log.info("%6.1f  %s by %s", T[a, t], names[t], names[a])
    from lab.matrix import figures as matrix_plots  # with matplotlib, slow to import

    matrix_plots.draw(folder, config.plot_format)


def _square_writer(folder: Path, names: list[str]):
    def write(name: str, values: np.ndarray) -> None:
        rows = [[attribute, *row] for attribute, row in zip(names, values.tolist())]
        _write_table(folder / name, ["attribute", *names], rows)

    return write


def _named(labels: np.ndarray | None, names: list[str], k: int) -> list[list[str]] | None:
    """The names in each cluster; None where there are no clusters."""
    if labels is None:
        return None
    return [[name for name, label in zip(names, labels) if label == c] for c in range(k)]


def _named_pair(labels, names: list[str], k: int) -> list[dict] | None:
    """The attributes and tasks in each co-cluster; None where there are no clusters."""
    if labels is None:
        return None
    rows, columns = (_named(side, names, k) for side in labels)
    return [{"attributes": a, "tasks": t} for a, t in zip(rows, columns)]


if __name__ == "__main__":
    sys.exit(main())
