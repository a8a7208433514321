"""What the configuration checks across keys, and which keys have an effect with which others."""

from lab.config.facts import (
    ANALYSES,
    BATCH_NORM,
    CELEBA_PARTS,
    DOMINOES_PARTS,
    DOMINOES_PICTURES,
    DRAWN_TO_MOMENTS,
    END_TO_END,
    FULL_BATCH_METHODS,
    HAS_OFFICIAL_VALIDATION,
    HAS_TARGET,
    RESNET_MAPS,
    RESNETS,
    SEVERAL_TASKS_METHODS,
    TARGET_METHODS,
    VIT_BLOCKS,
)
from lab.config.strict_yaml import show
from lab.splits import groups
from lab.system import memory

PAIRS = "a list of pairs of different groups, each [[y, a], [y, a]] with -1 or 1"


class _Wrong(Exception):
    """A check needs a key whose value is wrong by itself."""


class Values(dict):
    """Keys with their values; reading one that is wrong by itself ends the check that reads it."""

    def __missing__(self, name):
        raise _Wrong


def problems(values: Values) -> list[str]:
    """One line for every combination of values that is not allowed."""
    found = []
    for check in CHECKS:
        try:
            found += list(check(values))
        except _Wrong:
            continue
    return found


def _drawn_to_moments(dataset: str, dominoes_classes: str) -> bool:
    """Whether the groups are drawn to the configured moments."""
    return dataset in DRAWN_TO_MOMENTS and (dataset != "Dominoes" or dominoes_classes == "binary")


def _check_moments(c, split):
    if not _drawn_to_moments(c["dataset_name"], c["dominoes_classes"]):
        return
    y_mean, a_mean = c[f"{split}_label_marginal"], c[f"{split}_attribute_marginal"]
    cov = c[f"{split}_correlation"]
    worst = min(range(4), key=lambda g: groups.probabilities(y_mean, a_mean, cov)[g])
    lowest = groups.probabilities(y_mean, a_mean, cov)[worst]
    if lowest < -1e-9:
        low = max(-(1 + y_mean) * (1 + a_mean), -(1 - y_mean) * (1 - a_mean))
        high = min((1 + y_mean) * (1 - a_mean), (1 - y_mean) * (1 + a_mean))
        yield (
            f"{split}_correlation: given {cov:g}, which makes the probability of group "
            f"{groups.name(worst)} negative ({lowest:.4g}); allowed with label marginal "
            f"{y_mean:g} and attribute marginal {a_mean:g}: {low:.4g} to {high:.4g}"
        )


def _moments_keys(split):
    return [
        f"{split}_{moment}" for moment in ("correlation", "label_marginal", "attribute_marginal")
    ]


def _celeba_splits(c) -> str:
    """`celeba_splits`, or what null stands for."""
    return c["celeba_splits"] or ("drawn" if c["debias_method"] in TARGET_METHODS else "official")


def _no_target(c) -> str | None:
    """Why the data have no target set, if they have none."""
    if c["dataset_name"] not in HAS_TARGET:
        return f"{c['dataset_name']} has none"
    if c["dataset_name"] == "CelebA" and _celeba_splits(c) != "drawn":
        return "celeba_splits: official has none"
    return None if c["val_target_size"] else "val_target_size is 0"


def _check_strategy(c):
    dataset, strategy = c["dataset_name"], c["dfr_val_split_strategy"]
    has = {
        "original": HAS_OFFICIAL_VALIDATION[dataset],
        "target": dataset == "Dominoes" or (dataset == "CelebA" and _celeba_splits(c) == "drawn"),
    }
    what = {"original": "official validation set", "target": "target set"}
    if not has.get(strategy, True):
        allowed = ["split_from_train", *(name for name in has if has[name])]
        with_these = " with celeba_splits: official" if dataset == "CelebA" else ""
        yield (
            f"dfr_val_split_strategy: given {strategy}, but {dataset} has no {what[strategy]}"
            f"{with_these}; allowed: {', '.join(allowed)}"
        )


