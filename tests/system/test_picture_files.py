"""Pictures that others made: bombs are refused by name, soon, in little memory."""

import contextlib
import io
import struct
import zlib

import hypothesis
import numpy as np
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


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def palette(transparent):
    picture = Image.fromarray(COLOURS).quantize(64)
    if transparent:
        picture.info["transparency"] = bytes(range(64))
    return picture


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return exif.tobytes()


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (encoded(Image.fromarray(COLOURS), "PNG"), COLOURS, 0),
        (encoded(Image.fromarray(RAMP), "PNG"), RAMP, 0),
        (encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"), RAMP, 0),
        (encoded(Image.fromarray(RAMP > 127), "PNG"), np.where(RAMP > 127, 255, 0), 0),
        (encoded(Image.fromarray(np.stack([RAMP, RAMP.T], -1), "LA"), "PNG"), RAMP, 0),
        (encoded(Image.fromarray(COLOURS).convert("RGBA"), "PNG"), COLOURS, 0),
        (encoded(palette(False), "PNG"), COLOURS, 40),
        (encoded(palette(True), "PNG"), COLOURS, 40),
        (encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=100), COLOURS, 70),
        (encoded(Image.fromarray(RAMP), "JPEG", quality=100, exif=rotated()), RAMP, 3),
    ],
    ids=["RGB", "L", "16 bits", "1 bit", "LA", "RGBA", "P", "P, transparent", "CMYK", "EXIF"],
)
def test_every_mode_has_a_defined_conversion(data, expected, tolerance):
    found = picture_files.decode(data, side=None).transpose(1, 2, 0).astype(int)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.abs(found - expected).max() <= tolerance
    assert np.abs(found - expected).mean() <= tolerance / 4
