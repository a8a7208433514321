"""Files of weights never run code; damaged and hostile ones are refused by name."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hostile import cached, npz, refused

from lab.features import backbones


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def repacked(data, method):
    """The same zip file, its members packed in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", method) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["ResNet18", "timm:resnet10t"])
def test_hostile_weights(settings, tmp_path, intruder, name):
    plain = saved({"conv1.weight": torch.zeros(10)})
    hostile = {
        "pickle.pth": pickle.dumps(intruder),
        "old_pickle.pth": pickle.dumps(intruder, protocol=0),
        "pickle.bin": pickle.dumps({"conv1.weight": intruder}),
        "pickle.safetensors": pickle.dumps(intruder),
        "in_a_zip.pth": saved({"conv1.weight": intruder}),
        "not_zipped.pth": saved({"a": intruder}, _use_new_zipfile_serialization=False),
        "objects.pth": npz(w=np.array([intruder], dtype=object)),
        "objects.npz": npz(w=np.array([intruder], dtype=object)),
        "cut_off.pth": plain[:-100],
        "zeros.pth": bytes(1000),
        "bomb.pth": repacked(saved({"w": torch.zeros(100 * 2**20)}), zipfile.ZIP_DEFLATED),
        "expanded.pth": saved({"conv1.weight": torch.zeros(1).expand(2**20, 2**20)}),
        "memory.pth": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x7f\x85R.",
        "nested.pth": saved({"state_dict": {"state_dict": 1}}),
        "numbers.pth": saved({1: 2}),
        "absurd.safetensors": cached(shape=[2**60, 1]),
    }
    base = settings(use_feature_extractor=True, feature_extractor_model_name=name)
    spec = backbones.resolve(base)
    backbones.build(base, spec, None, "cpu")  # imports take time and memory
    for file, content in hostile.items():
        path = tmp_path / file
        path.write_bytes(content)
        config = base.model_copy(update={"feature_extractor_weights": str(path)})
        found = backbones.find_weights(config, spec)
        (line,) = refused(lambda found=found: backbones.build(base, spec, found, "cpu"), path)
        assert "weights_only" not in line  # no advice to switch the safety off
        assert ("bytes packed into" in line) == (file == "bomb.pth"), line


def test_weights_that_are_no_file(settings, tmp_path):
    for given in ("~nobody-of-this-name/x.pth", "x" * 300, "/dev/zero", str(tmp_path)):
        config = settings(use_feature_extractor=True, feature_extractor_weights=given)
        spec = backbones.resolve(config)
        refused(lambda c=config, s=spec: backbones.find_weights(c, s), "there is no file", given)