def _check_target_size(c):
    dataset, size = c["dataset_name"], c["val_target_size"]
    if dataset == "CelebA" and _celeba_splits(c) == "drawn":
        parts, more, below = CELEBA_PARTS, "", ""
        wrong = size % parts
    elif dataset == "Dominoes":
        classes = c["dominoes_classes"]
        parts, there = DOMINOES_PARTS[classes], DOMINOES_PICTURES[classes]
        wrong = size % parts or size >= there
        more, below = f" with dominoes_classes {classes}", f" below {there}"
    else:
        return
    if wrong:
        yield f"val_target_size: given {size}; allowed{more}: multiples of {parts} from 0{below}"
    elif c["use_dfr"] and c["dfr_val_split_strategy"] == "target" and not size:
        yield (
            "val_target_size: given 0, but dfr_val_split_strategy: target needs a target set; "
            f"allowed: multiples of {parts} above 0{',' if below else ''}{below}"
        )


def _check_groupings(c):
    if c["dataset_name"] != "CelebA":
        return
    labels = []
    for text in c["groupings"]:
        label, _, shortcuts = text.partition(":")
        names = [label, *shortcuts.split(",")]
        labels.append(label)
        if len(set(names)) < len(names):
            yield f"groupings: given {text}, in which an attribute is there twice"
    if len(set(labels)) < len(labels):
        yield "groupings: given two tasks with the same label; allowed: different ones"
    single = len(c["groupings"]) == 1 and "," not in c["groupings"][0]
    if _celeba_splits(c) == "drawn" and not single:
        yield (
            f"groupings: given {show(c['groupings'])}; allowed with drawn splits: one task with "
            "one shortcut"
        )
    if _celeba_splits(c) == "drawn" and not c["spurious_strength"]:
        yield "spurious_strength: given 0; allowed with drawn splits of CelebA: above 0, up to 1"


def _several_tasks(c) -> bool:
    return c["dataset_name"] == "CelebA" and len(c["groupings"]) > 1


def _check_several_tasks(c):
    if not _several_tasks(c):
        return
    if c["debias_method"] not in SEVERAL_TASKS_METHODS:
        yield (
            f"debias_method: given {c['debias_method']}; allowed with several tasks: "
            f"{', '.join(SEVERAL_TASKS_METHODS)}"
        )
    if c["loss_function"] == "cross_entropy":
        yield "loss_function: given cross_entropy; allowed with several tasks: logistic, mse"
    if c["use_dfr"]:
        yield "use_dfr: given true; allowed with several tasks: false"
    if c["train_batch_size"] is None:
        yield "train_batch_size: given null; allowed with several tasks: a whole number"
    if c["debias_method"] == "JTT" and c["jtt_join"] == "task" and c["num_val_samples"] == 0:
        yield "num_val_samples: given 0, but jtt_join: task needs validation data"


def _check_task_weights(c):
    weights, number = c["task_weights"], len(c["groupings"])
    if not _several_tasks(c):
        return
    ones = weights is None or all(w == 1 for w in weights)
    if weights is not None and (
        len(weights) != number or not (ones or abs(sum(weights) - 1) <= 1e-6)
    ):
        yield (
            f"task_weights: given {show(weights)}; allowed: null, or {number} weights, all 1 or "
            "adding up to 1"
        )
    elif not ones and c["loss_balanced_task_weighting"]:
        yield (
            f"task_weights: given {show(weights)}; allowed with loss_balanced_task_weighting: all 1"
        )
    if c["task_weighting"] != "delta":
        return
    if not ones or c["loss_balanced_task_weighting"]:
        yield (
            "task_weighting: given delta, which makes the weights; allowed with task_weights or "
            "loss_balanced_task_weighting: fixed"
        )
    if c["num_val_samples"] == 0:
        yield "num_val_samples: given 0, but task_weighting: delta needs validation data"
    if any("," in text for text in c["groupings"]):
        yield "groupings: task_weighting: delta needs one shortcut attribute for each task"


def _check_loss(c):
    dataset = c["dataset_name"]
    ten = dataset == "Dominoes" and c["dominoes_classes"] == "ten"
    if (ten or dataset == "SpuriousMNIST") and c["loss_function"] != "cross_entropy":
        why = "dominoes_classes: ten has ten classes" if ten else f"{dataset} has classes"
        yield f"loss_function: given {c['loss_function']}, but {why}; allowed: cross_entropy"


