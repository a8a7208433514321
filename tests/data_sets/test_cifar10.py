"""CIFAR-10 from small folders of pictures and from small batches in torchvision's format."""

import hashlib
import io
import pickle
import socket
import tarfile
import urllib.error

import numpy as np
import pytest
from material import cifar10_pictures, write_cifar10
from PIL import Image
from torchvision.datasets import CIFAR10, utils

from lab.data_sets.sources import cifar10
from lab.system.errors import DataError


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(url, **_):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(utils, "_get_redirect_url", unreachable)


@pytest.fixture
def small_original(tmp_path, monkeypatch, no_network):
    """Batches of 10 and 10 pictures, with their checksums where torchvision keeps those of the
    real ones; returns (data_dir, pictures of both parts, labels of both parts).
    """
    folder = tmp_path / cifar10.BATCHES
    folder.mkdir()
    images, labels = cifar10_pictures(20), np.arange(20) * 3 % 10
    contents = {
        name: {"data": images[part].reshape(10, -1), "labels": labels[part].tolist()}
        for name, part in (("data_batch_1", slice(0, 10)), ("test_batch", slice(10, 20)))
    }
    contents["batches.meta"] = {"label_names": list(cifar10.CLASSES)}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5(folder / name)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path, images, labels


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def problem(data_dir, **options):
    with pytest.raises(DataError) as error:
        cifar10.load(data_dir, **options)
    return str(error.value)


def test_the_original(small_original):
    data_dir, images, labels = small_original
    train, test, origin = cifar10.load(data_dir)
    assert np.array_equal(train.images, images[:10]) and np.array_equal(test.images, images[10:])
    assert train.labels.tolist() == labels[:10].tolist()
    assert test.labels.tolist() == labels[10:].tolist()
    assert origin == f"the original, {data_dir / cifar10.BATCHES}"
    train, _, _ = cifar10.load(data_dir, ("automobile", "truck"))
    assert np.array_equal(train.images, images[:10][np.isin(labels[:10], (1, 9))])
    assert set(train.labels.tolist()) == {1, 9}


def test_the_original_goes_before_the_folder(small_original):
    data_dir, images, _ = small_original
    write_cifar10(data_dir)
    train, _, origin = cifar10.load(data_dir)
    assert np.array_equal(train.images, images[:10])
    assert origin.startswith("the original")


def packed(data_dir, monkeypatch):
    """The batches as an archive alone, with its checksum where torchvision keeps the real one's."""
    archive = data_dir / cifar10.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(data_dir / cifar10.BATCHES, cifar10.BATCHES)
    for file in (data_dir / cifar10.BATCHES).iterdir():
        file.unlink()
    (data_dir / cifar10.BATCHES).rmdir()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    return archive


def test_the_archive_alone(small_original, monkeypatch):
    data_dir, images, _ = small_original
    packed(data_dir, monkeypatch)
    train, _, _ = cifar10.load(data_dir)
    assert np.array_equal(train.images, images[:10])


def test_a_truncated_archive(small_original, monkeypatch):
    data_dir, _, _ = small_original
    archive = packed(data_dir, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-1000])
    message = problem(data_dir)
    assert f"is damaged in {data_dir} (wrong checksum: {cifar10.ARCHIVE})" in message
    assert f"put {cifar10.PAGE} there" in message
    assert "no network here" in message and "\n" not in message


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_changed_batch_is_never_unpickled(small_original, name):
    """torchvision must compare the checksums before it unpickles: what this source relies on."""
    data_dir, _, _ = small_original
    batch, trap = data_dir / cifar10.BATCHES / name, data_dir / "sprung"
    good = batch.read_bytes()
    pickle.loads(pickle.dumps(Trap(trap))).close()
    trap.unlink()  # so it does spring
    batch.write_bytes(pickle.dumps(Trap(trap)))
    message = problem(data_dir)
    assert f"wrong checksum: {cifar10.BATCHES}/{name}" in message
    assert f"delete {batch.parent}, and put {cifar10.PAGE} there" in message
    assert not trap.exists()
    batch.write_bytes(good[:-1])
    assert f"wrong checksum: {cifar10.BATCHES}/{name}" in problem(data_dir)
    batch.unlink()
    assert "CIFAR-10 is incomplete in" in problem(data_dir)


