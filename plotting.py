"""Command of lab/figures/history.py."""

import sys

from lab.figures.history import main

if __name__ == "__main__":
    sys.exit(main())