def _check_labels(c):
    labels = c["labels"]
    if len(set(labels)) < len(labels):
        yield f"labels: given {show(labels)}; allowed: a list of 2 to 10 different digits"


def _check_features(c, name):
    unknown = [label for label in c[name] or {} if int(label) not in c["labels"]]
    if unknown:
        yield (
            f"{name}: given for {', '.join(unknown)}; allowed: the labels, "
            f"{', '.join(map(str, c['labels']))}"
        )


def _check_scalar(c):
    asked = [name for name in _analyze_keys() if c[name]]
    reason = None
    if c["loss_function"] == "cross_entropy":
        reason = "loss_function cross_entropy"
    elif _several_tasks(c):
        reason = "several tasks"
    elif c["dataset_name"] == "CelebA" and "," in "".join(c["groupings"]):
        reason = "more than one shortcut attribute"
    if reason and asked:
        yield (
            f"{', '.join(asked)}: given true, but the analyses need a scalar output and four "
            f"groups; allowed with {reason}: false"
        )


def _check_image_size(c):
    key = {"Dominoes": "image_size", "CelebA": "target_resolution"}.get(c["dataset_name"])
    if key and c["use_feature_extractor"] and c[key] != 224:
        yield (
            f"{key}: given {c[key]}, but feature extractors take pictures of 224 pixels; allowed "
            "with use_feature_extractor: 224"
        )


def _check_layer(c):
    layer, name = c["dfr_target_layer"], c["model_name"]
    if not c["use_dfr"] or layer == "last_hidden":
        return
    if c["dfr_solver"] == "sgd":
        yield (
            f"dfr_target_layer: given {layer}, but dfr_solver: sgd retrains the last layer; "
            "allowed: last_hidden"
        )
        return
    if name in END_TO_END and int(layer[6:]) > 0:
        yield (
            f"dfr_target_layer: given {layer}, but the layers of a {name} have no numbers; "
            "allowed: last_hidden, layer_0"
        )
    if name == "MLP" and int(layer[6:]) > c["num_hidden_layers"]:
        yield (
            f"dfr_target_layer: given {layer}, but the network has {c['num_hidden_layers']} "
            f"hidden layer(s); allowed: last_hidden, layer_0 to layer_{c['num_hidden_layers']}"
        )


def _check_inputs(c):
    if c["model_name"] in END_TO_END and c["use_feature_extractor"]:
        yield (
            f"model_name: given {c['model_name']}, which takes pictures, with "
            "use_feature_extractor: true; allowed: MLP, or use_feature_extractor: false"
        )


def _check_method(c):
    method, why = c["debias_method"], _no_target(c)
    if method in TARGET_METHODS and why:
        yield f"debias_method: given {method}, which trains on a target set, but {why}"
    if method == "SCALE" and c["optimizer"] != "SGD":
        yield f"optimizer: given {c['optimizer']}; allowed with debias_method SCALE: SGD"
    if method == "SCALE" and c["train_batch_size"] is None:
        yield "train_batch_size: given null; allowed with debias_method SCALE: a whole number"


def _check_batch_norm(c):
    if c["model_name"] in BATCH_NORM and c["group_batches"] == "full":
        yield (
            f"group_batches: given full, but {c['model_name']} has batch norm, which needs the "
            "groups mixed; allowed: mini, null"
        )
    if c["model_name"] in BATCH_NORM and c["train_batch_size"] is None:
        yield (
            f"train_batch_size: given null, which is the full batch at once for the batch norm of "
            f"{c['model_name']}; allowed: a whole number"
        )


def _validation_key(dataset: str) -> str:
    return "val_target_size" if dataset == "Dominoes" else "num_val_samples"


def _check_early_stopping(c):
    patience, val = c["early_stopping_patience"], _validation_key(c["dataset_name"])
    if patience and c[val] == 0:
        yield (
            f"early_stopping_patience: given {patience}, which goes by the validation loss, but "
            f"{val} is 0; allowed: null, or {val} above 0"
        )


def _check_best(c):
    val = _validation_key(c["dataset_name"])
    if c["use_dfr"] and c["dfr_network"] == "best" and c[val] == 0:
        yield (
            f"dfr_network: given best, which validation data tell, but {val} is 0; allowed: last"
        )


