"""Data sets: each file makes group-structured splits of a source's material."""

from lab.config.schema import Config
from lab.splits.splits import Splits


def load(config: Config) -> Splits:
    """The splits that the configuration asks for, on the CPU.

    Raises `DataError` when the data are missing, damaged, or too few.
    """
    from lab.data_sets import celeba, colored_mnist, dominoes, spurious_mnist, waterbirds

    loaders = {
        "ColoredMNIST": colored_mnist.load,
        "WaterBirds": waterbirds.load,
        "Dominoes": dominoes.load,
        "CelebA": celeba.load,
        "SpuriousMNIST": spurious_mnist.load,
    }
    return loaders[config.dataset_name](config)
