"""Picture files in a zip archive or a folder: opened safely, read and decoded one at a time.

Archives are read in place and never unpacked: a killed run leaves nothing half done, no disk fills
up, and no member can land outside a folder; reading a picture from an archive is as fast as from a
file of its own. Both kinds of storage keep no file open: they can be used from any number of
threads, and pickled or forked into other processes.
"""

import functools
import hashlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lab.system import zip_files
from lab.system.errors import DataError

SIDE = 224
MAX_FILE_BYTES = 64 * 2**20
# Of one picture. PIL itself decodes up to 179 million pixels, and any number of scans, each of
# which takes as long as a picture but few bytes; 1 to 12 are usual.
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 2**24, 2**14, 100
MAX_MEMBERS = 1_000_000
FORMATS = ("JPEG", "PNG")  # PIL reads many more, some by starting other programs
LISTED = 10  # problems in one message


class Damaged(Exception):
    """The content of a file is not usable; the text says why."""


class BadPicture(DataError):
    """One picture is not readable; the text names the file and its row of the metadata."""


def decode(data: bytes, side=SIDE, exact=None, box=None) -> np.ndarray:
    """A picture as RGB, resized to (3, side, side) uint8 (bilinear, antialiased).

    side: None: not resized; exact: the only allowed (width, height); box: (left, top, right,
    bottom) of a crop before resizing. Raises `Damaged` for data that are not a picture, are cut
    off, too large or not of the `exact` size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                allowed = f"up to {MAX_PIXELS} in all, {MAX_SIDE} a side"
                raise Damaged(f"{width}×{height} pixels; allowed: {allowed}")
            if exact and picture.size != exact:
                raise Damaged(f"{width}×{height} pixels; allowed: {exact[0]}×{exact[1]}")
            if picture.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
                raise Damaged(f"more than {MAX_SCANS} scans")
            # Not with Image.draft: scaling inside the JPEG decoder changes pixels by up to 50.
            image = rgb(picture)
            if box:
                image = image.crop(box)
            if side:
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)  # decodes, while the file is open
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # PIL raises errors of many kinds for damaged files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else error
        raise Damaged(f"not a readable picture ({reason})") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode that JPEG and PNG have, in RGB.

    16-bit grey is divided by 257, the ratio of the ranges; PIL by itself would cut it off at 255,
    which is white. Transparency and a camera's rotation (EXIF) are left out, as by the loaders of
    published code. Raises `Damaged` for values beyond 16 bits.
    """
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= 65_535):
            raise Damaged(f"values from {values.min():g} to {values.max():g}; allowed: 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def leaves_folder(name: str) -> bool:
    """Whether a relative file name would land outside its folder, on any system."""
    parts = re.split(r"[/\\]", name)
    return not name or parts[0] == "" or ":" in parts[0] or ".." in parts or "\0" in name


def raise_problems(problems: list[str]) -> None:
    """Raises `DataError` with the first problems and the number of the others, if there are any."""
    if problems:
        more = len(problems) - LISTED
        raise DataError(*problems[:LISTED], *([f"… and {more} more"] if more > 0 else []))


class _Member(NamedTuple):
    offset: int
    method: int
    packed: int
    size: int
    crc: int


class Archive:
    """The members of a zip file.

    Raises `DataError` when the file is damaged, or a member has an unsafe or repeated name, is a
    link, is encrypted, is packed in another way than stored or deflated, or is larger than
    `MAX_FILE_BYTES`, or when all together are larger than `max_bytes`.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
            members = zip_files.members(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read, {error.strerror}") from None
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{self.path}: damaged or not downloaded completely ({error}); download it again"
            ) from None
        self._check(members, max_bytes)
        self._members = {
            m.filename: _Member(
                m.header_offset, m.compress_type, m.compress_size, m.file_size, m.CRC
            )
            for m in members
            if not m.is_dir()
        }

    @functools.cached_property
    def digest(self) -> str:
        """Changes with the names, sizes and checksums of the members."""
        listing = sorted((name, m.size, m.crc) for name, m in self._members.items())
        return hashlib.sha256(repr(listing).encode()).hexdigest()

    def _check(self, members: list[zipfile.ZipInfo], max_bytes: int) -> None:
        problems, seen = [], set()
        for m in members:
            reason = None
            if leaves_folder(m.filename):
                reason = "a name that leads out of the folder"
            elif m.filename in seen:
                reason = "the name of another member"
            elif stat.S_ISLNK(m.external_attr >> 16):
                reason = "a symbolic link"
            elif m.flag_bits & 0x1:
                reason = "encrypted"
            elif m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = "packed in another way than stored or deflated"
            elif m.file_size > MAX_FILE_BYTES:
                reason = f"{m.file_size} bytes unpacked; allowed: up to {MAX_FILE_BYTES}"
            if reason:
                problems.append(f"{self.path}: not used, its member {m.filename!r}: {reason}")
            seen.add(m.filename)
        total = sum(m.file_size for m in members)
        if total > max_bytes:
            problems.append(
                f"{self.path}: not used, {total} bytes unpacked; allowed: up to {max_bytes}"
            )
        if len(members) > MAX_MEMBERS:
            problems.append(
                f"{self.path}: not used, {len(members)} members; allowed: up to {MAX_MEMBERS}"
            )
        raise_problems(problems)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """A member's bytes. Raises `Damaged` or, when the archive cannot be read, `DataError`."""
        member = self._members[name]
        try:
            with open(self.path, "rb") as file:
                file.seek(member.offset)
                header = file.read(30)
                if len(header) < 30 or header[:4] != b"PK\3\4":
                    raise Damaged("the archive has no member at the stated offset")
                file.seek(sum(struct.unpack("<HH", header[26:])), io.SEEK_CUR)
                data = file.read(member.packed)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read, {error.strerror}") from None
        if member.method == zipfile.ZIP_DEFLATED:
            try:
                # Whatever the stream holds, no more than the stated size is unpacked.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error as error:
                raise Damaged(f"damaged in the archive ({error})") from None
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise Damaged("damaged in the archive (wrong size or checksum)")
        return data


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def __contains__(self, name: str) -> bool:
        # Unlike Path.is_file, no error for names that the file system does not take.
        return os.path.isfile(self.path / name)

    def fingerprint(self, name: str) -> tuple[str, int, int]:
        """Name, bytes and time of change of a file."""
        stat = (self.path / name).stat()
        return name, stat.st_size, stat.st_mtime_ns

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `Damaged` or, when it cannot be read, `DataError`."""
        try:
            with open(self.path / name, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise DataError(f"{self.path / name}: cannot be read, {error.strerror}") from None
        if len(data) > MAX_FILE_BYTES:
            raise Damaged(f"too large; allowed: up to {MAX_FILE_BYTES} bytes")
        return data


class NamedPictures:
    """Pictures with names in a storage: the base of sources, which read a table of labels besides.

    names: N file names; missing: (N,) bool, names without a file; side: of decoded pictures.
    """

    augments = False  # whether `decode` takes a generator for random crops

    def __init__(self, storage: Archive | Folder, names: list[str], side: int = SIDE):
        self.storage, self.names, self.side = storage, names, side
        self.missing = np.array([name not in storage for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def place_of(self, i: int) -> str:
        """Where picture i is, for messages."""
        return f"{self.storage.path}/{self.names[i]}"

    def check_missing(self) -> None:
        """Raises `DataError` naming the pictures without their file."""
        raise_problems(
            [
                f"{self.place_of(i)}: no such file; download the data again, or set "
                "on_bad_image: skip"
                for i in np.flatnonzero(self.missing).tolist()
            ]
        )

    def _decode(self, data: bytes, rng) -> np.ndarray:
        return decode(data, self.side)

    def decode(self, i: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Picture i, (3, side, side) uint8. Raises `BadPicture` naming its file.

        rng: for a random crop, where the source `augments`.
        """
        if self.missing[i]:
            raise BadPicture(f"{self.place_of(i)}: no such file")
        try:
            return self._decode(self.storage.read(self.names[i]), rng)
        except Damaged as error:
            raise BadPicture(
                f"{self.place_of(i)}: {error}; download the data again, or set on_bad_image: skip"
            ) from None

    @functools.cached_property
    def files_identity(self) -> dict:
        """Plain data that change with the files."""
        if isinstance(self.storage, Archive):
            return {"archive_bytes": self.storage.size, "members_sha256": self.storage.digest}
        present = [name for name, missing in zip(self.names, self.missing) if not missing]
        prints = [self.storage.fingerprint(name) for name in present]
        return {"files_sha256": hashlib.sha256(repr(prints).encode()).hexdigest()}
