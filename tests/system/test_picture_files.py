"""Pictures that others made: bombs are refused by name, soon, in little memory."""

import contextlib
import io
import struct
import zlib

import hypothesis
import pytest
from helpers import limited
from hostile import damaged, refused
from PIL import Image

from lab.system import picture_files


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


def bombs():
    """(data, reason) of pictures that are refused."""
    zeros = zlib.compress(bytes(300 * 2**20), 1)
    large = "10000×10000 pixels; allowed: up to 16777216 in all, 16384 a side"
    yield png(2**31 - 1, 2**31 - 1), "pixels"
    yield png(30_000, 30_000), "pixels"
    yield png(10_000, 10_000), large
    yield png(1, 16_000_000), "1×16000000 pixels"
    yield png(16_385, 1), "16385×1 pixels"
    yield png(0, 5), "not a readable picture"
    yield png(4000, 4000), "not a readable picture"
    yield png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros), bytes(200)), "not a readable picture"
    yield png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros), bytes(200)), "not a readable picture"
    yield many_scans(500_000), "more than 100 scans"
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"
    yield encoded(Image.new("L", (5, 5)), "TIFF"), "none of JPEG, PNG"
    yield b"", "none of JPEG, PNG"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_bombs():
    for data, reason in bombs():
        refused(lambda data=data: picture_files.decode(data), reason, kind=picture_files.Damaged)


def largest():
    """Pictures at the bounds."""
    yield encoded(Image.new("RGBA", (4096, 4096)), "PNG")
    yield encoded(Image.new("CMYK", (4096, 4096)), "JPEG")
    yield many_scans(20)
    yield png(8, 8, pixels=bytes(200 * 2**20))  # more pixels than the header says are left out


def test_the_largest_pictures_stay_within_bounds():
    for data in largest():
        with limited(memory=300 * 2**20):
            assert picture_files.decode(data).shape == (3, 224, 224)


PICTURES = [
    encoded(Image.effect_noise((40, 30), 50).convert("RGB"), kind, **options)
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}))
]


@hypothesis.settings(max_examples=150)
@hypothesis.given(damaged(PICTURES))
def test_damaged_pictures_are_read_or_refused(data):
    with limited(), contextlib.suppress(picture_files.Damaged):
        assert picture_files.decode(data).shape == (3, 224, 224)
