"""One experiment: load → train (with analyses) → DFR → plots.

    python main.py [--config FILE] [key=value ...]

Exit codes: 0 done; 2 what you can fix (configuration, data), one line a problem; 1 anything
else; 130 or 143 interrupted.
"""

import logging
import sys
import time
from logging.handlers import MemoryHandler

import config as configuration
from command import Parser, console_log, exit_code, termination_as_exception
from config import Config

log = logging.getLogger("spurious.main")


def run(config: Config, command: list[str], early_log: MemoryHandler) -> None:
    """The pipeline. Raises `UserError` for what the user can fix."""
    # Imported here: `--help` and configuration errors need not wait for torch.
    import model

    device, extractor = model.choose_device(config.device), None
    import data_loader
    import dfr
    import plotting
    import tracking
    import trainer

    start = time.perf_counter()
    if config.use_feature_extractor:
        import feature_extractor  # with torchvision or timm, slow to import

        extractor = feature_extractor.Extractor(config, device)
    splits = data_loader.load(config)
    if extractor:
        splits = extractor.extract(splits)
    if config.use_dfr:
        dfr.check(splits)
    loading = time.perf_counter() - start

    with tracking.start(config, device, command, extractor and extractor.facts) as results:
        results.time("loading", loading)
        results.keep_log(early_log)
        results.save_data(splits.count_rows(), splits.samples)
        results.add_tracker(tracking.start_wandb(config, results.folder))

        splits = splits.to(device)
        network = model.build(config, splits.train.inputs.shape[1:]).to(device)
        diverged = None
        try:
            summaries = trainer.train(network, splits, config, results)
            results.conclude("", summaries)
        except trainer.Diverged as error:
            diverged = error
        if config.use_dfr and not diverged:
            with results.timed("DFR"):
                head, retrained = dfr.retrain(network, splits, config)
                dfr.save(results.folder, head, retrained, splits.group_names)
            results.conclude("dfr_", retrained["after"])
        with results.timed("plots"):
            results.images(plotting.draw(results.folder))

        print(f"Results: {results.folder}", flush=True)
        if diverged:
            raise diverged
        results.failed = False


def main(argv: list[str] | None = None) -> int:
    """Run one experiment from command-line arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def experiment() -> None:
        arguments = _parser().parse_args(argv)
        if arguments.help:
            print(_parser().format_help() + "\nKeys, with their defaults:\n")
            print(configuration.help_text())
            return
        config = configuration.load_config(arguments.config, arguments.overrides)
        with console_log() as early_log, termination_as_exception():
            if config.ignored:
                log.info("Given, but without effect here: %s", "; ".join(config.ignored))
            run(config, ["main.py", *argv], early_log)

    return exit_code(experiment)


def _parser() -> Parser:
    parser = Parser(
        prog="python main.py",
        description="Train a network on data with a spurious correlation, analyse it, retrain it.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show every key and stop")
    parser.add_config_arguments()
    return parser


if __name__ == "__main__":
    sys.exit(main())
