"""Facts about other rooms that the configuration needs, as literal tables.

Neither torch nor the registries are imported for a configuration; tests hold these against them.
"""

HAS_OFFICIAL_VALIDATION = {
    "ColoredMNIST": False,
    "WaterBirds": True,
    "Dominoes": False,
    "CelebA": True,
    "SpuriousMNIST": False,
}
EXPERIMENT_NAMES = {
    "ColoredMNIST": "colored_mnist",
    "WaterBirds": "waterbirds",
    "Dominoes": "dominoes",
    "CelebA": "celeba",
    "SpuriousMNIST": "spurious_mnist",
}
# Data sets whose groups are drawn to the configured correlation and marginals.
DRAWN_TO_MOMENTS = ("ColoredMNIST", "Dominoes")
# Pictures that Dominoes has for training, and into how many equal parts its target set is cut:
# validation and target, each with as many of every group or class.
DOMINOES_PICTURES = {"binary": 10_000, "ten": 50_000}
DOMINOES_PARTS = {"binary": 8, "ten": 20}
# Data sets that can set aside a target set without shortcut.
HAS_TARGET = ("Dominoes", "CelebA")
CELEBA_PARTS = 8  # of val_target_size: half of it is the target set, of four equal groups
FULL_BATCH_METHODS = ("IW_uniform", "GroupDRO")
DEFAULT_WEIGHT_DECAY = {"SGD": 0.0, "Adam": 0.01}
VIT_BLOCKS = {
    "ViT_B_16": 12,
    "DINOv2_ViT_S_14": 12,
    "DINOv2_ViT_B_14": 12,
    "DINOv2_ViT_L_14": 24,
    "DINOv2_ViT_G_14": 40,
}
# Side of the square feature maps that a ResNet's layers make of a picture of 224 pixels.
RESNET_MAPS = {"layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7}
RESNETS = ("ResNet18", "ResNet50")
# Networks that are trained on pictures, from the pixels on.
END_TO_END = ("ConvNet", *RESNETS)
BATCH_NORM = RESNETS  # networks that need mini-batches with the groups mixed
SEVERAL_TASKS_METHODS = ("None", "RWY", "SUBY", "JTT")  # for several tasks at once
TARGET_METHODS = ("ERM_target", "SCALE")  # train on a target set

ANALYSES = (
    "gradient_basis",
    "gap_dynamics_factors",
    "jacobian_norm",
    "static_dynamic_decomposition",
    "model_output_expectation",
)