def test_missing_and_offline(tmp_path, no_network):
    message = problem(tmp_path)
    assert f"CIFAR-10 is not in {tmp_path} and cannot be downloaded" in message
    assert "no network here" in message and "\n" not in message
    assert cifar10.PAGE in message and str(tmp_path / "cifar10" / "train") in message


def test_a_download_does_not_wait_for_long(tmp_path, monkeypatch):
    seen = []

    def download(self):
        seen.append(socket.getdefaulttimeout())
        raise urllib.error.URLError(TimeoutError("timed out"))

    monkeypatch.setattr(CIFAR10, "download", download)
    before = socket.getdefaulttimeout()
    assert "timed out" in problem(tmp_path)
    assert seen == [cifar10.TIMEOUT]
    assert socket.getdefaulttimeout() == before


def test_a_folder_of_pictures(tmp_path, caplog):
    written = write_cifar10(tmp_path, train=3, test=2)
    (tmp_path / "cifar10" / "train" / "truck" / ".0000.png").write_bytes(b"no picture")
    (tmp_path / "cifar10" / "train" / "truck" / "notes.txt").write_text("no picture")
    with caplog.at_level("WARNING", logger="spurious"):
        train, test, origin = cifar10.load(tmp_path)
    assert np.array_equal(train.images, written["train"])
    assert np.array_equal(test.images, written["test"])
    assert train.labels.tolist() == np.repeat(np.arange(10), 3).tolist()
    assert test.labels.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert origin == f"pictures in {tmp_path / 'cifar10'}, 50 of them"
    assert "airplane has 3 pictures instead of 5000 (and 19 more folders)" in caplog.text


def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    written = write_cifar10(tmp_path, train=3, test=2)
    monkeypatch.setattr(cifar10, "CHUNK", 7)
    for workers in (0, 2, None):
        train, test, _ = cifar10.load(tmp_path, workers=workers)
        assert np.array_equal(train.images, written["train"])
        assert np.array_equal(test.images, written["test"])


def test_only_the_classes_that_are_needed_are_read(tmp_path):
    written = write_cifar10(tmp_path, classes=("automobile", "truck"))
    train, _, _ = cifar10.load(tmp_path, ("automobile", "truck"))
    assert np.array_equal(train.images, written["train"])
    assert train.labels.tolist() == [1, 1, 9, 9]
    message = problem(tmp_path, classes=("automobile", "ship"))
    assert message.count("no pictures (.jpg, .jpeg, .png)") == 2
    assert str(tmp_path / "cifar10" / "test" / "ship") in message


def test_jpeg_and_grey_pictures(tmp_path):
    classes = ("cat",)
    for part in ("train", "test"):
        folder = tmp_path / "cifar10" / part / "cat"
        folder.mkdir(parents=True)
        Image.new("L", (32, 32), 100).save(folder / "a.JPEG")
        Image.new("RGB", (32, 32), (200, 10, 30)).save(folder / "b.jpg", quality=95)
    train, _, _ = cifar10.load(tmp_path, classes)
    assert (train.images[0] == 100).all()
    assert np.abs(train.images[1].mean((1, 2)) - (200, 10, 30)).max() < 4


def test_unusable_pictures_are_all_named(tmp_path):
    write_cifar10(tmp_path, classes=("cat",))
    folder = tmp_path / "cifar10" / "train" / "cat"
    Image.new("RGB", (33, 32)).save(folder / "0000.png")
    whole = io.BytesIO()
    Image.fromarray(cifar10_pictures(1)[0].transpose(1, 2, 0)).save(whole, "PNG")
    (folder / "0001.png").write_bytes(whole.getvalue()[:-500])
    lines = problem(tmp_path, classes=("cat",)).splitlines()
    assert len(lines) == 2
    assert lines[0] == f"{folder / '0000.png'}: 33×32 pixels; allowed: 32×32"
    assert lines[1].startswith(f"{folder / '0001.png'}: not a readable picture")
