"""Checks across keys: combinations of settings that are not allowed, from the facts of the records.

What only one data set or method checks belongs to its record, see `lab.config.rules`.
"""

from collections.abc import Iterator

from lab.config import defaults
from lab.config.keys import PAIRS
from lab.config.registry import (
    Analysis,
    Backbone,
    Catalogue,
    Chosen,
    Loss,
    Method,
    Network,
)
from lab.config.strict_yaml import show
from lab.splits import groups


class _Wrong(Exception):
    """A check needs a key whose value is wrong by itself."""


class Values(Chosen):
    """Settings as attributes; reading one that is wrong by itself ends the check that reads it."""

    def __init__(self, values: dict, catalogue: Catalogue):
        self._values, self.catalogue = values, catalogue

    def __getattr__(self, name: str):
        if name not in self._values:
            raise _Wrong
        return self._values[name]


def chosen_first(values: dict, catalogue: Catalogue) -> dict:
    """{key: what its `auto` or null stands for}, of the keys that checks read."""
    chosen: dict = {}
    for name, value in defaults.FIRST.items():
        if name in values and defaults.is_unset(name, values[name]):
            try:
                chosen[name] = value(Values(values | chosen, catalogue))
            except _Wrong:  # it follows from a key whose value is wrong by itself
                del values[name]
    return chosen


def problems(c: Values) -> list[str]:
    """One line for every combination of values that is not allowed."""
    found: list[str] = []
    for check in CHECKS:
        try:
            for line in check(c):
                found.append(line)
        except _Wrong:
            continue
    return found


def _names(catalogue: Catalogue, kind, fact) -> str:
    """The records of a kind with a fact, for what a message allows."""
    return ", ".join(name for name, record in catalogue.of(kind).items() if fact(record))


def _check_data_set(c) -> Iterator[str]:
    yield from c.data_set.checks(c)


def _check_moments(c, split: str) -> Iterator[str]:
    if not c.data_set.drawn_to_moments:
        return
    moments = ("label_marginal", "attribute_marginal", "correlation")
    y_mean, a_mean, cov = (getattr(c, f"{split}_{moment}") for moment in moments)
    shares = groups.probabilities(y_mean, a_mean, cov)
    worst = min(range(4), key=lambda g: shares[g])
    if shares[worst] < -1e-9:
        low = max(-(1 + y_mean) * (1 + a_mean), -(1 - y_mean) * (1 - a_mean))
        high = min((1 + y_mean) * (1 - a_mean), (1 - y_mean) * (1 + a_mean))
        yield (
            f"{split}_correlation: given {cov:g}, which makes the probability of group "
            f"{groups.name(worst)} negative ({shares[worst]:.4g}); allowed with label marginal "
            f"{y_mean:g} and attribute marginal {a_mean:g}: {low:.4g} to {high:.4g}"
        )


def _check_train_moments(c) -> Iterator[str]:
    yield from _check_moments(c, "train")


def _check_test_moments(c) -> Iterator[str]:
    yield from _check_moments(c, "test")


def _check_strategy(c) -> Iterator[str]:
    data_set, strategy = c.data_set, c.dfr_val_split_strategy
    has = {"original": data_set.official_validation, "target": bool(data_set.target_size)}
    what = {"original": "official validation set", "target": "target set"}
    if not has.get(strategy, True):
        allowed = ["split_from_train", *(name for name in has if has[name])]
        yield (
            f"dfr_val_split_strategy: given {strategy}, but {data_set.described} has no "
            f"{what[strategy]}; allowed: {', '.join(allowed)}"
        )


def _check_several_tasks(c) -> Iterator[str]:
    if c.data_set.tasks == 1:
        return
    if not c.method.several_tasks:
        allowed = _names(c.catalogue, Method, lambda method: method.several_tasks)
        yield f"debias_method: given {c.debias_method}; allowed with several tasks: {allowed}"
    if c.loss.class_outputs:
        allowed = _names(c.catalogue, Loss, lambda loss: not loss.class_outputs)
        yield f"loss_function: given {c.loss_function}; allowed with several tasks: {allowed}"
    if c.use_dfr:
        yield "use_dfr: given true; allowed with several tasks: false"
    if c.train_batch_size is None:
        yield "train_batch_size: given null; allowed with several tasks: a whole number"


