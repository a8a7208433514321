"""The one entry point to the data: `load(config)` gives the splits of the configured data set.

A new data set is one file in `data_sets/` whose `load(config)` returns `Splits`, and one line here.
"""

from config import Config
from data_sets import colored_mnist, dominoes, spurious_mnist, waterbirds
from splits import Splits

DATASETS = {
    "ColoredMNIST": colored_mnist.load,
    "WaterBirds": waterbirds.load,
    "Dominoes": dominoes.load,
    "SpuriousMNIST": spurious_mnist.load,
}


def load(config: Config) -> Splits:
    """The splits that the configuration asks for, on the CPU.

    Raises `DataError` when the data are missing, damaged, or too few.
    """
    return DATASETS[config.dataset_name](config)
