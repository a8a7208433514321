"""Which attributes are shortcuts for which: one ERM network an attribute, and δ of every pair.

    python spurious_matrix.py --config FILE [key=value ...]             all attributes
    python spurious_matrix.py --config FILE --task NAME [key=value ...] one network, as main.py runs
    python spurious_matrix.py --collect FOLDER ...                      of networks trained so
    python spurious_matrix.py --resume FOLDER                           continue, or draw again

The tables are made in `lab/matrix/tables.py`, networks on features are trained all at once by
`lab/matrix/heads.py`, those on pictures are runs of `main.py`. Exit codes are those of main.py.
"""

import sys

import main as experiment
from lab.matrix import tables


def main(argv: list[str] | None = None) -> int:
    """Run the command from its arguments; returns the exit code."""
    return tables.main(experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
