"""CelebA: 202,599 faces with 40 binary attributes, in three official splits.

Liu et al., "Deep Learning Face Attributes in the Wild", 2015. Expected in `data/celeba/`, put there
by hand, in torchvision's layout or as the archive of Kaggle; archives are read in place (see
`picture_files`).
"""

import codecs
import difflib
import hashlib
import io
import math
from pathlib import Path

import numpy as np

from lab.system.errors import DataError
from lab.system.picture_files import (
    SIDE,
    Archive,
    Damaged,
    Folder,
    NamedPictures,
    decode,
    leaves_folder,
    raise_problems,
)

HOME = "celeba"
PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
KAGGLE = "https://www.kaggle.com/datasets/jessicali9530/celeba-dataset"
ATTRIBUTES, PARTITION, PICTURES = "list_attr_celeba", "list_eval_partition", "img_align_celeba"
TRAIN, VAL, TEST = 0, 1, 2
SIZE = (178, 218)  # width and height of the aligned faces
CENTRE = (0, 20, 178, 198)  # left, top, right, bottom of the square in their middle
# Of a random crop: share of the picture's area, and width by height.
CROP_SCALE, CROP_RATIO = (0.7, 1.0), (1.0, 4 / 3)
MAX_BYTES = 8 * 2**30  # of an archive, unpacked; the real one has below 2 GiB
MAX_ROWS, MAX_COLUMNS = 1_000_000, 1000


class CelebA(NamedPictures):
    """The faces and their attributes.

    attribute_names: K names; attributes: (N, K) int8, -1 or +1; partition: (N,) int64, `TRAIN`,
    `VAL` or `TEST`; metadata: path of the list of attributes, for messages.
    """

    augments = True

    def __init__(self, storage, prefix: str, side: int, lists, metadata: str):
        names, self.attribute_names, self.attributes, self.partition = lists
        self.metadata = metadata
        super().__init__(storage, [prefix + name for name in names], side)

    def _decode(self, data: bytes, rng) -> np.ndarray:
        """The middle of a face, or a random part of it, mirrored or not."""
        if rng is None:
            return decode(data, self.side, SIZE, CENTRE)
        pixels = decode(data, self.side, SIZE, random_box(rng))
        return np.ascontiguousarray(pixels[..., ::-1]) if rng.integers(2) else pixels

    def attribute(self, name: str) -> np.ndarray:
        """Values (N,) of an attribute. Raises `DataError` with the nearest names if unknown."""
        if name not in self.attribute_names:
            lower = {known.lower(): known for known in self.attribute_names}
            near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
            hint = ", ".join(lower[match] for match in near)
            raise DataError(
                f"groupings: given {name}, but {self.metadata} has no such attribute; "
                + (f"did you mean {hint}?" if hint else f"allowed: {self._known()}")
            )
        return self.attributes[:, self.attribute_names.index(name)]

    def _known(self) -> str:
        return ", ".join(self.attribute_names)

    def identity(self) -> dict:
        """Plain data that change with the pictures, for the keys of caches."""
        names = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {"source": "CelebA", "names_sha256": names} | self.files_identity


