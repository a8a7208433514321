"""Files of features that are damaged or belong to other pictures are never used."""

import json
import pickle
import struct

import hypothesis
import pytest
import safetensors.torch
import torch
from helpers import limited
from hostile import cached, damaged, refused
from hypothesis import strategies as st

from lab.features import cache as feature_cache
from lab.features import extraction as feature_extractor
from lab.networks import weights as weight_files
from lab.system.errors import UserError

HEADERS = [
    b"",
    b"\0\0\0",
    cached(size=2**62),
    cached(size=2**64 - 1),
    cached(size=10**8),
    struct.pack("<Q", 10**5) + b"[" * 10**5,
    struct.pack("<Q", 5 * 10**4) + b'{"a":' * 10**4,
    cached(shape=[2**60, 1]),
    cached(shape=[2**63, 2**63]),
    cached(shape=[-1, 4]),
    cached(shape=[1] * 70 + [4]),
    cached(shape=[4]),
    cached(shape=[], data_offsets=[0, 4], data=bytes(4)),
    cached(shape=[0, 2**40], data_offsets=[0, 0], data=b""),
    cached(shape=[2, 0], data_offsets=[0, 0], data=b""),
    cached(data_offsets=[0, 2**50]),
    cached(data_offsets=[16, 0]),
    cached(dtype="F64"),
    cached(dtype="I32"),
    cached(dtype="OBJECT"),
    cached(data=bytes(15)),
    cached(data=bytes(17)),
    cached(),
    pickle.dumps([1, 2]),
    safetensors.torch.save({"other": torch.ones(2, 2)}),
    safetensors.torch.save({"features": torch.ones(2, 2)}, {"sha256": "0" * 64}),
]


def test_absurd_files_of_features(tmp_path):
    path = tmp_path / f"x_{'0' * 16}.safetensors"
    for content in HEADERS:
        path.write_bytes(content)
        refused(lambda: feature_cache.read(path), kind=feature_cache.Damaged)
        with limited():
            assert feature_cache.listing(tmp_path)[-1].endswith(f"1 files in {tmp_path}")
            (line,) = feature_cache.prune(tmp_path)
        assert line.startswith("removed (damaged: ") and not path.exists(), content[:99]


def test_features_larger_than_any_machine(tmp_path):
    path = tmp_path / "sparse.safetensors"
    header = cached(shape=[5 * 10**8, 500], data_offsets=[0, 10**12], data=b"")
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 10**12)
    refused(lambda: feature_cache.read(path), kind=feature_cache.Damaged)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 99_999_999))
        file.truncate(10**12)
    refused(lambda: feature_cache.read(path), kind=feature_cache.Damaged)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    feature_cache.write(path, [torch.arange(6.0).view(3, 2)], {"key": "k"})
    return path


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.data())
def test_damaged_features_are_never_taken_up(features, data):
    good = features.read_bytes()
    changed = data.draw(damaged([good]))
    hypothesis.assume(changed != good)
    path = features.with_name("changed.safetensors")
    path.write_bytes(changed)
    try:
        with limited():
            found = feature_cache.read(path, "k", rows=3)
    except feature_cache.Damaged:
        return
    assert torch.equal(found, torch.arange(6.0).view(3, 2))  # only what tells nothing differs


def test_features_of_other_pictures_are_not_taken_up(features):
    assert feature_cache.read(features, "k", rows=3).shape == (3, 2)
    for key, rows in (("other", 3), ("k", 2), ("k", 4)):
        with pytest.raises(feature_cache.Damaged):
            feature_cache.read(features, key, rows=rows)


def test_damaged_hashes_of_weights_are_made_again(tmp_path, monkeypatch):
    weights, kept = tmp_path / "weights.pth", tmp_path / feature_cache.WEIGHT_HASHES
    weights.write_bytes(b"weights")
    right = weight_files.file_hash(weights)
    assert feature_extractor._weights_id(tmp_path, weights, None, 0) == right
    ((path, entry),) = json.loads(kept.read_text()).items()
    for damage in (
        b"", b"[", b"[]", b"5", b"null", b"\xff\xfe", b"\0", b"[" * 10**5, b"9" * 5000,
        b'{"a": 1}', *(json.dumps({path: wrong}).encode() for wrong in (
            entry[:3], [*entry[:3], 5], [*entry[:3], "x" * 64], [*entry, 1], {"0": 1}, "abcd", None
        )),
        b" " * feature_extractor.MAX_HASHES + b"{}",
    ):  # fmt: skip
        kept.write_bytes(damage)
        with limited():
            assert feature_extractor._weights_id(tmp_path, weights, None, 0) == right, damage[:50]
        assert json.loads(kept.read_text()) == {path: entry}
    kept.unlink()
    kept.mkdir()
    refused(
        lambda: feature_extractor._weights_id(tmp_path, weights, None, 0),
        "features_cache_dir",
        kind=UserError,
    )
    refused(
        lambda: feature_extractor._weights_id(tmp_path, tmp_path / "gone.pth", None, 0),
        "feature_extractor_weights",
        "gone.pth",
    )
