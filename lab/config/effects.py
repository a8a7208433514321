"""Which keys have an effect with which others, so that idle ones can be named in the log.

Keys that only some records use are idle with other records. The rest are conditions on common keys.
"""

from lab.config.keys import When
from lab.config.registry import Analysis, Backbone, Record
from lab.config.schema import Config


def _resnet(c) -> bool:
    backbone = c.catalogue.of(Backbone).get(c.feature_extractor_model_name)
    return backbone is not None and bool(backbone.maps)


def _takes_full_batch(c) -> bool:
    return c.method.weights_groups and c.group_batches == "full"


# Common keys that only some settings use.
CONDITIONS: list[tuple[When, tuple[str, ...]]] = [
    (
        When(
            "only for dfr_val_split_strategy: split_from_train",
            lambda c: c.dfr_val_split_strategy == "split_from_train",
        ),
        ("dfr_val_ratio",),
    ),
    (
        When(
            "with dfr_reuse_train nothing is set aside",
            lambda c: not c.data_set.retrains_on_train,
        ),
        ("dfr_val_ratio",),
    ),
    (
        When("only with several tasks", lambda c: c.data_set.tasks > 1),
        ("task_weights", "loss_balanced_task_weighting", "task_weighting"),
    ),
    (
        When(
            "only with loss_balanced_task_weighting and several tasks",
            lambda c: c.data_set.tasks > 1 and c.loss_balanced_task_weighting,
        ),
        ("lbtw_alpha",),
    ),
    (
        When(
            "without validation data",
            lambda c: getattr(c, c.data_set.validation_size) != 0,
        ),
        ("best_epoch_by",),
    ),
    (When("only for SGD", lambda c: c.optimizer == "SGD"), ("momentum",)),
    (
        When("the method takes the full batch", lambda c: not _takes_full_batch(c)),
        ("train_batch_size",),
    ),
    (
        When("without use_feature_extractor", lambda c: c.use_feature_extractor),
        (
            "feature_extractor_model_name", "feature_extractor_weights",
            "feature_extractor_precision", "feature_extractor_batch_size", "features_cache_dir",
        ),
    ),
    (
        When(
            "only for a ViT as feature extractor",
            lambda c: c.use_feature_extractor and not _resnet(c),
        ),
        ("feature_extractor_vit_target_block", "feature_extractor_vit_aggregation_mode"),
    ),
    (
        When(
            "only for a ResNet as feature extractor",
            lambda c: c.use_feature_extractor and _resnet(c),
        ),
        ("feature_extractor_resnet_intermediate_layer",),
    ),
    (
        When(
            "only for layer1 to layer4 of a ResNet as feature extractor",
            lambda c: (
                c.use_feature_extractor
                and _resnet(c)
                and c.feature_extractor_resnet_intermediate_layer != "avgpool"
            ),
        ),
        ("feature_extractor_resnet_pooling_output_size",),
    ),
    (
        When("without use_dfr", lambda c: c.use_dfr),
        (
            "dfr_network", "dfr_target_layer", "dfr_balance", "dfr_standardize", "dfr_solver",
            "dfr_reg", "dfr_num_retrains", "dfr_num_workers",
        ),
    ),
    (
        When(
            "only for dfr_solver: sklearn", lambda c: not c.use_dfr or c.dfr_solver == "sklearn"
        ),
        ("dfr_reg", "dfr_c_options", "dfr_num_retrains", "dfr_num_workers"),
    ),
    (
        When("only for dfr_solver: sgd", lambda c: c.use_dfr and c.dfr_solver == "sgd"),
        ("dfr_sgd_epochs", "dfr_sgd_learning_rate", "dfr_sgd_batch_size", "dfr_sgd_patience"),
    ),
    (
        When(
            "without dfr_balance there is one fit",
            lambda c: not c.use_dfr or c.dfr_solver == "sgd" or c.dfr_balance,
        ),
        ("dfr_num_retrains",),
    ),
    (
        When(
            "no penalty to choose",
            lambda c: c.use_dfr and (c.dfr_solver == "sgd" or c.dfr_reg != "none"),
        ),
        ("dfr_c_options",),
    ),
]  # fmt: skip


def has_effect(config: Config, name: str) -> bool:
    """Whether a key has an effect with these settings."""
    return not without_effect(config, [name])


def without_effect(config: Config, given) -> list[str]:
    """Given keys without effect here, one entry a reason: `a, b (only for SCALE)`."""
    idle: dict[str, list[str]] = {}
    for name, (kind, users) in config.catalogue.users.items():
        selects = kind.selected_by and kind is not Analysis
        if name in given and selects and (reason := _unused(config, kind, users)):
            idle.setdefault(reason, []).append(name)
    for when, names in CONDITIONS:
        found = [name for name in names if name in given]
        if found and not when.holds(config):
            idle.setdefault(when.otherwise, []).extend(found)
    return [f"{', '.join(names)} ({reason})" for reason, names in idle.items()] + _late(config)


def _unused(config: Config, kind: type[Record], users: dict[str, When | None]) -> str:
    """Why the configured record of a kind does not use a key; "" if it does."""
    selected = getattr(config, kind.selected_by)
    if selected not in users:
        return f"only for {', '.join(users)}"
    when = users[selected]
    return "" if when is None or when.holds(config) else when.otherwise


def _late(config: Config) -> list[str]:
    """Analyses' epochs beyond the last one."""
    lines = []
    for record in config.catalogue.of(Analysis).values():
        late = [epoch for epoch in getattr(config, record.epochs) or [] if epoch > config.epochs]
        if late:
            shown = ", ".join(map(str, late[:5])) + (", …" if len(late) > 5 else "")
            lines.append(f"{record.epochs}: {shown} (beyond epochs = {config.epochs})")
    return lines
