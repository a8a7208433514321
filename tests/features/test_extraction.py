"""Backbones against the libraries' own forward; the cache: hits, damage, interruption, sharing."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision

import data_loader
import feature_extractor
import main
from lab.config import loading, records
from lab.config.records import BUILT_IN
from lab.config.registry import Backbone
from lab.config.seeds import derive_seed
from lab.features import backbones, extraction
from lab.features import cache as feature_cache
from lab.networks import weights as weight_files
from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD
from lab.splits.splits import Split, Splits
from lab.system.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Quicker for a few pictures, above all where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Drawn:
    """Pictures of noise that notes which of them were decoded; one may fail."""

    def __init__(self, n, name="drawn", fails=None, error=None):
        self.n, self.identity, self.fails, self.error = n, f"{name} {n}", fails, error
        self.decoded = []

    def __len__(self):
        return self.n

    def decode_uint8(self, i):
        if i == self.fails:
            raise self.error
        self.decoded.append(i)
        generator = torch.Generator().manual_seed(i)
        small = torch.rand(1, 3, 8, 8, generator=generator)
        return (F.interpolate(small, (224, 224))[0] * 255).byte()


def splits_of(*pictures, names=("train", "test", "val", "dfr")):
    """Splits with these pictures as inputs."""
    made = {
        name: Split(
            inputs, torch.ones(len(inputs)), torch.ones(len(inputs)), [0, 0, 0, len(inputs)]
        )
        for name, inputs in zip(names, pictures)
    }
    return Splits(group_names=list("abcd"), **made)


@pytest.fixture
def extractor_settings(settings, tmp_path):
    """A configuration with a feature extractor that decodes in the main process."""

    def make(**keys):
        few = {
            "use_feature_extractor": True,
            "feature_extractor_weights": "random",
            "features_cache_dir": str(tmp_path / "cache"),
            "feature_extractor_batch_size": 2,
            "num_workers": 0,
            "normalize_inputs": False,
        }
        return settings(**few | keys)

    return make


@pytest.fixture
def quick(extractor_settings):
    """The same with the quickest layer."""

    def make(**keys):
        layer = {"feature_extractor_resnet_intermediate_layer": "layer1"}
        return extractor_settings(**layer | keys)

    return make


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """No weights in any cache, no network; returns (torch.hub's folder, Hugging Face's)."""
    from huggingface_hub import constants

    monkeypatch.setattr(weight_files, "unreachable", lambda url: "no network here")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints", tmp_path / "hf"


def seeded(config, make):
    """The library's model with the random weights that `config` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "backbone"))
        return make().eval()


def hooked(model, module, inputs):
    """What `module` gives out in the library's own forward pass."""
    seen = []
    handle = module.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    with torch.inference_mode():
        model(inputs)
    handle.remove()
    return seen[0]


def pictures(n=2):
    return torch.stack([Drawn(n).decode_uint8(i) for i in range(n)])


