"""Networks for pictures: their formulas, seeds and weights, and a run with each of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from helpers import in_float64, make_split, make_splits

import data_loader
from lab.analyses import gram as analysis
from lab.config.loading import validate
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.evaluation import predictions
from lab.evaluation.losses import MSE
from lab.networks import building, picture_nets
from lab.networks import weights as weight_files
from lab.retraining import dfr
from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD
from lab.system.errors import ConfigError, DataError
from lab.training import loop

ROOT = Path(__file__).parents[2]


def build(name, shape=(3, 32, 32), num_outputs=1, **keys):
    config = validate({"model_name": name, **keys})
    return building.build(config, shape, num_outputs)


def pictures(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 32), (3, 4, 4), (1, 5, 7)])
@pytest.mark.parametrize("outputs", [1, 5])
def test_the_convnet_is_the_written_formula(shape, outputs):
    net = build("ConvNet", shape, outputs, latent_size=11).double()
    weights = list(net.parameters())
    assert [tuple(w.shape) for w in weights[::2]] == [
        (32, shape[0], 3, 3),
        (64, 32, 3, 3),
        (11, 64 * (shape[1] // 4) * (shape[2] // 4)),
        (outputs, 11),
    ]
    x = pictures(3, *shape, dtype=torch.float64)
    h = x
    for w, b in (weights[:2], weights[2:4]):
        h = F.max_pool2d(F.conv2d(h, w, b, padding=1).relu(), 2)
    h = (h.flatten(1) @ weights[4].T + weights[5]).relu()
    f = h @ weights[6].T + weights[7]
    torch.testing.assert_close(net.hidden(x), h)
    torch.testing.assert_close(net(x), f[:, 0] if outputs == 1 else f)
    assert torch.equal(net.hidden(x, 0), x.flatten(1))


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_resnets_are_torchvision_s_on_standardised_pictures(name):
    net = build(name, (3, 64, 32), num_outputs=4, normalize_inputs=False).double()
    twin = getattr(torchvision.models, name.lower())(num_classes=4).double()
    twin.load_state_dict(net.body[1].state_dict(), strict=False)
    twin.fc.load_state_dict(net.classifier.state_dict())
    x = pictures(3, 3, 64, 32, dtype=torch.float64)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    expected = twin(torchvision.transforms.functional.normalize(x, mean, std))
    # Batch norm over six values a channel enlarges the rounding of the mean and deviation.
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-4)
    features = net.hidden(x)
    torch.testing.assert_close(net.classifier(features), net(x))
    assert features.shape == (3, net.classifier.in_features)
    grey = build(name, (1, 64, 32), num_outputs=4, normalize_inputs=False).double()
    torch.testing.assert_close(grey(x[:, :1]), net(x[:, :1].expand(-1, 3, -1, -1)))


def test_pictures_of_unit_norm_are_brought_to_the_norm_of_imagenet_s():
    x = pictures(2, 3, 8, 8)
    values = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).double()
    # A picture as ImageNet has them on average: E[v²] = mean² + std² in every channel.
    norm = (values.square().sum(0) * 64).sum().sqrt().item()
    scaled = picture_nets.Standardised((3, 8, 8), True, *values.tolist())
    as_is = picture_nets.Standardised((3, 8, 8), False, *values.tolist())
    unit = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled(unit), as_is(unit * norm))


@pytest.mark.parametrize("name", ["ConvNet", "ResNet18"])
def test_weights_come_from_the_seed_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, fix_final_layer=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build(name, num_outputs=3), build(name, seed=1)
    pairs = list(zip(first.body.parameters(), second.body.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(first.classifier.weight, build(name).classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not torch.equal(next(first.body.parameters()), next(other.body.parameters()))


@pytest.mark.parametrize("name", ["MLP", "ConvNet", "ResNet18"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_trained_parameters_and_the_classifier(name, optimizer):
    keys = {"optimizer": optimizer, "learning_rate": 0.3, "fix_final_layer": True}
    config = validate({"model_name": name, "initialization_method": "NTP", **keys})
    net = building.build(config, (3, 8, 8))
    groups = building.parameter_groups(net, config)
    assert {group["lr"] for group in groups} == {0.3}
    trained = {id(p) for group in groups for p in group["params"]}
    fixed = {id(p) for p in net.classifier.parameters()}
    assert trained == {id(p) for p in net.parameters()} - fixed
    assert name == "MLP" or len(groups) == 1
    # Another head takes the place of the classifier, and the features stay.
    net.eval()
    x = pictures(4, 3, 8, 8)
    features = net.hidden(x)
    net.classifier = torch.nn.Linear(features.shape[1], 2)
    assert torch.equal(net(x), net.classifier(features))
    assert torch.equal(net.hidden(x), features)
    names = [key for key, _ in net.named_parameters()]
    assert len(names) == len(set(names)) and len(list(net.children())) <= 2


def test_an_mlp_with_several_outputs_has_the_scaling_of_one():
    keys = {"hidden_dim": 16, "initialization_method": "muP"}
    net = building.build(validate(keys), (7,), 3)
    h = net.hidden(x := torch.randn(5, 7))
    torch.testing.assert_close(net(x), 16**-0.5 * h @ net.layers[-1].weight.T)
    assert net(x).shape == (5, 3)
    assert building.build(validate(keys), (7,))(x).shape == (5,)


def test_number_of_outputs():
    config = validate({})
    assert building.num_outputs(config, 10) == 1
    assert building.num_outputs(validate({"loss_function": "mse"}), 10) == 1
    by_class = config.model_copy(update={"loss_function": "cross_entropy"})
    assert building.num_outputs(by_class, 10) == 10


@pytest.mark.parametrize("shape", [(7,), (2, 28, 28), (3, 28, 3)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="takes pictures"):
        build("ConvNet", shape)
    with pytest.raises(ValueError, match="no numbers"):
        build("ConvNet").hidden(pictures(1, 3, 32, 32), 1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pretrained_weights_from_a_file(tmp_path, suffix):
    source = torchvision.models.resnet18(num_classes=7)  # the head is of no use, whatever it is
    source.bn1.running_mean.normal_()
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(source.state_dict(), path)
    keys = {"pretrained": True, "pretrained_weights": str(path)}
    net, other = build("ResNet18", **keys), build("ResNet18", seed=1, **keys)
    state = source.state_dict()
    for name, value in net.body[1].state_dict().items():
        assert torch.equal(value, state[name])
    assert not torch.equal(net.classifier.weight, other.classifier.weight)
    assert torch.equal(net.classifier.weight, build("ResNet18").classifier.weight)


def test_pretrained_weights_that_are_missing_or_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "unreachable", lambda url: "no network here")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError) as caught:
        build("ResNet50", pretrained=True)
    (line,) = caught.value.problems
    assert line.startswith("pretrained_weights: resnet50-0676ba61.pth")
    assert "no network here" in line and line.endswith("pretrained: false")
    with pytest.raises(DataError, match=r"^pretrained_weights: there is no file .*absent\.pth"):
        build("ResNet18", pretrained=True, pretrained_weights=str(tmp_path / "absent.pth"))
    wrong = tmp_path / "wrong.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, wrong)
    with pytest.raises(DataError, match=r"^pretrained_weights: .* hold the weights of ResNet18"):
        build("ResNet18", pretrained=True, pretrained_weights=str(wrong))
    # Where the libraries keep them they are found.
    (tmp_path / "checkpoints").mkdir()
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    found = build("ResNet18", pretrained=True).body[1].conv1.weight
    assert torch.equal(found, source.conv1.weight)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_feature_extractor": True}, "model_name: given ConvNet, which takes pictures, with "
         "use_feature_extractor: true; allowed: MLP, or use_feature_extractor: false"),
        ({"dfr_target_layer": "layer_1"}, "dfr_target_layer: given layer_1, but the layers of a "
         "ConvNet have no numbers; allowed: last_hidden, layer_0"),
        ({"latent_size": 5000}, "latent_size: given 5000; allowed: a whole number from 1 to 4096"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_network_for_pictures(keys, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate({"model_name": "ConvNet", **keys})
    validate({"model_name": "ConvNet", "dfr_target_layer": "layer_0", "num_hidden_layers": 3})


def test_keys_of_other_networks_have_no_effect():
    given = {
        "hidden_dim": 3,
        "use_bias": True,
        "use_zero_bias_initialization": False,
        "latent_size": 3,
        "pretrained": True,
        "pretrained_weights": "file.pth",
    }

    def ignored(name, **keys):
        return validate({"model_name": name} | given | keys).ignored

    mlp_only = "hidden_dim, use_bias, use_zero_bias_initialization (only for MLP)"
    convnet_only = "latent_size (only for ConvNet)"
    resnet_only = "pretrained, pretrained_weights (only for ResNet18, ResNet50)"
    assert ignored("MLP") == (convnet_only, resnet_only)
    assert ignored("ConvNet") == (mlp_only, resnet_only)
    assert ignored("ResNet50") == (mlp_only, convnet_only)
    assert ignored("ResNet50", pretrained=False) == (
        mlp_only,
        convnet_only,
        "pretrained_weights (without pretrained)",
    )


def test_a_network_limits_the_batches_of_evaluation_and_analyses():
    net = build("ConvNet", (3, 8, 8))
    assert net.max_batch > 1000
    assert build("ResNet50", (3, 224, 224)).max_batch < 32
    split = make_split((5, 0, 7, 1), shape=(3, 8, 8), dtype=torch.float32)
    whole = predictions.outputs(net, split, 1000)
    seen = []
    net.register_forward_hook(lambda module, args, f: seen.append(len(f)))
    net.max_batch = 3
    torch.testing.assert_close(predictions.outputs(net, split, 1000), whole)
    analysis.gram_matrix(net, {"train": split}, MSE, {0, 1}, batch_size=1000)
    assert seen == [3, 2, 3, 3, 1, 1] * 2
    assert len(list(predictions.group_batches(split, 2, net))) == 3 + 4 + 1


def train(fake_run, settings, name, splits, **keys):
    config = settings(**{"model_name": name, "latent_size": 8, "normalize_inputs": False} | keys)
    net = building.build(config, splits.train.inputs.shape[1:]).to(splits.train.inputs.dtype)
    fake_run.rows, fake_run.analyses = [], []
    shutil.rmtree(fake_run.folder / "checkpoints", ignore_errors=True)
    summaries, _ = loop.train(net, splits, config, fake_run)
    return net, summaries


@pytest.mark.parametrize("name", ["ConvNet", "ResNet18"])
def test_analyses_leave_the_training_of_a_picture_network_as_it_is(fake_run, settings, name):
    """Same bytes in the history and in all buffers with analyses and without."""
    splits = make_splits(shape=(3, 16, 16), dtype=torch.float32)
    keys = {"train_batch_size": 16, "learning_rate": 0.05, "epochs": 1}
    # After a step, when the running statistics are no longer the initial ones.
    due = {f"{name}_analysis_epochs": [1] for name in BUILT_IN.of(Analysis)}
    net, _ = train(fake_run, settings, name, splits, **keys, **due)
    rows, analyses = fake_run.rows, fake_run.analyses
    never = {"analyses": "none"}
    twin, _ = train(fake_run, settings, name, splits, **keys, **never)
    assert {row["split"] for row in analyses} == {"train", "test", "test_under_train"}
    assert not fake_run.analyses
    assert fake_run.rows == rows
    states = zip(net.state_dict().values(), twin.state_dict().values())
    assert all(torch.equal(a, b) for a, b in states)


def test_method_total_is_measured_on_a_convnet(fake_run, settings):
    splits = in_float64(make_splits(shape=(1, 8, 8)))
    keys = {"train_batch_size": None, "learning_rate": 1e-4, "epochs": 1}
    train(fake_run, settings, "ConvNet", splits, debias_method="GroupDRO", **keys)
    for split in ("train", "test_under_train"):
        predicted = fake_run.values("gap_dynamics_factors", "method_total", split)
        measured = fake_run.values("gap_dynamics_factors", "measured", split)
        for pair in ("G(-1,+1)_vs_G(-1,-1)", "G(+1,-1)_vs_G(+1,+1)"):
            assert measured[0, pair] == pytest.approx(predicted[0, pair], rel=1e-3)


def test_a_convnet_learns_the_colours_and_dfr_reads_its_features(fake_run, settings):
    keys = {"normalize_inputs": False, "learning_rate": 0.1, "dfr_num_retrains": 2}
    keys |= {"analyses": "none"}
    splits = data_loader.load(settings(**keys))
    net, summaries = train(fake_run, settings, "ConvNet", splits, train_batch_size=16, **keys)
    assert summaries["train"]["avg_loss"] < fake_run.rows[0]["train_avg_loss"] - 0.1
    assert summaries["train"]["group_0_acc"] > 0.9
    for layer, features in (("last_hidden", 8), ("layer_0", 3 * 28 * 28)):
        config = settings(model_name="ConvNet", dfr_target_layer=layer, **keys)
        _, results = dfr.retrain(net, splits, config)
        assert results["num_features"] == features
        assert results["before"]["test"] == summaries["test"]


def test_an_mlp_does_without_torchvision():
    code = (
        "import sys; from lab.networks import building; from lab.training import loop; "
        "from lab.config import loading; "
        "building.build(loading.validate({}), (7,)); print('torchvision' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
