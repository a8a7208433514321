"""Features of pictures from a frozen backbone, written once to a cache, without training.

    python feature_extractor.py [--config FILE] [key=value ...]     extract
    python feature_extractor.py --list                              what is in the cache
    python feature_extractor.py --prune [all]                       remove leftovers, or all
    torchrun --nproc_per_node=N feature_extractor.py --config FILE  share the work

`lab/features/backbones.py` has the backbones as functions from pictures to features,
`lab/features/cache.py` the files in `features_cache/`, `lab/features/extraction.py` the work.
"""

import logging
import sys
from pathlib import Path

from lab import data_sets
from lab.config.loading import load_config
from lab.config.schema import Config
from lab.features import cache
from lab.features.extraction import Extractor, unwritable
from lab.system import devices, distributed
from lab.system.command import DEFAULT_CONFIG_FILE, Parser, console_log, exit_code, print_lines
from lab.system.errors import ConfigError

__all__ = ["Extractor", "main"]

log = logging.getLogger("spurious.feature_extractor")


def main(argv: list[str] | None = None) -> int:
    """Extract, list or prune from command-line arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def extraction() -> None:
        arguments = _parser().parse_args(argv)
        if "=" in (arguments.prune or ""):  # `--prune key=value` is an override
            arguments.overrides.insert(0, arguments.prune)
            arguments.prune = "leftovers"
        if arguments.prune not in (None, "leftovers", "all"):
            raise ConfigError(
                f"--prune: given {arguments.prune!r}; allowed: nothing (leftovers), all"
            )
        overrides = arguments.overrides
        if not any(text.startswith("use_feature_extractor=") for text in overrides):
            overrides = [*overrides, "use_feature_extractor=true"]
        config = load_config(arguments.config or DEFAULT_CONFIG_FILE, overrides)
        folder = Path(config.features_cache_dir)
        if arguments.list or arguments.prune:
            try:
                lines = (
                    cache.listing(folder)
                    if arguments.list
                    else cache.prune(folder, arguments.prune == "all") or ["nothing to remove"]
                )
            except OSError as error:
                raise unwritable(folder, error) from None
            print_lines(*lines, stream="stdout")
            return
        if not config.use_feature_extractor:
            raise ConfigError(
                "use_feature_extractor: given false; allowed to extract features: true"
            )
        with console_log(), distributed.process_group():
            _run(config)

    return exit_code(extraction)


def _parser() -> Parser:
    parser = Parser(
        prog="python feature_extractor.py",
        description="Extract features of pictures into the cache, without training.",
    )
    parser.add_config_arguments()
    parser.add_argument("--list", action="store_true", help="show what is in the cache")
    parser.add_argument(
        "--prune",
        nargs="?",
        const="leftovers",
        metavar="all",
        help="remove damaged files and what interrupted runs left; all = everything",
    )
    return parser


def _run(config: Config) -> None:
    device = distributed.own_device(devices.choose_device(config.device))
    extractor = Extractor(config, device)
    extractor.extract(data_sets.load(config))
    for name, file in extractor.facts["files"].items():
        log.info("%-6s %s", name, file)


if __name__ == "__main__":
    sys.exit(main())