def random_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a face.

    Inception's crop (Szegedy et al., 2015): area and side ratio (its logarithm) are uniform in
    `CROP_SCALE` and `CROP_RATIO`, drawn up to ten times until the part fits.
    """
    width, height = SIZE
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return CENTRE  # the largest square that fits, in the middle


def load(data_dir, side: int = SIDE) -> CelebA:
    """CelebA in `data_dir`/celeba, its faces as pictures of side × side pixels.

    Raises `DataError` when it is missing (saying where to get it), or when its lists are damaged.
    """
    home = Path(data_dir) / HOME
    try:
        return _find(home, side)
    except OSError as error:
        raise DataError(f"data_dir: {home} cannot be read, {error.strerror}") from None


def _find(home: Path, side: int) -> CelebA:
    packed = home / "archive.zip"
    archive = Archive(packed, MAX_BYTES) if packed.is_file() else None
    places = [place for place in (Folder(home), archive) if place]
    for place in places:
        for suffix in ("txt", "csv"):
            names = [f"{ATTRIBUTES}.{suffix}", f"{PARTITION}.{suffix}"]
            if all(name in place for name in names):
                lists = _lists(place, *names)
                where = f"{place.path}/{names[0]}"
                storage, prefix = _pictures(home, archive, lists[0][0])
                return CelebA(storage, prefix, side, lists, where)
    raise DataError(
        f"dataset_name: CelebA is not in {home}; put {ATTRIBUTES}.txt, {PARTITION}.txt and the "
        f"folder or zip file {PICTURES} of {PAGE} there, or archive.zip of {KAGGLE}, which need "
        "not be unpacked"
    )


def _pictures(home: Path, archive: Archive | None, first: str):
    """(storage, prefix) of the pictures, of which the first has this name."""
    packed = home / f"{PICTURES}.zip"
    places = [Folder(home), Archive(packed, MAX_BYTES) if packed.is_file() else None, archive]
    for place in places:
        if place is None:
            continue
        for prefix in (f"{PICTURES}/", f"{PICTURES}/{PICTURES}/"):
            if prefix + first in place:
                return place, prefix
    raise DataError(
        f"data_dir: {first} of {ATTRIBUTES} is neither in {home / PICTURES}, nor in "
        f"{PICTURES}.zip or archive.zip in {home}; put the faces of {PAGE} there"
    )


def _lists(place, attributes: str, partition: str):
    """(names, attribute names, (N, K) attributes, (N,) partition) of the two lists."""
    rows, names = _table(place, attributes), f"{place.path}/{attributes}"
    parts = _table(place, partition, columns=1)
    index = [str(name) for name in rows.index]
    raise_problems(
        [f"{names}: {name!r} leads out of the folder" for name in index if leaves_folder(name)]
    )
    where = f"{place.path}/{partition}"
    parts.columns = ["partition"]
    if list(rows.index) != list(parts.index):
        raise_problems(
            [f"{where}: no row of {name}" for name in rows.index[~rows.index.isin(parts.index)]]
            + [f"{names}: no row of {name}" for name in parts.index[~parts.index.isin(rows.index)]]
        )
        parts = parts.loc[rows.index]
    _check_values(rows, names, (-1, 1))
    _check_values(parts, where, (TRAIN, VAL, TEST))
    values = rows.to_numpy().astype(np.int8)
    return index, list(rows.columns), values, parts.iloc[:, 0].to_numpy().astype(np.int64)


def _table(place, name: str, columns: int | None = None):
    """A list of CelebA as a data frame with the file names as its index.

    `.txt` is separated by blanks, and the attributes' starts with its length; `.csv` by commas.
    """
    import pandas  # slow to import, and needed for this source only

    where = f"{place.path}/{name}"
    try:
        data = place.read(name).removeprefix(codecs.BOM_UTF8)
        names, length, sep = None, None, r"\s+"
        if name.endswith(".csv"):
            header, _, data = data.partition(b"\n")
            names, sep = header.decode("utf-8-sig").strip().split(","), ","
        elif columns is None:
            length, _, data = data.partition(b"\n")
            length = int(length)  # else the header would be taken for it
            header, _, data = data.partition(b"\n")
            names = ["image_id", *header.decode().split()]
        if names and len(set(names)) < len(names):
            raise ValueError("a column has the same name as another")
        table = pandas.read_csv(
            io.BytesIO(data), nrows=MAX_ROWS + 1, header=None, sep=sep, low_memory=False
        )
        if names and len(names) != table.shape[1]:
            raise ValueError(f"{table.shape[1]} values a row, {len(names)} names of columns")
        if length not in (None, len(table)):
            raise ValueError(f"{len(table)} rows, {length} by its first line; is it cut off?")
        table.columns = names or table.columns
        table = table.set_index(table.columns[0])
    except Damaged as error:
        raise DataError(f"{where}: {error}; download it again") from None
    except Exception as error:  # pandas lets errors of many kinds out for damaged files
        reason = str(error).partition("\n")[0]
        raise DataError(f"{where}: not readable as a list of CelebA ({reason})") from None
    problems = []
    if not 0 < len(table) <= MAX_ROWS or not 0 < table.shape[1] <= MAX_COLUMNS:
        problems.append(f"{where}: {len(table)} rows of {table.shape[1]} values")
    if columns and table.shape[1] != columns:
        problems.append(f"{where}: {table.shape[1]} values a row instead of {columns}")
    doubled = table.index[table.index.duplicated()]
    problems += [f"{where}: {name!r} is in two rows" for name in doubled]
    raise_problems(problems)
    return table


def _check_values(table, where: str, allowed) -> None:
    import pandas

    # One text value makes all values of its column text.
    numbers = table.apply(pandas.to_numeric, errors="coerce")
    wrong = np.argwhere(~numbers.isin(allowed).to_numpy())
    shown = ", ".join(map(str, allowed))
    raise_problems(
        [
            f"{where}, {table.index[row]}: {table.columns[column]} is "
            f"'{table.iat[row, column]}'; allowed: {shown}"
            for row, column in wrong[:100]
        ]
    )
