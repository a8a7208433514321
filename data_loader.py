"""The data: `load(config)` gives the splits of the configured data set."""

from lab.data_sets import load

__all__ = ["load"]
