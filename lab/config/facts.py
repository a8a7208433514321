"""Facts of the records as tuples, until their users take the records."""

from lab.config.records import BUILT_IN
from lab.config.registry import Analysis, Backbone, DataSet, Method, Network
from lab.config.rules import CELEBA_PARTS, DOMINOES_PARTS, DOMINOES_PICTURES  # noqa: F401

ANALYSES = tuple(BUILT_IN.of(Analysis))
BATCH_NORM = tuple(n for n, r in BUILT_IN.of(Network).items() if r.batch_norm)
END_TO_END = tuple(n for n, r in BUILT_IN.of(Network).items() if r.pictures)
RESNETS = BATCH_NORM
VIT_BLOCKS = {n: r.blocks for n, r in BUILT_IN.of(Backbone).items() if r.blocks}
FULL_BATCH_METHODS = tuple(n for n, r in BUILT_IN.of(Method).items() if r.weights_groups)
SEVERAL_TASKS_METHODS = tuple(n for n, r in BUILT_IN.of(Method).items() if r.several_tasks)
HAS_OFFICIAL_VALIDATION = {n: r.official_validation for n, r in BUILT_IN.of(DataSet).items()}
