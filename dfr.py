"""Command of lab/retraining/head.py."""

import sys

from lab.retraining.head import main

if __name__ == "__main__":
    sys.exit(main())
