"""Data sets: each file makes group-structured splits of a source's material."""

from lab.splits import checking
from lab.system.errors import DataError


def load(config):
    """The `lab.splits.splits.Splits` that the configuration asks for, on the CPU.

    Raises `DataError` when the data are missing, damaged, too few, or not as `Splits` have to be.
    """
    record = config.data_set
    splits = record.load()(config)
    problems = list(checking.problems(splits, record.inputs))
    if problems:
        where = f" ({record.plugin})" if record.plugin else ""
        raise DataError(*(f"dataset_name: {record.name}{where}: {line}" for line in problems))
    return splits