def _check_task_weights(c) -> Iterator[str]:
    number = c.data_set.tasks
    if number == 1:
        return
    weights = c.task_weights
    ones = weights is None or all(w == 1 for w in weights)
    if weights is not None and (
        len(weights) != number or not (ones or abs(sum(weights) - 1) <= 1e-6)
    ):
        yield (
            f"task_weights: given {show(weights)}; allowed: null, or {number} weights, all 1 or "
            "adding up to 1"
        )
    elif not ones and c.loss_balanced_task_weighting:
        yield (
            f"task_weights: given {show(weights)}; allowed with loss_balanced_task_weighting: all 1"
        )
    if c.task_weighting != "delta":
        return
    if not ones or c.loss_balanced_task_weighting:
        yield (
            "task_weighting: given delta, which makes the weights; allowed with task_weights or "
            "loss_balanced_task_weighting: fixed"
        )
    if getattr(c, c.data_set.validation_size) == 0:
        yield (
            f"{c.data_set.validation_size}: given 0, but task_weighting: delta needs validation "
            "data"
        )
    if not c.data_set.four_groups:
        yield "groupings: task_weighting: delta needs one shortcut attribute for each task"


def _check_loss(c) -> Iterator[str]:
    if c.data_set.class_indices and not c.loss.class_outputs:
        allowed = _names(c.catalogue, Loss, lambda loss: loss.class_outputs)
        yield (
            f"loss_function: given {c.loss_function}, but the labels of {c.dataset_name} are "
            f"classes here; allowed: {allowed}"
        )


def wanted(c, record: Analysis) -> bool:
    """Whether the master switch `analyses` asks for an analysis."""
    chosen = c.analyses
    if isinstance(chosen, str):
        return chosen == "all" or (chosen == "standard" and record.standard)
    return record.name in chosen


def _check_analyses(c) -> Iterator[str]:
    known = c.catalogue.of(Analysis)
    given = c.analyses if isinstance(c.analyses, list) else []
    unknown = [name for name in given if name not in known]
    if unknown:
        yield (
            f"analyses: given {', '.join(unknown)}; allowed: standard, all, none, or a list of "
            f"{', '.join(known)}"
        )
    refused: dict[str, list[str]] = {}
    for name, record in known.items():
        explicit = getattr(c, record.switch)
        named = f"analyses: [{name}]" if name in given and explicit is None else ""
        asked = record.switch if explicit else named
        if asked and (reason := record.applies(c)):
            refused.setdefault(reason, []).append(asked)
    for reason, names in refused.items():
        yield (
            f"{', '.join(names)}: given true, but these analyses need a scalar output and four "
            f"groups; allowed with {reason}: false, null"
        )


def _check_side(c) -> Iterator[str]:
    side = c.data_set.side
    if side and c.use_feature_extractor and getattr(c, side) != 224:
        yield (
            f"{side}: given {getattr(c, side)}, but feature extractors take pictures of 224 "
            "pixels; allowed with use_feature_extractor: 224"
        )


def _check_inputs(c) -> Iterator[str]:
    if c.use_feature_extractor and c.data_set.inputs != "pictures":
        yield (
            f"use_feature_extractor: given true, which takes pictures, but {c.dataset_name} has "
            f"{c.data_set.inputs}; allowed: false"
        )
    if not c.network.pictures:
        return
    if c.use_feature_extractor:
        allowed = _names(c.catalogue, Network, lambda network: not network.pictures)
        yield (
            f"model_name: given {c.model_name}, which takes pictures, with "
            f"use_feature_extractor: true; allowed: {allowed}, or use_feature_extractor: false"
        )
    if c.data_set.inputs != "pictures":
        allowed = _names(c.catalogue, Network, lambda network: not network.pictures)
        yield (
            f"model_name: given {c.model_name}, which takes pictures, but {c.dataset_name} has "
            f"{c.data_set.inputs}; allowed: {allowed}"
        )


def _check_layer(c) -> Iterator[str]:
    layer = c.dfr_target_layer
    if not c.use_dfr or layer == "last_hidden":
        return
    number, depth = int(layer.removeprefix("layer_")), c.network.depth
    if c.dfr_solver == "sgd":
        yield (
            f"dfr_target_layer: given {layer}, but dfr_solver: sgd retrains the last layer; "
            "allowed: last_hidden"
        )
    elif not depth and number > 0:
        yield (
            f"dfr_target_layer: given {layer}, but the layers of a {c.model_name} have no "
            "numbers; allowed: last_hidden, layer_0"
        )
    elif depth and number > getattr(c, depth):
        yield (
            f"dfr_target_layer: given {layer}, but the network has {getattr(c, depth)} "
            f"hidden layer(s); allowed: last_hidden, layer_0 to layer_{getattr(c, depth)}"
        )


