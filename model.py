"""The networks: which there are, and how the configured one is built.

`build_for(config, splits)` gives the network that `model_name` names, for the pictures or features
and the labels of these splits, initialised from the seed. Each network has `hidden(x, layer)`, its
features, and `classifier`, the linear layer behind them, whose outputs `forward` gives.

- `MLP` (`lab/networks/mlp.py`): in the maximal-update (muP) or neural-tangent (NTP)
  parametrisation, on flattened pictures or on features of a frozen backbone;
- `ConvNet`, `ResNet18`, `ResNet50` (`lab/networks/picture_nets.py`): end to end on pictures; where
  pretrained weights come from is in `lab/networks/weights.py`;
- one of your own: a record of a plugin, see docs/extending.md.

`lab/networks/building.py` builds them and gives the optimiser its groups of parameters.
"""

from lab.networks.building import build, build_for, fresh_classifier, parameter_groups
from lab.networks.mlp import MLP
from lab.networks.picture_nets import PictureNet

__all__ = ["MLP", "PictureNet", "build", "build_for", "fresh_classifier", "parameter_groups"]
