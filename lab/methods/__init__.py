"""Training methods: each file holds what differs from ERM and nothing else.

A method says what a step follows: with which weights w_g the full batch moves the parameters,
dθ/dt = -Σ w_g ∇R_g, and which loss a mini-batch has. A new method is one file with a subclass of
`ERM` and one line here.
"""

from lab.methods.erm import ERM, ERMTarget
from lab.methods.group_dro import GroupDRO
from lab.methods.importance_weighting import IWUniform
from lab.methods.jtt import JTT
from lab.methods.rebalancing import RWG, RWY, SUBG, SUBY
from lab.methods.scale import SCALE

METHODS = {
    "None": ERM,
    "IW_uniform": IWUniform,
    "GroupDRO": GroupDRO,
    "RWY": RWY,
    "RWG": RWG,
    "SUBY": SUBY,
    "SUBG": SUBG,
    "JTT": JTT,
    "ERM_target": ERMTarget,
    "SCALE": SCALE,
}


def build(config, splits) -> ERM:
    """The configured method for these splits. Raises `DataError` if they do not suit it."""
    return METHODS[config.debias_method](config, splits)
