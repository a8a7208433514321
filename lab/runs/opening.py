"""Opening a finished run: its configuration, and its network with the data, from its folder."""

from pathlib import Path

from lab.config import loading
from lab.config.schema import Config
from lab.system.errors import ConfigError

CONFIG = "config_used.yaml"


def run_config(folder: Path, overrides=(), option: str = "--run") -> Config:
    """The configuration of a run. Its plugins are imported only where `overrides` repeat them.

    option: of the command line, for the `ConfigError` where the folder has no configuration.
    """
    used = folder / CONFIG
    if not used.is_file():
        raise ConfigError(f"{option}: given {folder}, but there is no {used}")
    return loading.load_config(used, list(overrides))


def load_network(folder: Path, config: Config):
    """(network, splits) of a run, on the device: of its last or best epoch, see `dfr_network`.

    Raises `DataError` when the data are not the run's.
    """
    from lab import data_sets as data_loader
    from lab.networks import building
    from lab.system import devices
    from lab.training import checkpoints

    device = devices.choose_device(config.device)
    splits = data_loader.load(config)
    if config.use_feature_extractor:
        from lab.features import extraction as feature_extractor

        splits = feature_extractor.Extractor(config, device).extract(splits)
    network = building.build_for(config, splits)
    checkpoints.load_network(network, folder, config.dfr_network, splits.fingerprint())
    return network.to(device), splits.to(device)
