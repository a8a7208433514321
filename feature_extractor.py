"""Features of pictures from a frozen backbone, written once to a cache, without training.

    python feature_extractor.py [--config FILE] [key=value ...]     extract
    python feature_extractor.py --list                              what is in the cache
    python feature_extractor.py --prune [all]                       remove leftovers, or all
    torchrun --nproc_per_node=N feature_extractor.py --config FILE  share the work

`lab/features/backbones.py` has the backbones as functions from pictures to features,
`lab/features/cache.py` the files in `features_cache/`, `lab/features/extraction.py` the work.
"""

import sys

from lab.features.extraction import Extractor, main

__all__ = ["Extractor", "main"]

if __name__ == "__main__":
    sys.exit(main())
