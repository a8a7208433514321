"""The estimate of a run's memory: its facts, and what it refuses."""

import pytest
import timm
import torch
import torchvision

import backbones
import config as configuration
import memory
import model
from config import validate
from errors import ConfigError


def values(**keys):
    return dict(validate(keys))


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gray", [False, True])
def test_parameters_are_those_of_the_network(depth, bias, gray):
    config = validate(
        {"num_hidden_layers": depth, "use_bias": bias, "use_grayscale": gray, "hidden_dim": 6}
    )
    network = model.build(config, (1 if gray else 3, 28, 28))
    assert memory.parameters(dict(config)) == sum(p.numel() for p in network.parameters())


def test_backbones_are_the_libraries():
    assert set(memory.RESNET_CHANNELS) == set(configuration.RESNETS)
    assert set(memory.VIT_WIDTHS) == set(configuration.VIT_BLOCKS)
    assert set(memory.BACKBONES) == set(backbones.TORCHVISION) | set(backbones.DINOV2)
    with torch.device("meta"):
        made = {
            name: getattr(torchvision.models, architecture)()
            for name, (architecture, _) in backbones.TORCHVISION.items()
        }
        made |= {
            name: timm.create_model(architecture, img_size=224)
            for name, architecture in backbones.DINOV2.items()
        }
    for name, net in made.items():
        parameters = sum(p.numel() for p in net.parameters())
        assert parameters == pytest.approx(memory.BACKBONES[name][0] * 1e6, rel=0.03, abs=0.5e6)
    for name, width in memory.VIT_WIDTHS.items():
        assert width == getattr(made[name], "embed_dim", getattr(made[name], "hidden_dim", None))
    for name, channels in memory.RESNET_CHANNELS.items():
        blocks = {layer: getattr(made[name], layer)[-1] for layer in configuration.RESNET_MAPS}
        found = {
            layer: getattr(block, "bn3", getattr(block, "bn2", None)).num_features
            for layer, block in blocks.items()
        }
        assert found | {"avgpool": made[name].fc.in_features} == channels


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, 2352),
        ({"use_grayscale": True}, 784),
        ({"dataset_name": "WaterBirds"}, 150_528),
        ({"use_feature_extractor": True}, 512),
        (
            {
                "use_feature_extractor": True,
                "feature_extractor_resnet_intermediate_layer": "layer3",
                "feature_extractor_resnet_pooling_output_size": 2,
            },
            1024,
        ),
        (
            {"use_feature_extractor": True, "feature_extractor_model_name": "DINOv2_ViT_G_14"},
            1536,
        ),
    ],
)
def test_inputs(keys, expected):
    assert memory.inputs(values(**keys)) == expected


def test_samples():
    assert memory.samples(values(num_val_samples=None)) == (3000, 1000, 1000)
    everything = {f"num_{split}_samples": None for split in ("train", "val", "test")}
    assert memory.samples(values(**everything)) == (4000, 0, 1000)
    found = memory.samples(values(**everything, dataset_name="WaterBirds"))
    assert sum(found) == 11_788