def _check_method(c) -> Iterator[str]:
    method, data_set = c.method, c.data_set
    name = f"debias_method: given {c.debias_method}"
    if method.needs_target:
        why = None if data_set.target_size else f"{data_set.described} has none"
        if data_set.target_size and not getattr(c, data_set.target_size):
            why = f"{data_set.target_size} is 0"
        if why:
            yield f"{name}, which trains on a target set, but {why}"
    if c.optimizer not in method.optimizers:
        yield (
            f"optimizer: given {c.optimizer}; allowed with debias_method {c.debias_method}: "
            f"{', '.join(method.optimizers)}"
        )
    if method.mini_batches and c.train_batch_size is None:
        yield (
            "train_batch_size: given null; allowed with debias_method "
            f"{c.debias_method}: a whole number"
        )
    yield from method.checks(c)


def _check_network(c) -> Iterator[str]:
    yield from c.network.checks(c)


def _check_batch_norm(c) -> Iterator[str]:
    if c.network.batch_norm and c.group_batches == "full":
        yield (
            f"group_batches: given full, but {c.model_name} has batch norm, which needs the "
            "groups mixed; allowed: mini, null"
        )
    if c.network.batch_norm and c.train_batch_size is None:
        yield (
            f"train_batch_size: given null, which is the full batch at once for the batch norm of "
            f"{c.model_name}; allowed: a whole number"
        )


def _check_early_stopping(c) -> Iterator[str]:
    patience, size = c.early_stopping_patience, c.data_set.validation_size
    if patience and getattr(c, size) == 0:
        yield (
            f"early_stopping_patience: given {patience}, which needs the validation loss, but "
            f"{size} is 0; allowed: null, or {size} above 0"
        )


def _check_best(c) -> Iterator[str]:
    size = c.data_set.validation_size
    if c.use_dfr and c.dfr_network == "best" and getattr(c, size) == 0:
        yield (
            f"dfr_network: given best, which validation data choose, but {size} is 0; allowed: last"
        )


def _check_ratio(c) -> Iterator[str]:
    split_off = c.dfr_val_split_strategy == "split_from_train"
    if c.use_dfr and split_off and not c.dfr_val_ratio and not c.data_set.retrains_on_train:
        yield "dfr_val_ratio: given 0, which leaves DFR no data; allowed: above 0, below 1"


def _check_backbone(c) -> Iterator[str]:
    name = c.feature_extractor_model_name
    backbone = c.catalogue.of(Backbone).get(name)
    if not c.use_feature_extractor or backbone is None:
        return
    block, count = c.feature_extractor_vit_target_block, backbone.blocks
    if count and not -count <= block < count:
        yield (
            f"feature_extractor_vit_target_block: given {block}, but {name} has {count} blocks; "
            f"allowed: 0 to {count - 1}, or -{count} to -1"
        )
    size = c.feature_extractor_resnet_pooling_output_size
    layer = c.feature_extractor_resnet_intermediate_layer
    side = (backbone.maps or {}).get(layer)
    if side and size > side:
        yield (
            f"feature_extractor_resnet_pooling_output_size: given {size}, but {layer} has maps of "
            f"{side} × {side}; allowed: 1 to {side}"
        )


def _check_pairs(c) -> Iterator[str]:
    for name, record in c.catalogue.of(Analysis).items():
        for pair in getattr(c, name).group_pairs if record.pairs else ():
            if pair[0] == pair[1] or 0 in pair[0] + pair[1]:
                yield f"{name}.group_pairs: given {show(pair)}; allowed: {PAIRS}"


CHECKS = (
    _check_train_moments,
    _check_test_moments,
    _check_strategy,
    _check_data_set,
    _check_several_tasks,
    _check_task_weights,
    _check_side,
    _check_loss,
    _check_analyses,
    _check_inputs,
    _check_layer,
    _check_method,
    _check_batch_norm,
    _check_early_stopping,
    _check_best,
    _check_ratio,
    _check_backbone,
    _check_pairs,
    _check_network,
)
