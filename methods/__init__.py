"""Training methods: each file holds what differs from ERM and nothing else.

A method says with which weights w_g its flow moves the parameters, dθ/dt = -Σ w_g ∇R_g. A new
method is one file with a subclass of `ERM` and one line here.
"""

from methods.erm import ERM
from methods.group_dro import GroupDRO
from methods.importance_weighting import IWUniform

METHODS = {"None": ERM, "IW_uniform": IWUniform, "GroupDRO": GroupDRO}


def build(config, counts) -> ERM:
    """The configured method for a training split with these group counts."""
    return METHODS[config.debias_method](config, counts)
