"""Command of lab/matrix/tables.py."""

import sys

from lab.matrix.tables import main

if __name__ == "__main__":
    sys.exit(main())