def _reuses_train(dataset: str, dfr_reuse_train: bool) -> bool:
    """Whether DFR's data are those of training, so that nothing is set aside."""
    return dataset == "SpuriousMNIST" and dfr_reuse_train


def _check_ratio(c):
    if (
        c["use_dfr"]
        and c["dfr_val_split_strategy"] == "split_from_train"
        and not c["dfr_val_ratio"]
        and not _reuses_train(c["dataset_name"], c["dfr_reuse_train"])
    ):
        yield "dfr_val_ratio: given 0, which leaves DFR no data; allowed: above 0, below 1"


def _check_block(c):
    name, block = c["feature_extractor_model_name"], c["feature_extractor_vit_target_block"]
    count = VIT_BLOCKS.get(name)
    if c["use_feature_extractor"] and count and not -count <= block < count:
        yield (
            f"feature_extractor_vit_target_block: given {block}, but {name} has {count} blocks; "
            f"allowed: 0 to {count - 1}, or -{count} to -1"
        )


def _check_pooling(c):
    layer = c["feature_extractor_resnet_intermediate_layer"]
    size = c["feature_extractor_resnet_pooling_output_size"]
    uses_layer = c["feature_extractor_model_name"] in RESNETS and layer in RESNET_MAPS
    if c["use_feature_extractor"] and uses_layer and size > RESNET_MAPS[layer]:
        side = RESNET_MAPS[layer]
        yield (
            f"feature_extractor_resnet_pooling_output_size: given {size}, but {layer} has maps of "
            f"{side} × {side}; allowed: 1 to {side}"
        )


def _check_pairs(c, section):
    for pair in c[section].group_pairs:
        if pair[0] == pair[1] or 0 in pair[0] + pair[1]:
            yield f"{section}.group_pairs: given {show(pair)}; allowed: {PAIRS}"


def _analyze_keys() -> list[str]:
    return [f"analyze_{name}" for name in ANALYSES]


def _check_memory(c):
    there = memory.available()
    width, depth = c["hidden_dim"], c["num_hidden_layers"]
    needed = memory.training_bytes((depth - 1) * width**2, c["optimizer"], c["momentum"])
    if c["model_name"] == "MLP" and c["device"] != "cuda" and there and needed > there:
        yield (
            f"hidden_dim, num_hidden_layers: given {width}, {depth}, which is at least "
            f"{memory.shown(needed)} for parameters, gradients and optimizer, but "
            f"{memory.shown(there)} are there; allowed: less"
        )


CHECKS = [
    lambda c: _check_moments(c, "train"),
    lambda c: _check_moments(c, "test"),
    _check_strategy,
    _check_target_size,
    _check_groupings,
    _check_several_tasks,
    _check_task_weights,
    _check_image_size,
    _check_loss,
    _check_labels,
    lambda c: _check_features(c, "spurious_features"),
    lambda c: _check_features(c, "opposite_spurious_features"),
    lambda c: _check_features(c, "dfr_spurious_features"),
    _check_scalar,
    _check_inputs,
    _check_layer,
    _check_method,
    _check_batch_norm,
    _check_early_stopping,
    _check_best,
    _check_ratio,
    _check_block,
    _check_pooling,
    lambda c: _check_pairs(c, "gap_dynamics_factors"),
    lambda c: _check_pairs(c, "static_dynamic_decomposition"),
    _check_memory,
]


def _has_tasks(c) -> bool:
    return c.dataset_name == "CelebA" and len(c.groupings) > 1


def _is_drawn(c) -> bool:
    return c.dataset_name == "CelebA" and c.celeba_splits == "drawn"