def normalised(pictures, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return torchvision.transforms.functional.normalize(pictures / 255, mean, std)


def features_by(config, pictures):
    spec = backbones.resolve(config)
    return backbones.build(config, spec, backbones.find_weights(config, spec), "cpu")(pictures)


def pooled(tokens, mode):
    return {
        "cls_token": tokens[:, 0],
        "mean_pool_patch": tokens[:, 1:].mean(1),
        "mean_pool_all": tokens.mean(1),
    }[mode]


def close(actual, expected):
    torch.testing.assert_close(actual, expected.float().contiguous(), rtol=1e-3, atol=1e-4)


def with_statistics(model):
    """Batch-norm statistics unlike the initial ones, so that folding them shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_resnet18_layers_from_a_file(extractor_settings, tmp_path, suffix):
    model = with_statistics(torchvision.models.resnet18(weights=None)).eval()
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(model.state_dict(), path)
    layers = {"avgpool": 1, "layer1": 3, "layer2": 1, "layer3": 2, "layer4": 7}
    for layer, size in layers.items() if suffix == ".pth" else [("avgpool", 1)]:
        config = extractor_settings(
            feature_extractor_weights=str(path),
            feature_extractor_resnet_intermediate_layer=layer,
            feature_extractor_resnet_pooling_output_size=size,
        )
        maps = hooked(model, getattr(model, layer), normalised(pictures()))
        expected = F.adaptive_avg_pool2d(maps, size).flatten(1)
        close(features_by(config, pictures()), expected)


def test_resnet50_is_the_library_s(extractor_settings):
    config = extractor_settings(feature_extractor_model_name="ResNet50")
    model = seeded(config, torchvision.models.resnet50)
    expected = hooked(model, model.avgpool, normalised(pictures()))
    found = features_by(config, pictures())
    assert found.shape == (2, 2048)
    close(found, expected.flatten(1))


@pytest.mark.parametrize(
    "block, mode",
    [(0, "mean_pool_all"), (-7, "cls_token"), (-1, "cls_token"), (-1, "mean_pool_patch")],
)
@pytest.mark.parametrize("name", ["ViT_B_16", "DINOv2_ViT_S_14"])
def test_vit_blocks_are_the_library_s(extractor_settings, library_vit, name, block, mode):
    config = extractor_settings(
        feature_extractor_model_name=name,
        feature_extractor_vit_target_block=block,
        feature_extractor_vit_aggregation_mode=mode,
    )
    model, layers, norm = library_vit(config)
    module = norm if block == -1 else layers[block]
    tokens = hooked(model, module, normalised(pictures()))
    close(features_by(config, pictures()), pooled(tokens, mode))


@pytest.fixture(scope="module")
def library_vit():
    """(model, its blocks, its final LayerNorm), with the weights that seed 0 draws."""
    made = {}

    def get(config):
        name = config.feature_extractor_model_name
        if name not in made:
            if name == "ViT_B_16":
                model = seeded(config, torchvision.models.vit_b_16)
                made[name] = model, model.encoder.layers, model.encoder.ln
            else:
                timm_name = backbones.DINOV2[name]
                model = seeded(config, lambda: timm.create_model(timm_name, img_size=224))
                made[name] = model, model.blocks, model.norm
        return made[name]

    return get


def test_names_are_the_right_architectures():
    dims = {"S": 384, "B": 768, "L": 1024, "G": 1536}
    for name, architecture in backbones.DINOV2.items():
        with torch.device("meta"):
            model = timm.create_model(architecture, img_size=224)
        assert model.embed_dim == dims[name.split("_")[2]]
        assert len(model.blocks) == BUILT_IN.of(Backbone)[name].blocks
        assert model.patch_embed.patch_size == (14, 14) and model.patch_embed.num_patches == 256
        assert model.num_prefix_tokens == 1
        assert timm.get_pretrained_cfg(architecture).url.endswith(
            f"dinov2_vit{name.split('_')[2].lower()}14_pretrain.pth"
        )
    with torch.device("meta"):
        vit = torchvision.models.vit_b_16()
        resnets = {
            "ResNet18": torchvision.models.resnet18(),
            "ResNet50": torchvision.models.resnet50(),
        }
    assert len(vit.encoder.layers) == BUILT_IN.of(Backbone)["ViT_B_16"].blocks
    assert {*weight_files.TORCHVISION, *backbones.DINOV2} == {
        *BUILT_IN.of(Backbone),
    }  # fmt: skip
    for architecture, weights in weight_files.TORCHVISION.values():
        assert weights.name == "IMAGENET1K_V1" and architecture in weights.url
        transform = weights.transforms()
        assert tuple(transform.mean) == IMAGENET_MEAN
        assert tuple(transform.std) == IMAGENET_STD
    for resnet in resnets.values():
        with torch.device("meta"):
            picture = torch.empty(1, 3, 224, 224)
            for layer, side in records.MAPS.items():
                assert hooked(resnet, getattr(resnet, layer), picture).shape[-1] == side


@pytest.mark.parametrize(
    "name, layer, dim",
    [
        ("resnet10t", "pooled", 512),
        ("swin_tiny_patch4_window7_224", "pooled", 768),
        ("vit_tiny_patch16_384", "block11-mean_pool_all", 192),
    ],
)
def test_other_timm_models(extractor_settings, name, layer, dim):
    config = extractor_settings(
        feature_extractor_model_name=f"timm:{name}",
        feature_extractor_vit_aggregation_mode="mean_pool_all",
    )
    size = {"img_size": 224} if name.endswith("384") else {}
    model = seeded(config, lambda: timm.create_model(name, **size))
    cfg = model.pretrained_cfg
    inputs = normalised(pictures(), cfg["mean"], cfg["std"])
    with torch.inference_mode():
        features = model.forward_features(inputs)
        if layer == "pooled":
            expected = model.forward_head(features, pre_logits=True)
        else:
            expected = features.mean(1)
    spec = backbones.resolve(config)
    assert spec.layer == layer and spec.mean == tuple(cfg["mean"])
    found = features_by(config, pictures())
    assert found.shape == (2, dim)
    close(found, expected)


def test_register_tokens_are_left_out(extractor_settings):
    config = extractor_settings(
        feature_extractor_model_name="timm:vit_small_patch14_reg4_dinov2",
        feature_extractor_vit_aggregation_mode="mean_pool_all",
        feature_extractor_vit_target_block=0,
    )
    model = seeded(config, lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224))
    tokens = hooked(model, model.blocks[0], normalised(pictures()))
    assert tokens.shape[1] == 1 + 4 + 256
    close(features_by(config, pictures()), tokens[:, [0, *range(5, 261)]].mean(1))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"feature_extractor_vit_target_block": 12}, "12 blocks; allowed: 0 to 11, or -12 to -1"),
        ({"feature_extractor_vit_target_block": -13}, "12 blocks; allowed: 0 to 11, or -12 to -1"),
        ({"feature_extractor_model_name": "timm:vit_tiny_patch16_224",
          "feature_extractor_vit_target_block": 12}, "12 blocks; allowed: 0 to 11, or -12 to -1"),
        ({"feature_extractor_model_name": "timm:vit_relpos_small_patch16_224"},
         "no CLS token; allowed: mean_pool_patch"),
        ({"feature_extractor_model_name": "timm:resnet19"}, "did you mean timm:resnet18"),
        ({"feature_extractor_model_name": "timm:resnet18.of_nobody"}, "cannot be built"),
        ({"feature_extractor_model_name": "VGG16"}, "allowed: ResNet18, ResNet50, ViT_B_16, DINO"),
        ({"feature_extractor_model_name": "ResNet18",
          "feature_extractor_resnet_intermediate_layer": "layer5"}, "allowed: avgpool, layer1"),
        ({"feature_extractor_model_name": "ResNet18",
          "feature_extractor_resnet_intermediate_layer": "layer4",
          "feature_extractor_resnet_pooling_output_size": 8}, "allowed: 1 to 7"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have(extractor_settings, keys, message):
    unread = Drawn(2, fails=0, error=AssertionError("a picture was read"))

    def run():
        config = extractor_settings(**{"feature_extractor_model_name": "ViT_B_16"} | keys)
        extraction.Extractor(config).extract(splits_of(unread, unread))

    with pytest.raises(ConfigError, match=re.escape(message)):
        run()


def test_original_dinov2_file_where_torch_hub_keeps_it(extractor_settings, nothing_installed):
    checkpoints, _ = nothing_installed
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518).eval()
    torch.nn.init.normal_(model.pos_embed)
    # The original file has a mask token and the embedding of 37 × 37 patches.
    original = model.state_dict() | {"mask_token": torch.zeros(1, 384)}
    assert original["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    torch.save(original, checkpoints / "dinov2_vits14_pretrain.pth")
    config = extractor_settings(
        feature_extractor_model_name="DINOv2_ViT_S_14", feature_extractor_weights=None
    )
    found = features_by(config, pictures())
    model.set_input_size((224, 224))
    with torch.inference_mode():
        close(found, model.forward_features(normalised(pictures()))[:, 0])
    close(features_by(config.model_copy(update={
        "feature_extractor_weights": str(checkpoints / "dinov2_vits14_pretrain.pth")
    }), pictures()), found)  # fmt: skip


def test_weights_in_the_hugging_face_cache(extractor_settings, nothing_installed):
    _, hub = nothing_installed
    repository = hub / "models--timm--vit_small_patch14_dinov2.lvd142m"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "model.safetensors").touch()
    config = extractor_settings(
        feature_extractor_model_name="DINOv2_ViT_S_14", feature_extractor_weights=None
    )
    found = backbones.find_weights(config, backbones.resolve(config))
    assert found == snapshot / "model.safetensors"


@pytest.mark.parametrize(
    "name, file",
    [
        ("ResNet18", "resnet18-f37072fd.pth"),
        ("ViT_B_16", "vit_b_16-c867db91.pth"),
        ("DINOv2_ViT_G_14", "dinov2_vitg14_pretrain.pth"),
        ("timm:resnet10t", "model.safetensors of timm/resnet10t"),
    ],
)
def test_missing_weights_are_one_clear_error(extractor_settings, nothing_installed, name, file):
    config = extractor_settings(feature_extractor_model_name=name, feature_extractor_weights=None)
    unread = Drawn(2, fails=0, error=AssertionError("a picture was read"))
    with pytest.raises(DataError) as caught:
        extraction.Extractor(config).extract(splits_of(unread, unread))
    (line,) = caught.value.problems
    places = [str(nothing_installed[0]), "no network here", "feature_extractor_weights: random"]
    assert all(text in line for text in (file, *places)), line
    assert f"the weights of {name}" in line


def test_an_unreachable_host_is_reported_soon():
    start = time.perf_counter()
    assert weight_files.unreachable("https://weights.invalid/file")
    assert time.perf_counter() - start < weight_files.NETWORK_TIMEOUT + 1


def test_what_is_fetched_is_complete_and_has_its_hash(tmp_path, monkeypatch):
    source = tmp_path / "weights"
    source.write_bytes(b"weights")
    digest = weight_files.file_hash(source)[:8]
    assert weight_files.unreachable(source.as_uri()) is None
    target = tmp_path / "checkpoints" / f"model-{digest}.pth"
    assert weight_files._download(source.as_uri(), target) is None
    assert target.read_bytes() == b"weights"
    wrong = target.with_name("model-01234567.pth")
    assert "SHA-256" in weight_files._download(source.as_uri(), wrong)
    assert "absent" in weight_files._download((tmp_path / "absent").as_uri(), wrong)
    assert list(target.parent.iterdir()) == [target]

    # The whole way: torchvision's file is fetched into torch.hub's folder when it is missing.
    class Weights:
        url = source.with_name(f"model-{digest}.pth").as_uri()

    source.rename(tmp_path / f"model-{digest}.pth")
    target.unlink()
    monkeypatch.setitem(weight_files.TORCHVISION, "ResNet18", ("resnet18", Weights))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = loading.validate({"use_feature_extractor": True})
    assert backbones.find_weights(config, backbones.resolve(config)) == target


class Intruder:
    """Would make a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("name", ["ResNet18", "timm:resnet10t"])
def test_files_that_are_no_weights(extractor_settings, tmp_path, name):
    config = extractor_settings(feature_extractor_model_name=name)
    bad = {
        "text.pth": lambda path: path.write_text("not weights"),
        "empty.safetensors": lambda path: path.touch(),
        "other.safetensors": lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
        "code.pth": lambda path: torch.save(
            {"conv1.weight": Intruder(tmp_path / "intruded")}, path
        ),
        "list.pth": lambda path: torch.save([1, 2], path),
    }
    for file, write in bad.items():
        write(tmp_path / file)
        wrong = config.model_copy(update={"feature_extractor_weights": str(tmp_path / file)})
        with pytest.raises(DataError, match=f"{file} does not hold the weights of {name}"):
            features_by(wrong, pictures())
    assert not (tmp_path / "intruded").exists()
    absent = config.model_copy(update={"feature_extractor_weights": str(tmp_path / "absent.pth")})
    with pytest.raises(DataError, match=r"there is no file .*absent\.pth"):
        features_by(absent, pictures())


def test_weights_hash_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path, spec = tmp_path / "weights.pth", None
    path.write_bytes(b"one")
    first = extraction._weights_id(tmp_path, path, spec, 0)
    monkeypatch.setattr(weight_files, "file_hash", lambda path: pytest.fail("hashed again"))
    assert extraction._weights_id(tmp_path, path, spec, 0) == first
    monkeypatch.undo()
    path.write_bytes(b"another")
    assert extraction._weights_id(tmp_path, path, spec, 0) != first
    (tmp_path / feature_cache.WEIGHT_HASHES).write_text("[")
    assert len(extraction._weights_id(tmp_path, path, spec, 0)) == 64


def cache_files(config):
    return sorted(Path(config.features_cache_dir).glob("*.safetensors"))


def test_cache_hit_needs_neither_pictures_nor_backbone(quick, monkeypatch):
    config = quick()
    train, test = Drawn(3), Drawn(2, name="test")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    extractor = extraction.Extractor(config)
    first = extractor.extract(splits_of(train, test, test))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert train.decoded == [0, 1, 2]
    assert test.decoded == [0, 1]  # val has the same pictures
    assert first.train.inputs.dtype == torch.float32 and first.train.inputs.shape == (3, 64)
    close(first.train.inputs, features_by(config, pictures(3)))
    assert first.train.counts == [0, 0, 0, 3] and first.group_names == list("abcd")
    assert set(extractor.facts["files"]) == {"train", "test", "val"}

    monkeypatch.setattr(backbones, "build", lambda *_: pytest.fail("built again"))
    unread = Drawn(3, fails=0, error=AssertionError("a picture was read"))
    again = extraction.Extractor(config).extract(splits_of(unread, test))
    assert torch.equal(again.train.inputs, first.train.inputs)
    assert [path.name for path in cache_files(config)] == sorted(
        set(extractor.facts["files"].values())
    )
    assert re.fullmatch(
        r"ColoredMNIST_test_ResNet18_layer1-1x1_[0-9a-f]{16}\.safetensors",
        cache_files(config)[0].name,
    )
    assert not list(Path(config.features_cache_dir).glob("*.parts"))


def test_unit_norm(quick):
    config = quick(normalize_inputs=True)
    inputs = extraction.Extractor(config).extract(splits_of(Drawn(2), Drawn(1))).train.inputs
    torch.testing.assert_close(inputs.norm(dim=1), torch.ones(2))


def test_every_thing_that_matters_is_in_the_key(quick):
    changes = [
        {}, {"seed": 1}, {"feature_extractor_resnet_pooling_output_size": 2},
        {"feature_extractor_resnet_intermediate_layer": "layer2"},
        {"feature_extractor_precision": "bf16"},
    ]  # fmt: skip
    for number, keys in enumerate(changes, start=1):
        config = quick(**keys)
        extraction.Extractor(config).extract(_one(1))
        assert len(cache_files(config)) == number
    extraction.Extractor(config).extract(_one(1, name="others"))
    assert len(cache_files(config)) == len(changes) + 1
    # What does not change the features makes no new file.
    extraction.Extractor(quick(feature_extractor_batch_size=1, epochs=7)).extract(_one(1))
    assert len(cache_files(config)) == len(changes) + 1


def _one(n, **options):
    """Splits whose training and test pictures are the same, so that there is one file."""
    return splits_of(Drawn(n, **options), Drawn(n, **options))


def test_bf16_is_close(quick):
    exact = extraction.Extractor(quick()).extract(_one(2)).train.inputs
    rounded = extraction.Extractor(quick(feature_extractor_precision="bf16")).extract(_one(2))
    assert not torch.equal(rounded.train.inputs, exact)
    torch.testing.assert_close(rounded.train.inputs, exact, rtol=0.05, atol=0.02)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_files_are_made_again(quick, caplog):
    config = quick()
    extraction.Extractor(config).extract(_one(3))
    (path,) = cache_files(config)
    good = path.read_bytes()
    extraction.Extractor(quick(seed=1)).extract(_one(3))
    other = next(p for p in cache_files(config) if p != path).read_bytes()
    with safetensors.safe_open(path, framework="pt") as file:
        key = file.metadata()["key"]
    damages = [
        lambda: flip_last_byte(path),
        lambda: path.write_bytes(good[:-5]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(other),
        lambda: feature_cache.write(path, [torch.ones(2, 64)], {"key": key}),  # of 3 pictures
    ]
    for damage in damages:
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "spurious"):
            extraction.Extractor(config).extract(_one(3))
        assert "is damaged" in caplog.text
        assert path.read_bytes() == good


def test_interrupted_goes_on_where_it_stopped(quick, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(extraction, "SHARD", 4)
    whole = quick(features_cache_dir=str(tmp_path / "whole"))
    extraction.Extractor(whole).extract(_one(10))

    config = quick()
    stopped = Drawn(10, fails=9, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        extraction.Extractor(config).extract(splits_of(stopped, stopped))
    (parts,) = Path(config.features_cache_dir).glob("*.parts")
    assert len(list(parts.iterdir())) == 2 and not cache_files(config)

    flip_last_byte(parts / "000000.safetensors")
    rest = Drawn(10)
    with caplog.at_level(logging.WARNING, "spurious"):
        extraction.Extractor(config).extract(splits_of(rest, rest))
    assert "is not reused" in caplog.text
    assert rest.decoded == [0, 1, 2, 3, 8, 9]
    assert cache_files(config)[0].read_bytes() == cache_files(whole)[0].read_bytes()

    # Shards that were made in other batches are not mixed with ours.
    other = quick(feature_extractor_batch_size=4, features_cache_dir=str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        extraction.Extractor(other).extract(splits_of(stopped, stopped))
    rest = Drawn(10)
    mixed = other.model_copy(update={"feature_extractor_batch_size": 2})
    extraction.Extractor(mixed).extract(splits_of(rest, rest))
    assert rest.decoded == list(range(10))


def test_a_bad_picture_in_a_worker_is_a_user_s_error(quick):
    bad = Drawn(3, fails=2, error=DataError("row 7: a.jpg cannot be read"))
    with pytest.raises(DataError) as caught:
        extraction.Extractor(quick(num_workers=1)).extract(splits_of(bad, bad))
    assert caught.value.problems == ("row 7: a.jpg cannot be read",)


def test_cache_folder_that_cannot_be_used(quick, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="features_cache_dir"):
        extraction.Extractor(quick(features_cache_dir=str(tmp_path / "file"))).extract(_one(1))


def test_two_at_once_share_one_extraction(quick, caplog):
    config = quick()
    started, waiting = threading.Event(), threading.Event()

    class Slow(Drawn):
        def decode_uint8(self, i):
            started.set()
            assert waiting.wait(30)
            return super().decode_uint8(i)

    class Seen(logging.Handler):
        def emit(self, record):
            if "waiting" in record.getMessage():
                waiting.set()

    slow, unread, results = Slow(2), Drawn(2, fails=0, error=AssertionError("read twice")), []
    thread = threading.Thread(
        target=lambda: results.append(extraction.Extractor(config).extract(splits_of(slow, slow)))
    )
    logger, handler = logging.getLogger("spurious.lab.features.cache"), Seen()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "spurious"):
            thread.start()
            assert started.wait(30)
            second = extraction.Extractor(config).extract(splits_of(unread, unread))
            thread.join(30)
    finally:
        logger.removeHandler(handler)
    assert torch.equal(second.train.inputs, results[0].train.inputs)


def test_list_and_prune(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("feature_extractor_weights: random\n")
    config = quick()
    folder = Path(config.features_cache_dir)
    options = [f"features_cache_dir={folder}"]
    assert feature_extractor.main(["--prune", *options]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    for seed in (0, 1):
        extraction.Extractor(quick(seed=seed)).extract(_one(1))
    keep, damaged = cache_files(config)
    flip_last_byte(damaged)
    digest = keep.stem[-16:]
    parts = folder / f"{keep.stem}.parts"
    parts.mkdir()
    (parts / "000000.safetensors").write_bytes(b"shard")
    (folder / f".{keep.stem}-ab12_x.safetensors").touch()
    (folder / "notes.safetensors").touch()
    (folder / "weights.json").write_text("{}")

    assert feature_extractor.main(["--list", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines[:-1])
    assert re.search(r" B 2\d{3}-\d\d-\d\d ColoredMNIST train +ResNet18 +layer1-1x1", lines[1])

    with filelock.FileLock(folder / f"{digest}.lock"):
        assert feature_extractor.main([*options, "--prune"]) == 0
    assert f"in use, left: {parts}" in capsys.readouterr().out
    assert parts.exists() and not damaged.exists()
    assert feature_extractor.main(["--prune", *options]) == 0
    assert f"removed (left by a run, 5 B): {parts}" in capsys.readouterr().out
    left = {keep.name, "notes.safetensors", "weights.json"}
    assert {path.name for path in folder.iterdir()} == left
    assert feature_extractor.main(["--prune", "all", *options]) == 0
    assert {path.name for path in folder.iterdir()} == {"notes.safetensors"}
    assert feature_extractor.main(["--prune", "some", *options]) == 2
    assert "--prune: given 'some'" in capsys.readouterr().err
    assert feature_extractor.main(["--nonsense"]) == 2
    assert feature_extractor.main(["use_feature_extractor=false"]) == 2
    assert feature_extractor.main(["feature_extractor_vit_target_block=x"]) == 2


def test_pictures_in_memory():
    pixels = torch.rand(2, 3, 28, 28)
    made = extraction.TensorPictures(pixels)
    expected = F.interpolate(pixels, (224, 224), mode="bilinear", align_corners=False)
    assert (made.decode_uint8(1) / 255 - expected[1]).abs().max() <= 0.5 / 255 + 1e-5
    assert made.identity != extraction.TensorPictures(1 - pixels).identity
    grey = extraction.TensorPictures(pixels[:, :1]).decode_uint8(0)
    assert grey.shape == (3, 224, 224) and torch.equal(grey[0], grey[2])
    with pytest.raises(ValueError, match="outside"):
        extraction.TensorPictures(pixels * 2)


def test_colored_mnist_end_to_end(tmp_path, data_dir):
    options = [
        "use_feature_extractor=true", "feature_extractor_weights=random",
        "feature_extractor_resnet_intermediate_layer=layer1", "num_train_samples=40",
        "num_test_samples=8", "epochs=1", "wandb.enable=false", "use_dfr=false",
        "dfr_val_ratio=0.2", f"data_dir={data_dir}", f"results_dir={tmp_path}",
        f"features_cache_dir={tmp_path}/cache", "num_workers=0",
    ]  # fmt: skip
    (tmp_path / "config.yaml").write_text("")
    assert main.main(["--config", str(tmp_path / "config.yaml"), *options]) == 0
    (environment,) = tmp_path.glob("*/environment.json")
    record = json.loads(environment.read_text())["features"]
    assert record["weights"].startswith("random-0 of torch") and record["layer"] == "layer1-1x1"
    assert set(record["files"]) == {"train", "test", "dfr"}


def test_loader_leaves_pixels_to_the_extractor(extractor_settings):
    splits = data_loader.load(extractor_settings(normalize_inputs=True))
    assert splits.train.inputs.max() == 1


DRIVER = """
import sys
import feature_extractor
from lab.features import extraction
extraction.SHARD = 4
sys.exit(feature_extractor.main(sys.argv[1:]))
"""


@pytest.fixture
def command(tmp_path, data_dir):
    """Arguments of the command line, and the environment, of a small extraction."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "config.yaml").write_text("")
    arguments = [
        "--config", str(tmp_path / "config.yaml"), "feature_extractor_weights=random",
        "num_train_samples=48", "num_test_samples=8", "feature_extractor_batch_size=2",
        f"data_dir={data_dir}", "num_workers=1",
        "feature_extractor_resnet_intermediate_layer=layer2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return tmp_path, arguments, environment


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_torchrun_and_kill_9_give_the_same_files(command, monkeypatch):
    folder, arguments, environment = command
    monkeypatch.setattr(extraction, "SHARD", 4)
    assert feature_extractor.main([*arguments, f"features_cache_dir={folder}/single"]) == 0
    single = files_of(folder / "single")
    assert len(single) == 3

    killed = folder / "killed"
    process = subprocess.Popen(
        [sys.executable, folder / "driver.py", *arguments, f"features_cache_dir={killed}"],
        env=environment, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list(killed.glob("*_train_*.parts/0*.safetensors"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(killed.glob("*.parts")) and len(files_of(killed)) < 3
    assert feature_extractor.main([*arguments, f"features_cache_dir={killed}"]) == 0
    assert files_of(killed) == single

    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node=2", folder / "driver.py", *arguments,
            f"features_cache_dir={folder}/ranks",
        ],
        env=environment, check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    assert files_of(folder / "ranks") == single
