"""The analyses of a run: what the gradient flow does to the gap between groups.

All of them follow from one small Gram matrix of the groups' gradients and mean Jacobians, for which
a checkpoint costs one forward and one backward pass (`lab/analyses/gram.py`, the formulas in
`lab/analyses/quantities.py`, what is measured when in `lab/analyses/measuring.py`):

- `gradient_basis`: norms and cosines of the gradients' Walsh-Hadamard transform;
- `gap_dynamics_factors`: the gap's time derivative, split by what causes it;
- `jacobian_norm`: norms and angles of the groups' mean Jacobians;
- `static_dynamic_decomposition`: the same derivative in static and dynamic parts;
- `model_output_expectation`: mean and deviation of the output per group;
- one of your own: a record of a plugin, see docs/extending.md.

`analyses` in the configuration chooses which are made. Heat maps of pictures (`lab/analyses/
gradcam.py`) are made afterwards, by `python plotting.py results/<run> --gradcam`.
"""

from lab.analyses.gram import gram_matrix, labels
from lab.analyses.measuring import Analyses, View
from lab.analyses.quantities import (
    gap_dynamics_factors,
    gradient_basis,
    jacobian_norm,
    model_output_expectation,
    static_dynamic_decomposition,
)

__all__ = [
    "Analyses",
    "View",
    "gap_dynamics_factors",
    "gradient_basis",
    "gram_matrix",
    "jacobian_norm",
    "labels",
    "model_output_expectation",
    "static_dynamic_decomposition",
]