# Keys that only some settings use: (condition under which they count, why they do not, keys).
EFFECT = [
    (
        lambda c: c.dataset_name not in ("WaterBirds", "CelebA"),
        "only for data sets of digits",
        ["mnist_source"],
    ),
    (
        lambda c: c.dataset_name == "SpuriousMNIST",
        "only for SpuriousMNIST",
        [
            "labels",
            "spurious_features",
            "only_spurious",
            "opposite_spurious_features",
            "dfr_spurious_features",
            "dfr_reuse_train",
        ],
    ),
    (lambda c: c.dataset_name != "SpuriousMNIST", "digits are grey", ["use_grayscale"]),
    (
        lambda c: c.dataset_name == "Dominoes",
        "only for Dominoes",
        ["dominoes_classes", "image_size"],
    ),
    (
        lambda c: c.dataset_name == "CelebA",
        "only for CelebA",
        ["groupings", "celeba_splits", "target_resolution"],
    ),
    (_is_drawn, "only for CelebA's drawn splits", ["celeba_majority_samples"]),
    (
        lambda c: c.dataset_name == "Dominoes" or _is_drawn(c),
        "only for Dominoes and CelebA's drawn splits",
        ["val_target_size"],
    ),
    (
        lambda c: (c.dataset_name == "Dominoes" and c.dominoes_classes == "ten") or _is_drawn(c),
        "only for Dominoes with dominoes_classes: ten and CelebA's drawn splits",
        ["spurious_strength"],
    ),
    (
        lambda c: not _is_drawn(c),
        "the drawn splits take it from celeba_majority_samples",
        ["num_train_samples"],
    ),
    (
        lambda c: c.dataset_name in ("Dominoes", "CelebA") and not c.use_feature_extractor,
        "only for Dominoes and CelebA without a feature extractor",
        ["data_augmentation"],
    ),
    (
        lambda c: c.dataset_name != "Dominoes",
        "Dominoes takes it from val_target_size",
        ["num_val_samples"],
    ),
    (
        lambda c: c.dataset_name not in ("WaterBirds", "CelebA"),
        "the data set comes with its groups",
        _moments_keys("train") + _moments_keys("test"),
    ),
    (
        lambda c: c.dataset_name != "SpuriousMNIST",
        "SpuriousMNIST has the groups of spurious_features",
        _moments_keys("train") + _moments_keys("test"),
    ),
    (
        lambda c: c.dataset_name != "Dominoes" or c.dominoes_classes == "binary",
        "ten classes are paired by spurious_strength",
        _moments_keys("train") + _moments_keys("test"),
    ),
    (
        lambda c: c.dataset_name in ("WaterBirds", "CelebA"),
        "only for WaterBirds and CelebA",
        ["on_bad_image"],
    ),
    (
        lambda c: c.dataset_name in ("WaterBirds", "CelebA") and not _is_drawn(c),
        "only for the official splits of WaterBirds and CelebA",
        ["remove_minority_groups_train"],
    ),
    (
        lambda c: c.dfr_val_split_strategy == "split_from_train",
        "only for split_from_train",
        ["dfr_val_ratio"],
    ),
    (
        lambda c: not _reuses_train(c.dataset_name, c.dfr_reuse_train),
        "with dfr_reuse_train nothing is set aside",
        ["dfr_val_ratio"],
    ),
    (lambda c: c.debias_method == "GroupDRO", "only for GroupDRO", ["dro_eta_q"]),
    (lambda c: c.debias_method == "JTT", "only for JTT", ["jtt_lambda_up", "jtt_error_set"]),
    (
        lambda c: c.debias_method == "JTT" and _has_tasks(c),
        "only for JTT with several tasks",
        ["jtt_join"],
    ),
    (
        _has_tasks,
        "only for several tasks",
        ["task_weights", "loss_balanced_task_weighting", "task_weighting"],
    ),
    (
        lambda c: _has_tasks(c) and c.loss_balanced_task_weighting,
        "only with loss_balanced_task_weighting",
        ["lbtw_alpha"],
    ),
    (
        lambda c: c.debias_method == "JTT" and c.jtt_error_set is None,
        "only for JTT without jtt_error_set",
        ["jtt_epochs", "jtt_learning_rate", "jtt_weight_decay"],
    ),
    (
        lambda c: getattr(c, _validation_key(c.dataset_name)) != 0,
        "without validation data",
        ["best_epoch_by"],
    ),
    (lambda c: c.optimizer == "SGD", "only for SGD", ["momentum"]),
    (
        lambda c: c.debias_method not in FULL_BATCH_METHODS or c.group_batches == "mini",
        "the method takes the full batch",
        ["train_batch_size"],
    ),
    (
        lambda c: c.debias_method in FULL_BATCH_METHODS,
        "only for IW_uniform and GroupDRO",
        ["group_batches"],
    ),
    (lambda c: c.debias_method == "SCALE", "only for SCALE", ["scale_group_size", "scale_mode"]),
    (lambda c: c.model_name != "MLP", "not for an MLP", ["mixed_precision"]),
    (
        lambda c: c.model_name == "MLP",
        "only for an MLP",
        [
            "initialization_method",
            "activation_function",
            "num_hidden_layers",
            "hidden_dim",
            "use_skip_connections",
            "use_bias",
            "use_zero_bias_initialization",
        ],
    ),
    (
        lambda c: c.model_name != "MLP" or c.use_bias,
        "without use_bias",
        ["use_zero_bias_initialization"],
    ),
    (lambda c: c.model_name == "ConvNet", "only for a ConvNet", ["latent_size"]),
    (
        lambda c: c.model_name in RESNETS,
        "only for ResNet18 or ResNet50 as model_name",
        ["pretrained", "pretrained_weights"],
    ),
    (
        lambda c: c.model_name not in RESNETS or c.pretrained,
        "without pretrained",
        ["pretrained_weights"],
    ),
    (
        lambda c: c.use_feature_extractor,
        "without use_feature_extractor",
        [
            "feature_extractor_model_name",
            "feature_extractor_weights",
            "feature_extractor_precision",
            "feature_extractor_batch_size",
            "features_cache_dir",
        ],
    ),
    (
        lambda c: c.use_feature_extractor and c.feature_extractor_model_name not in RESNETS,
        "only for a ViT as feature extractor",
        ["feature_extractor_vit_target_block", "feature_extractor_vit_aggregation_mode"],
    ),
    (
        lambda c: c.use_feature_extractor and c.feature_extractor_model_name in RESNETS,
        "only for ResNet18 or ResNet50 as feature extractor",
        ["feature_extractor_resnet_intermediate_layer"],
    ),
    (
        lambda c: (
            c.use_feature_extractor
            and c.feature_extractor_model_name in RESNETS
            and c.feature_extractor_resnet_intermediate_layer != "avgpool"
        ),
        "only for layer1 to layer4 of a ResNet as feature extractor",
        ["feature_extractor_resnet_pooling_output_size"],
    ),
    (
        lambda c: c.use_dfr,
        "without use_dfr",
        [
            "dfr_network",
            "dfr_target_layer",
            "dfr_balance",
            "dfr_standardize",
            "dfr_solver",
            "dfr_reg",
            "dfr_num_retrains",
            "dfr_num_workers",
        ],
    ),
    (
        lambda c: not c.use_dfr or c.dfr_solver == "sklearn",
        "only for dfr_solver: sklearn",
        ["dfr_reg", "dfr_c_options", "dfr_num_retrains", "dfr_num_workers"],
    ),
    (
        lambda c: c.use_dfr and c.dfr_solver == "sgd",
        "only for dfr_solver: sgd",
        [
            "dfr_sgd_epochs",
            "dfr_sgd_learning_rate",
            "dfr_sgd_batch_size",
            "dfr_sgd_patience",
        ],
    ),
    (
        lambda c: not c.use_dfr or c.dfr_solver == "sgd" or c.dfr_balance,
        "without dfr_balance there is one fit",
        ["dfr_num_retrains"],
    ),
    (
        lambda c: c.use_dfr and (c.dfr_solver == "sgd" or c.dfr_reg != "none"),
        "no penalty to choose",
        ["dfr_c_options"],
    ),
]


def without_effect(config, given) -> list[str]:
    """Given keys that count for nothing here, one entry a reason: `a, b (only for SCALE)`."""
    lines = []
    for counts, reason, keys in EFFECT:
        idle = [name for name in keys if name in given]
        if idle and not counts(config):
            lines.append(f"{', '.join(idle)} ({reason})")
    for analysis in ANALYSES:
        name = f"{analysis}_analysis_epochs"
        late = [epoch for epoch in getattr(config, name) or [] if epoch > config.epochs]
        if late:
            shown = ", ".join(map(str, late[:5])) + (", …" if len(late) > 5 else "")
            lines.append(f"{name}: {shown} (beyond epochs = {config.epochs})")
    return lines
