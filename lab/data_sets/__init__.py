"""Data sets: each file makes group-structured splits of a source's material."""


def load(config):
    """The `lab.splits.splits.Splits` that the configuration asks for, on the CPU.

    Raises `DataError` when the data are missing, damaged, or too few.
    """
    return config.data_set.load()(config)
