"""The built-in records: one for each data set, network, method, loss, analysis, figure, backbone.

What a record may hold is said in `lab.config.registry`. To add one of your own without touching
this file, give a list `RECORDS` in a plugin file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from lab.config import rules
from lab.config.keys import (
    SPURIOUS_FEATURES,
    Count,
    Decay,
    Rate,
    SpuriousFeatures,
    Text,
    When,
    own,
)
from lab.config.registry import (
    Analysis,
    Backbone,
    Catalogue,
    DataSet,
    Figure,
    Loss,
    Method,
    Network,
    Record,
    everything,
)

SIZES = ("num_train_samples", "num_val_samples", "num_test_samples")
MOMENTS = tuple(
    f"{split}_{moment}"
    for split in ("train", "test")
    for moment in ("correlation", "label_marginal", "attribute_marginal")
)
WORD = "[A-Za-z0-9_]{1,100}"
Grouping = Annotated[str, StringConstraints(pattern=rf"^{WORD}:{WORD}(,{WORD}){{0,5}}$")]
Groupings = Annotated[list[Grouping], Field(min_length=1, max_length=100)]
Labels = Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=2, max_length=10)]

binary = When("not with dominoes_classes: ten", lambda c: c.dominoes_classes == "binary")
ten = When("not with dominoes_classes: binary", lambda c: c.dominoes_classes == "ten")
drawn = When("only with celeba_splits: drawn", rules.are_drawn)
official = When("not with celeba_splits: drawn", lambda c: not rules.are_drawn(c))
on_pictures = When("not with use_feature_extractor", lambda c: not c.use_feature_extractor)

DATA_SETS = [
    DataSet(
        "ColoredMNIST",
        "MNIST digits; y = +1 for digits from 5 on, a = +1 red, -1 green",
        code="lab.data_sets.colored_mnist:load",
        experiment="colored_mnist",
        drawn_to_moments=True,
        sizes=rules.mnist_sizes,
        uses=("mnist_source", *SIZES, *MOMENTS, "use_grayscale"),
    ),
    DataSet(
        "WaterBirds",
        "photographs of birds; y = +1 waterbird, a = +1 water behind it",
        code="lab.data_sets.waterbirds:load",
        experiment="waterbirds",
        official_validation=True,
        sizes=everything,
        uses=(*SIZES, "use_grayscale", "on_bad_image", "remove_minority_groups_train"),
    ),
    DataSet(
        "Dominoes",
        "an MNIST digit, the shortcut, above a CIFAR-10 picture, the label",
        code="lab.data_sets.dominoes:load",
        experiment="dominoes",
        sizes=rules.mnist_sizes,
        target_size="val_target_size",
        validation_size="val_target_size",
        side="image_size",
        at=lambda c: {
            "class_indices": c.dominoes_classes == "ten",
            "drawn_to_moments": c.dominoes_classes == "binary",
            "standardised": c.image_size == 32,
        },
        checks=rules.check_dominoes,
        keys={
            "dominoes_classes": own(
                Literal["binary", "ten"], "binary",
                "binary = automobile or truck below a 0 or 1, ten = CIFAR-10's classes below any "
                "digit",
            ),
            "image_size": own(
                Literal[32, 224], 32,
                "32 = 64 rows of 32 pixels, 224 = 224 × 224, as feature extractors take them",
            ),
            "dominoes_normalization": own(
                Literal["exact", "published"], "exact",
                "deviation that channels are divided by without normalize_inputs: exact = that of "
                "CIFAR-10's pixels, published = 0.2023, 0.1994, 0.2010",
                when=When(
                    "only without normalize_inputs, at image_size 32",
                    lambda c: not c.normalize_inputs and c.image_size == 32,
                ),
            ),
        },
        uses=(
            "mnist_source", "num_train_samples", "num_test_samples", "val_target_size",
            ("spurious_strength", ten), *((name, binary) for name in MOMENTS), "use_grayscale",
            ("data_augmentation", on_pictures),
        ),
    ),
    DataSet(
        "CelebA",
        "faces with 40 binary attributes, any of them as label and as shortcuts",
        code="lab.data_sets.celeba:load",
        experiment="celeba",
        official_validation=True,
        sizes=everything,
        side="target_resolution",
        any_task=True,
        standardised=True,
        at=rules.celeba_at,
        resolve=lambda c: {"celeba_splits": rules.celeba_splits(c)},
        checks=rules.check_celeba,
        keys={
            "groupings": own(
                Groupings, ["Blond_Hair:Male"],
                "tasks on CelebA, each label:shortcut or label:shortcut,shortcut",
                "a list of label:shortcut or label:shortcut,shortcut,… with names of attributes",
            ),
            "celeba_splits": own(
                Literal["official", "drawn"] | None, None,
                "official = CelebA's three splits, drawn = training, target and test sets drawn to "
                "spurious_strength; null = drawn for methods that need a target set",
            ),
            "celeba_majority_samples": own(
                Count, 10_000, "training faces of each majority group of the drawn splits",
                when=drawn,
            ),
            "target_resolution": own(int, 224, "side of CelebA's faces", ge=8, le=512),
        },
        uses=(
            ("num_train_samples", official), "num_val_samples", "num_test_samples",
            ("val_target_size", drawn), ("spurious_strength", drawn), "use_grayscale",
            "on_bad_image", ("remove_minority_groups_train", official),
            ("data_augmentation", on_pictures),
        ),
    ),
    DataSet(
        "SpuriousMNIST",
        "MNIST digits with squares and lines drawn on them, each digit a class",
        code="lab.data_sets.spurious_mnist:load",
        experiment="spurious_mnist",
        class_indices=True,
        sizes=rules.mnist_sizes,
        at=lambda c: {"retrains_on_train": c.dfr_reuse_train},
        resolve=lambda c: {"spurious_features": rules.own_shortcuts(c.labels)},
        checks=rules.check_spurious_features,
        keys={
            "labels": own(
                Labels, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "digits of SpuriousMNIST, each a class",
                "a list of 2 to 10 different digits",
            ),
            "spurious_features": own(
                SpuriousFeatures | None, None,
                "what is drawn on which label's digits; null = each its own main shortcut, the "
                "next one's as minority, probability 0.99",
                SPURIOUS_FEATURES,
            ),
            "only_spurious": own(bool, False, "draw the shortcuts without the digits in training"),
            "opposite_spurious_features": own(
                SpuriousFeatures | None, None,
                "the same for the evaluation set opposite; null = main and minority exchanged",
                SPURIOUS_FEATURES,
            ),
            "dfr_spurious_features": own(
                SpuriousFeatures | None, None,
                "what is drawn on DFR's digits; null = every shortcut of training and none equally "
                "often on every label",
                SPURIOUS_FEATURES,
            ),
            "dfr_reuse_train": own(
                bool, False,
                "retrain on the training digits, redrawn; false: on digits set aside",
            ),
        },
        uses=("mnist_source", *SIZES),
    ),
]  # fmt: skip

ACTIVATIONS = (
    "relu", "gelu", "tanh", "identity", "silu", "softplus", "abs", "elu", "sigmoid", "logsigmoid",
    "exp",
)  # fmt: skip
RESNET: dict[str, Any] = {
    "code": "lab.networks.picture_nets:resnet",
    "pictures": True,
    "batch_norm": True,
    "gradcam_layer": "1.layer4",
    "sgd_rate": lambda c: 0.001,
    "uses": (
        "pretrained",
        ("pretrained_weights", When("without pretrained", lambda c: c.pretrained)),
        "mixed_precision",
    ),
}
NETWORKS = [
    Network(
        "MLP",
        "a multilayer perceptron on pixels or features, in muP or NTP",
        code="lab.networks.mlp:MLP",
        whole=True,
        full_batches=True,
        depth="num_hidden_layers",
        sgd_rate=lambda c: 1.0 if c.initialization_method == "muP" else 0.1,
        checks=rules.check_mlp,
        keys={
            "initialization_method": own(
                Literal["muP", "NTP"], "muP",
                "parametrisation: maximal update (muP) or neural tangent (NTP)",
            ),
            "activation_function": own(
                Literal[ACTIVATIONS], "relu", "activation of the hidden layers"
            ),
            "num_hidden_layers": own(int, 1, "hidden layers of the MLP", ge=1, le=100),
            "hidden_dim": own(int, 512, "width of the hidden layers", ge=1, le=65_536),
            "use_skip_connections": own(
                bool, False,
                "add the identity before the activation, from the second hidden layer on",
            ),
            "use_bias": own(bool, False, "biases in every layer"),
            "use_zero_bias_initialization": own(
                bool, True, "biases start at 0, not at random",
                when=When("without use_bias", lambda c: c.use_bias),
            ),
        },
    ),
    Network(
        "ConvNet",
        "two convolutions and a linear layer, from scratch",
        code="lab.networks.picture_nets:convnet",
        pictures=True,
        bytes_per_pixel=600,
        gradcam_layer="4",
        sgd_rate=lambda c: 0.1,
        keys={
            "latent_size": own(
                int, 128, "width of the ConvNet's last hidden layer", ge=1, le=4096
            ),
        },
        uses=("mixed_precision",),
    ),
    Network(
        "ResNet18", "torchvision's ResNet18, from scratch or pretrained", bytes_per_pixel=700,
        **RESNET,
    ),
    Network(
        "ResNet50", "torchvision's ResNet50, from scratch or pretrained", bytes_per_pixel=2000,
        **RESNET,
    ),
]  # fmt: skip

# Settings of JTT's first network.
identifies = When("only without jtt_error_set", lambda c: c.jtt_error_set is None)
METHODS = [
    Method(
        "None", "ERM: every sample counts the same", code="lab.methods.erm:ERM", several_tasks=True
    ),
    Method(
        "IW_uniform",
        "importance weighting: every group counts the same",
        code="lab.methods.importance_weighting:IWUniform",
        weights_groups=True,
        uses=("group_batches",),
    ),
    Method(
        "GroupDRO",
        "group distributionally robust optimisation: a group of larger loss gains weight",
        code="lab.methods.group_dro:GroupDRO",
        weights_groups=True,
        keys={
            "dro_eta_q": own(
                float, 0.1, "step size of GroupDRO's group weights q", ge=0, le=1e6
            ),
        },
        uses=("group_batches",),
    ),
    Method(
        "RWY", "batches drawn so that classes are equally frequent",
        code="lab.methods.rebalancing:RWY", draws_samples=True, several_tasks=True,
    ),
    Method(
        "RWG", "batches drawn so that groups are equally frequent",
        code="lab.methods.rebalancing:RWG", draws_samples=True,
    ),
    Method(
        "SUBY", "ERM on a subset with classes of equal size",
        code="lab.methods.rebalancing:SUBY", several_tasks=True,
    ),
    Method(
        "SUBG", "ERM on a subset with groups of equal size", code="lab.methods.rebalancing:SUBG"
    ),
    Method(
        "JTT",
        "just train twice: samples that a first network gets wrong count more",
        code="lab.methods.jtt:JTT",
        stage="lab.training.identification:identify",
        checks=rules.check_jtt,
        draws_samples=True,
        several_tasks=True,
        keys={
            "jtt_epochs": own(
                int, 1, "epochs of JTT's identification network", ge=1, le=1_000_000,
                when=identifies,
            ),
            "jtt_lambda_up": own(
                int, 50,
                "how often JTT takes a sample that the identification network got wrong; the "
                "published code makes copies besides, so that its λ is one less",
                ge=1, le=100_000,
            ),
            "jtt_learning_rate": own(
                Rate | None, None,
                "learning rate of the identification network; null = learning_rate",
                when=identifies,
            ),
            "jtt_weight_decay": own(
                Decay | None, None,
                "weight decay of the identification network; null = weight_decay",
                when=identifies,
            ),
            "jtt_join": own(
                Literal["xor", "inv", "task"], "xor",
                "weight of a sample in JTT with several tasks: 1 if an odd number of them gets it "
                "wrong, 1/number of them, or their validation losses' share",
                when=When("only with several tasks", lambda c: c.data_set.tasks > 1),
            ),
            "jtt_error_set": own(
                Text | None, None,
                "jtt_error_set.csv of another run on the same training split; null = identify",
                "Text or null",
            ),
        },
    ),
    Method(
        "ERM_target", "ERM on the target set alone",
        code="lab.methods.erm:ERMTarget", needs_target=True,
    ),
    Method(
        "SCALE",
        "training gradients count as far as they agree with those of the target set",
        code="lab.methods.scale:SCALE",
        needs_target=True,
        optimizers=("SGD",),
        mini_batches=True,
        keys={
            "scale_group_size": own(
                int, 64, "kernels of a convolution that SCALE regulates together",
                ge=1, le=1_000_000,
            ),
            "scale_mode": own(
                Literal["linear", "relu", "raw", "step"], "linear",
                "weight of SCALE's train gradient, of its cosine c with the target gradient: "
                "(c+1)/2, max(c,0), c, 1 if c > 0",
            ),
        },
    ),
]  # fmt: skip

LOSSES = [
    Loss("logistic", "log(1+exp(-y f))", code="lab.evaluation.losses:LOGISTIC"),
    Loss("mse", "(f-y)^2", code="lab.evaluation.losses:MSE"),
    Loss(
        "cross_entropy", "one output per class", code="lab.evaluation.losses:CROSS_ENTROPY",
        class_outputs=True,
    ),
]  # fmt: skip

ANALYSES = [
    Analysis(
        "gradient_basis", "norms and cosines of the gradient basis",
        code="lab.analyses.quantities:gradient_basis_rows", needs=("gradient",),
    ),
    Analysis(
        "gap_dynamics_factors", "what drives the gap between groups",
        code="lab.analyses.quantities:gap_dynamics_rows", needs=("gradient",), flows=True,
        pairs=True,
    ),
    Analysis(
        "jacobian_norm", "mean Jacobians of the groups",
        code="lab.analyses.quantities:jacobian_rows", needs=("jacobian",),
        own_samples=True,
    ),
    Analysis(
        "static_dynamic_decomposition", "static and dynamic part of the gap's change",
        code="lab.analyses.quantities:decomposition_rows", needs=("gradient", "jacobian"),
        flows=True, pairs=True,
    ),
    Analysis(
        "model_output_expectation", "mean and deviation of the output",
        code="lab.analyses.quantities:output_rows", needs=("outputs",),
    ),
]  # fmt: skip


def _figure(name: str, meaning: str, module: str, table: str = "", by_task: bool = False) -> Figure:
    return Figure(name, meaning, code=f"lab.figures.{module}:{name}", table=table, by_task=by_task)


FIGURES = [
    _figure("training_history", "losses and accuracies over the epochs", "history", "history"),
    _figure("group_curves", "loss and accuracy of every group", "history", "history", True),
    _figure("group_accuracies", "test accuracies, class × attribute", "history", "history", True),
    _figure("evaluation_sets", "accuracies on further evaluation sets", "history", "history"),
    _figure("gaps", "loss and accuracy gaps of the configured pairs", "history", "history", True),
    _figure("misclassification", "error rates and shares of errors", "history", "history", True),
    *(
        _figure(name, meaning, "analyses", f"analysis:{name}")
        for name, meaning in (
            ("gradient_basis", "norms of the basis gradients, cosines between them"),
            ("gap_dynamics_factors", "the gap's time derivative, split by what causes it"),
            ("static_dynamic_decomposition", "the same, split into static and dynamic parts"),
            ("jacobian_norm", "mean Jacobians of the groups"),
            ("model_output_expectation", "mean and deviation of the output in every group"),
        )
    ),
    _figure("scale", "SCALE: cosines of train and target gradients", "analyses", "analysis:SCALE"),
    _figure("dfr", "accuracies before and after DFR, and its tuning", "retraining"),
    _figure("samples", "training pictures of every group", "pictures"),
    _figure("gradcam", "where the network looks (`--gradcam`)", "pictures"),
]

# Sides of the square feature maps that a ResNet's layers make of a picture of 224 pixels.
MAPS = {"layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7}
BACKBONES = [
    Backbone("ResNet18", "torchvision's ResNet18, 512 features", maps=MAPS),
    Backbone("ResNet50", "torchvision's ResNet50, 2048 features", maps=MAPS),
    Backbone("ViT_B_16", "torchvision's ViT-B/16, 768 features", blocks=12),
    Backbone("DINOv2_ViT_S_14", "DINOv2, 384 features", blocks=12),
    Backbone("DINOv2_ViT_B_14", "DINOv2, 768 features", blocks=12),
    Backbone("DINOv2_ViT_L_14", "DINOv2, 1024 features", blocks=24),
    Backbone("DINOv2_ViT_G_14", "DINOv2, 1536 features", blocks=40),
]

RECORDS: list[Record] = [
    *DATA_SETS, *NETWORKS, *METHODS, *LOSSES, *ANALYSES, *FIGURES, *BACKBONES,
]  # fmt: skip
BUILT_IN = Catalogue(RECORDS)
