"""The data: `load(config)` gives the group-structured splits of the configured data set.

Each data set is one file in `lab/data_sets/`, which makes splits of what a source in
`lab/data_sets/sources/` reads: ColoredMNIST, WaterBirds, Dominoes, CelebA, SpuriousMNIST, or one
of your own (a record of a plugin, see docs/extending.md). A split holds inputs, labels y and
attributes a, stored group by group; small data are tensors, pictures are decoded batch by batch
when they are used. `Splits` has train and test, and where they exist val, target, dfr and further
evaluation sets.
"""

from lab.data_sets import load
from lab.splits.splits import Split, Splits

__all__ = ["Split", "Splits", "load"]
