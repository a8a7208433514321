"""Command of lab/features/extraction.py."""

import sys

from lab.features.extraction import main

if __name__ == "__main__":
    sys.exit(main())
