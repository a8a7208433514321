"""Opening a finished run from its folder: what every command that looks at a run shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lab.config import loading
from lab.config.schema import Config
from lab.folders import reading
from lab.folders.creating import CONFIG
from lab.folders.status import read_status
from lab.system.errors import ConfigError


@dataclass
class OpenedRun:
    """A run's folder: configuration, tables, data and network, each read when it is first used.

    Splits and networks are on the device of the configuration (`device`).
    """

    folder: Path
    config: Config

    @cached_property
    def tables(self) -> reading.RunTables:
        """The saved tables. Raises `UnreadableRun`."""
        return reading.read_run(self.folder)

    @cached_property
    def status(self) -> dict:
        """The content of `status.json`. Raises `UserError`."""
        return read_status(self.folder)

    @cached_property
    def device(self) -> str:
        """The device of `device` in the configuration, such as `cpu` or `cuda:0`."""
        from lab.system import devices

        return devices.choose_device(self.config.device)

    @cached_property
    def data(self):
        """The run's data set as loaded, `splits.Splits` on the CPU."""
        from lab import data_sets

        return data_sets.load(self.config)

    @cached_property
    def _inputs(self):
        if not self.config.use_feature_extractor:
            return self.data
        from lab.features import extraction  # with torchvision or timm, slow to import

        return extraction.Extractor(self.config, self.device).extract(self.data)

    @cached_property
    def splits(self):
        """What the network was trained on: `data`, features in place of pictures if extracted."""
        return self._inputs.to(self.device)

    def network(self, epoch: str | None = None):
        """The trained network. epoch: `last`, `best`, or None for what `dfr_network` says.

        Raises `DataError` when the data are not those that the run was trained on.
        """
        from lab.networks import building
        from lab.training import checkpoints

        network = building.build_for(self.config, self._inputs)
        which = epoch or self.config.dfr_network
        checkpoints.load_network(network, self.folder, which, self._inputs.fingerprint())
        return network.to(self.device)


def open_run(folder: Path, overrides: Sequence[str] = (), option: str = "--run") -> OpenedRun:
    """A run's folder, opened. Its plugins are imported only where `overrides` repeat them.

    option: of the command line, for the `ConfigError` where the folder has no configuration.
    """
    used = Path(folder) / CONFIG
    if not used.is_file():
        raise ConfigError(f"{option}: given {folder}, but {used} does not exist")
    return OpenedRun(Path(folder), loading.load_config(used, list(overrides)))
