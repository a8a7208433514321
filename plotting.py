"""The figures of a run, drawn from its saved tables into `results/<run>/plots/`.

    python plotting.py results/<run> [--format png|svg] [--gradcam]

Over the epochs (`training_history.csv`):
    training_history: average, adjusted and worst-group loss and accuracy of every split
    group_curves: loss and accuracy of every group; of many groups, of majority and minority
    group_accuracies: of many groups, the test accuracy of each at the last epoch
    evaluation_sets: worst-group and average accuracy on further evaluation sets
    gaps: loss and accuracy of one group minus another's
    misclassification: error rate of every group, and its share of all errors

Analyses (`analysis.csv`):
    gradient_basis: norms of the four basis gradients, cosines between them
    gap_dynamics_factors: time derivative of the loss gap, split by what causes it
    static_dynamic_decomposition: the same, split into static and dynamic parts
    jacobian_norm: mean Jacobians of the groups
    model_output_expectation: mean and deviation of the output in every group
    scale: cosine of training and target gradient, tensor × epoch

Other files:
    dfr: accuracies before and after retraining the last layer (`dfr_results.json`)
    samples: training pictures of every group (`samples.npz`)
    gradcam: where the network looks, before and after retraining (`gradcam.npz`)

A figure without its table is not drawn. Only `--gradcam` needs the run's network and data: it
first computes the table of the last figure. Exit codes are those of main.py.
"""

import argparse
import sys
from pathlib import Path

from lab.config import loading, plugins
from lab.config.registry import Figure
from lab.figures.drawing import FORMATS, draw, without_figure
from lab.system.command import Parser, exit_code, folder_name, print_lines
from lab.system.errors import ConfigError, UserError


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of a run again and print their paths; returns the exit code."""

    def command() -> None:
        given = _parser().parse_args(argv)
        try:
            if given.gradcam:
                from lab.runs.explaining import explain  # with torch and the networks

                explain(Path(given.folder))
            further = _further(given)
            paths = draw(given.folder, given.format, further)
            print_lines(*map(str, paths), stream="stdout")
            if names := without_figure(given.folder, further):
                print_lines(
                    f"Not drawn: {', '.join(names)}; its figure comes from a plugin: repeat "
                    "plugins=[…]"
                )
        except OSError as error:  # such as a file in the place of the folder for plots
            raise UserError(str(error)) from error

    return exit_code(command)


def _further(given) -> list[Figure]:
    """The figures of the plugins that the command line names: `plugins=[…]`."""
    settings: dict = {}
    problems = loading.apply_overrides(settings, given.overrides)
    problems += [f"{name}: allowed here: plugins=[…]" for name in settings if name != "plugins"]
    if problems:
        raise ConfigError(*problems)
    plugins.resolve(settings, Path.cwd())
    return [r for r in plugins.imported(plugins.named(settings)) if isinstance(r, Figure)]


def _parser() -> Parser:
    parser = Parser(
        prog="python plotting.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=folder_name, help="results/<run>")
    parser.add_argument(
        "overrides", nargs="*", metavar="plugins=[FILE, …]", help="plugins with further figures"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: the run's plot_format")
    parser.add_argument(
        "--gradcam",
        action="store_true",
        help="first find out where the network looks, from the run's checkpoint and data",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
