"""One experiment: load → train (with analyses) → DFR → plots.

    python main.py [--config FILE] [key=value ...]
    python main.py --resume results/<run> [key=value ...]
    torchrun --nproc_per_node=N main.py ...                several GPUs

Exit codes: 0 done; 2 what you can fix (configuration, data, disk), one line a problem; 1 anything
else; 128 + the signal's number if stopped by one.
"""

import logging
import sys
import time
from logging.handlers import MemoryHandler
from pathlib import Path

from lab.config import document, loading, records
from lab.config.registry import Catalogue, Figure, imported
from lab.config.schema import Config
from lab.system.command import (
    DEFAULT_CONFIG_FILE,
    Parser,
    console_log,
    exit_code,
    folder_name,
    print_lines,
)

log = logging.getLogger("spurious.main")


def run(config: Config, command: list[str], early_log: MemoryHandler, resume=None) -> None:
    """The pipeline. Raises `UserError` for what the user can fix.

    resume: a `resuming.Resumption` for a run that continues. Of the processes of
    torchrun all train, and the first one does the rest.
    """
    # Imported here: `--help` and configuration errors need not wait for torch.
    from lab.system import devices, distributed

    device = distributed.own_device(devices.choose_device(config.device))
    from lab.runs import resuming, silent, starting, trackers

    with distributed.process_group(device):
        splits, network, facts = None, None, {}
        started = time.perf_counter()
        if resume is None or resume.phase != "plots":
            splits, network, facts = distributed.together(lambda: _load(config, device))
        seconds = time.perf_counter() - started

        def opened():
            if distributed.rank() > 0:
                return None
            if resume:
                return resuming.resume(resume, device, command)
            return starting.start(config, device, command, facts)

        results = distributed.together(opened)
        folder = distributed.from_first(results and results.folder)
        with results or silent.Silent(folder) as results:
            results.keep_log(early_log)
            if results.leads:
                results.add_tracker(trackers.start_wandb(config, folder, results.id))
                results.add_tracker(trackers.start_tensorboard(config, folder))
            diverged = None
            if splits:
                results.time("loading", seconds)
                results.save_data(splits.count_rows(), splits.samples)
                diverged = _learn(config, splits.to(device), network.to(device), results)
            if results.leads:
                import plotting  # with matplotlib, slow to import

                with results.timed("plots"):
                    further = config.catalogue.of(Figure).values()
                    further = [figure for figure in further if figure.plugin]
                    results.images(plotting.draw(folder, further=further))
            if diverged:
                print_lines(f"Results: {folder}", stream="stdout")
                raise diverged
            results.enter("done")
    if results.leads:
        print_lines(f"Results: {folder}", stream="stdout")


def _load(config: Config, device: str):
    """(splits, the network for them, where they and their features come from)."""
    import data_loader
    from lab.networks import building
    from lab.retraining import dfr

    extractor = None
    if config.use_feature_extractor:
        from lab.features import (
            extraction as feature_extractor,  # with torchvision or timm, slow to import
        )

        extractor = feature_extractor.Extractor(config, device)
    splits = data_loader.load(config)
    if extractor:
        splits = extractor.extract(splits)
    if config.use_dfr:
        dfr.check(splits, config.dfr_solver)
    network = building.build_for(config, splits)  # here, because it may miss its weights
    return splits, network, {"data": splits.facts, "features": extractor and extractor.facts}


def _learn(config: Config, splits, network, results):
    """Train, then retrain; returns the `Diverged` that ended it, or None."""
    from lab.retraining import dfr
    from lab.training import checkpoints, loop, recording

    if config.method.stage:
        splits = imported(config.method.stage)(splits, config, results)
    try:
        summaries, best = loop.train(network, splits, config, results)
    except recording.Diverged as error:
        return error
    results.conclude("", summaries)
    if best:
        results.conclude("best_", best["summaries"], best["epoch"])
    results.enter("DFR")
    if config.use_dfr and results.leads:
        if config.dfr_network == "best":
            checkpoints.load_network(network, results.folder, "best", splits.fingerprint())
        with results.timed("DFR"):
            head, retrained = dfr.retrain(network, splits, config)
            dfr.save(results.folder, head, retrained, splits.group_names)
        results.conclude("dfr_", retrained["after"])
    results.enter("plots")
    return None


def main(argv: list[str] | None = None) -> int:
    """Run one experiment from command-line arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def experiment() -> None:
        arguments = _parser().parse_args(argv)
        if arguments.help:
            keys = document.help_text(_records_for_help(arguments))
            usage = _parser().format_help() + "\nKeys, with their defaults:\n"
            print_lines(usage, keys, stream="stdout")
            return
        resume = None
        if arguments.resume:
            from lab.runs import resuming
            from lab.runs import run as run_folder

            folder = Path(arguments.resume)
            resume = resuming.load_to_resume(folder, arguments.config, arguments.overrides)
            config = resume.config
            if resume.phase == "done":
                print_lines(f"{folder}: finished already, nothing to do", stream="stdout")
                return
        else:
            file = arguments.config or DEFAULT_CONFIG_FILE
            config = loading.load_config(file, arguments.overrides, trust_plugins=True)
        with console_log() as early_log:
            for note in config.notes:
                log.info("%s", note)
            if config.ignored:
                log.info("Given, but without effect here: %s", "; ".join(config.ignored))
            try:
                run(config, ["main.py", *argv], early_log, resume)
            except BaseException as error:
                if resume:
                    run_folder.add_advice(error, resume.folder)
                raise

    return exit_code(experiment)


def _records_for_help(arguments) -> Catalogue:
    """The records whose keys `--help` lists: with plugins, if the configuration names any."""
    file, overrides = arguments.config or DEFAULT_CONFIG_FILE, arguments.overrides
    if not Path(file).exists() and not arguments.config:
        return records.BUILT_IN
    settings, _ = loading.read(file, overrides)
    return loading.catalogue(settings, file, overrides, trust_plugins=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python main.py",
        description="Train a network on data with a spurious correlation, analyse it, retrain it.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show every key and stop")
    parser.add_argument(
        "--resume",
        type=folder_name,
        metavar="FOLDER",
        help="continue an interrupted run, results/<run>",
    )
    parser.add_config_arguments()
    return parser


if __name__ == "__main__":
    sys.exit(main())