class Recorded(dict):
    """Values that note which of them were read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def test_keys_are_all_that_is_read():
    read = set()
    for keys in (
        {},
        {"use_feature_extractor": True, "feature_extractor_resnet_intermediate_layer": "layer1"},
        {"dataset_name": "WaterBirds", "dfr_val_split_strategy": "original"},
        {f"analyze_{name}": False for name in configuration.ANALYSES},
        {"optimizer": "Adam", "use_bias": True, "num_workers": 2},
    ):
        recorded = Recorded(values(**keys))
        memory.demands(recorded)
        read |= recorded.read
    assert read == set(memory.KEYS)


@pytest.fixture
def machine(monkeypatch):
    """machine(gigabytes) makes the machine as large."""
    return lambda gigabytes: monkeypatch.setattr(memory, "available", lambda: gigabytes * 1e9)


def test_the_message(machine):
    machine(16)
    with pytest.raises(ConfigError) as caught:
        validate({"hidden_dim": 65_536, "num_hidden_layers": 100})
    (line,) = caught.value.problems
    assert line == (
        "hidden_dim, num_hidden_layers, optimizer: given 65536, 100, SGD, which is 3,402.8 GB of "
        "memory for 4.25e+11 parameters; the run would take 3,485.6 GB, and 16.0 GB are there"
    )
    with pytest.raises(ConfigError, match=r"the run would take 25\.2 GB .11\.7 GB with device"):
        validate({"hidden_dim": 36_000, "num_hidden_layers": 3, "use_dfr": False})
    validate({"hidden_dim": 36_000, "num_hidden_layers": 3, "use_dfr": False, "device": "cuda"})


FULL = {"mnist_source": "full", "num_train_samples": None, "num_test_samples": None}
MAPS = {
    "use_feature_extractor": True,
    "feature_extractor_model_name": "ResNet50",
    "feature_extractor_resnet_intermediate_layer": "layer1",
    "feature_extractor_resnet_pooling_output_size": 56,
}


@pytest.mark.parametrize(
    "first, keys",
    [
        ("hidden_dim", {"hidden_dim": 65_536, "dataset_name": "WaterBirds"}),
        ("hidden_dim", {"hidden_dim": 30_000, "num_hidden_layers": 2, "optimizer": "Adam"}),
        ("eval_batch_size", {"eval_batch_size": 10**7, "num_hidden_layers": 99, **FULL}),
        ("train_batch_size", {"train_batch_size": 10**7, "num_hidden_layers": 99, **FULL}),
        ("analysis_memory_gb", {"analysis_memory_gb": 1e4, "hidden_dim": 9000,
                                "num_hidden_layers": 6}),
        ("num_train_samples", {**FULL, **MAPS}),
        ("feature_extractor_batch_size", {"use_feature_extractor": True, "num_workers": 1024,
                                          "feature_extractor_batch_size": 2}),
        ("dfr_num_workers", {"dfr_num_workers": 1024, "dfr_num_retrains": 1000}),
        ("dfr_num_workers", {"dfr_num_workers": 16, "hidden_dim": 50_000, **FULL,
                             "train_correlation": 0, "analysis_target": "test"}),
    ],
)  # fmt: skip
def test_products_of_keys_that_pass_a_machine(machine, first, keys):
    machine(16)
    with pytest.raises(ConfigError) as caught:
        validate(keys)
    (line,) = caught.value.problems
    assert line.startswith(f"{first}, ") and line.endswith(", and 16.0 GB are there")
    machine(1e6)
    validate(keys)


def test_what_is_usual_fits_in_4_gigabytes(machine):
    machine(4)
    validate({"dfr_num_workers": 4})
    validate(FULL)
    validate({"dataset_name": "WaterBirds"})
    extractor = {"use_feature_extractor": True, "num_workers": 4}
    for name in ("ResNet18", "ResNet50", "DINOv2_ViT_B_14"):
        validate({"dataset_name": "WaterBirds", "feature_extractor_model_name": name, **extractor})


def test_a_machine_that_does_not_tell_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    validate({"hidden_dim": 65_536, "num_hidden_layers": 100})


@pytest.mark.parametrize("table", ["0::/job/step\n", "4:cpu,memory:/job/step\n1:name=x:/other\n"])
def test_limits_of_control_groups_count(tmp_path, monkeypatch, table):
    (tmp_path / "table").write_text(table)
    folder, name = {
        "0": (tmp_path, "memory.max"),
        "4": (tmp_path / "memory", "memory.limit_in_bytes"),
    }[table[0]]
    (folder / "job" / "step").mkdir(parents=True)
    (folder / "job" / "step" / name).write_text("max\n")
    whole = memory.available()
    monkeypatch.setattr(
        memory, "_control_groups", lambda real=memory._control_groups: real(
            tmp_path, tmp_path / "table"
        )
    )  # fmt: skip
    physical = memory.available()
    assert physical >= whole > 1e8
    (folder / "job" / name).write_text("123456789\n")
    assert memory.available() == 123_456_789
    (folder / "job" / "step" / name).write_text("1000000\n")
    assert memory.available() == 1_000_000
