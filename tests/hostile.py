"""Damaged and hostile files, and how they must be refused: shared by the rooms' tests."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from helpers import limited
from hypothesis import strategies as st

from lab.system.errors import DataError


class Intruder:
    """Would make a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def refused(work, *names, kind=DataError, seconds=2, memory=250 * 2**20):
    """What `work` is refused with: one printable line a problem, with these names in it."""
    with limited(seconds, memory), pytest.raises(kind) as caught:
        work()
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() and len(line) <= 5000 for line in lines)
    for name in names:
        assert str(name) in lines[0]
    return lines


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


def damaged(contents):
    """The contents with a few bytes changed, or cut off."""

    @st.composite
    def changed(draw):
        data = bytearray(draw(st.sampled_from(contents)))
        for _ in range(draw(st.integers(0, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])

    return changed()


def cached(size=None, data=bytes(16), **facts):
    """A file of features 2 × 2 with these facts changed in its header."""
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | facts
    header = json.dumps({"features": tensor}).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data
