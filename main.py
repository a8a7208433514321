"""One experiment: load → train (with analyses) → DFR → plots.

    python main.py [--config FILE] [key=value ...]

Exit codes: 0 done; 2 what you can fix (configuration, data), one line a problem; 1 anything
else; 130 or 143 interrupted.
"""

import argparse
import logging
import signal
import sys
import threading
from contextlib import contextmanager
from logging.handlers import MemoryHandler

import config as configuration
from config import Config, ConfigError, UserError

log = logging.getLogger("spurious.main")


def run(config: Config, command: list[str], early_log: MemoryHandler) -> None:
    """The pipeline. Raises `UserError` for what the user can fix."""
    # Imported here: `--help` and configuration errors need not wait for torch.
    import data_loader
    import dfr
    import model
    import plotting
    import tracking
    import trainer

    device = model.choose_device(config.device)
    splits = data_loader.load(config)
    if config.use_dfr:
        dfr.check(splits)

    with tracking.start(config, device, command) as results:
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
    try:
        arguments = _parser().parse_args(argv)
        if arguments.help:
            print(_parser().format_help() + "\nKeys, with their defaults:\n")
            print(configuration.help_text())
            return 0
        config = configuration.load_config(arguments.config, arguments.overrides)
        with _console_log() as early_log, _termination_as_exception():
            if config.ignored:
                log.info("Given, but without effect here: %s", "; ".join(config.ignored))
            run(config, ["main.py", *argv], early_log)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except _Terminated:
        print("Terminated.", file=sys.stderr)
        return 143
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"command line: {message}; see python main.py --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python main.py",
        description="Train a network on data with a spurious correlation, analyse it, retrain it.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show every key and stop")
    parser.add_argument(
        "--config", default="config.yaml", metavar="FILE", help="settings (default: config.yaml)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the file's"
    )
    return parser


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _termination_as_exception():
    """SIGTERM unwinds like Ctrl-C, so that tables and trackers are closed."""

    def terminate(signum, frame):
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _console_log():
    """Log lines on standard error; yields a handler that keeps the lines for `run.log`."""
    root = logging.getLogger("spurious")
    console, memory = logging.StreamHandler(), MemoryHandler(10_000, logging.CRITICAL + 1)
    console.setLevel(logging.INFO)
    root.setLevel(logging.DEBUG)
    root.propagate = False
    root.addHandler(console)
    root.addHandler(memory)
    try:
        yield memory
    finally:
        root.removeHandler(console)
        root.removeHandler(memory)


if __name__ == "__main__":
    sys.exit(main())
