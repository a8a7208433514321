"""WaterBirds: birds (y: 0 land, 1 water) in front of backgrounds (place: 0 land, 1 water).

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020. The public Kaggle
upload `archive.zip` is read in place and never unpacked (see `picture_files`); an unpacked folder
works as well.
"""

import csv
import hashlib
import io
import itertools
from pathlib import Path

import numpy as np

from lab.system.errors import DataError
from lab.system.picture_files import (
    Archive,
    Damaged,
    Folder,
    NamedPictures,
    leaves_folder,
    raise_problems,
)

PAGE = "https://www.kaggle.com/datasets/bahardibaie/waterbird"
HOME = "waterbirds_v1.0"
KAGGLE_FOLDER, ORIGINAL_FOLDER = "waterbird", "waterbird_complete95_forest2water2"
METADATA = "metadata.csv"
MAX_ROWS, MAX_METADATA = 100_000, 16 * 2**20  # bytes; the real one has 11,788 rows in 1.3 MB
MAX_BYTES = 8 * 2**30  # of the whole archive, unpacked; the real one has below 1 GiB
TRAIN, VAL, TEST = 0, 1, 2
VALUES = {"y": (0, 1), "split": (TRAIN, VAL, TEST), "place": (0, 1)}
COLUMNS = ("img_filename", *VALUES)


class WaterBirds(NamedPictures):
    """The rows of `metadata.csv` and their pictures.

    y, place, split: (N,) int64; rows: (N,) row numbers in metadata.csv, in which the header is
    row 1.
    """

    def __init__(self, storage: Archive | Folder, prefix: str):
        self.metadata = f"{storage.path}/{prefix}{METADATA}"
        try:
            data = storage.read(prefix + METADATA)
        except Damaged as error:
            raise DataError(f"{self.metadata}: {error}; download it again") from None
        self.digest = hashlib.sha256(data).hexdigest()
        names, values = _parse(data, self.metadata)
        super().__init__(storage, [prefix + name for name in names])
        self.rows, self.y, self.split, self.place = (
            np.array([row[column] for row in values]) for column in ("row", *VALUES)
        )

    def place_of(self, i: int) -> str:
        """Where picture i is, for messages: its file and its row of the metadata."""
        return f"{super().place_of(i)} ({METADATA}, row {self.rows[i]})"

    def identity(self) -> dict:
        """Plain data that change with the pictures and metadata, for the keys of caches."""
        return {"source": "WaterBirds", "metadata_sha256": self.digest} | self.files_identity


def load(data_dir) -> WaterBirds:
    """WaterBirds in `data_dir`: `waterbirds_v1.0/archive.zip`, or unpacked.

    Raises `DataError` when it is missing (saying where to get it), or when the archive or
    metadata.csv are not usable.
    """
    data_dir = Path(data_dir)
    try:
        return _find(data_dir)
    except OSError as error:
        raise DataError(f"data_dir: {data_dir} cannot be read, {error.strerror}") from None


def _find(data_dir: Path) -> WaterBirds:
    home = data_dir / HOME
    archive = home / "archive.zip"
    if archive.is_file():
        storage = Archive(archive, MAX_BYTES)
        for prefix in (f"{KAGGLE_FOLDER}/", f"{ORIGINAL_FOLDER}/", ""):
            if prefix + METADATA in storage:
                return WaterBirds(storage, prefix)
        raise DataError(
            f"{archive}: holds no {KAGGLE_FOLDER}/{METADATA}; download archive.zip of {PAGE} again"
        )
    for folder in (
        home / KAGGLE_FOLDER,
        home / ORIGINAL_FOLDER,
        home,
        data_dir / ORIGINAL_FOLDER,
    ):
        if (folder / METADATA).is_file():
            return WaterBirds(Folder(folder), "")
    raise DataError(
        f"dataset_name: WaterBirds is not in {data_dir}; download archive.zip from {PAGE} (data "
        f"set bahardibaie/waterbird) and put it at {archive}; it need not be unpacked. The "
        f"unpacked folder {home / KAGGLE_FOLDER} or {data_dir / ORIGINAL_FOLDER} does as well"
    )


def _parse(data: bytes, path: str) -> tuple[list[str], list[dict]]:
    """File names, and {column: value} with the row number, of metadata.csv.

    Raises `DataError` that names file, row and value.
    """
    if len(data) > MAX_METADATA:
        raise DataError(f"{path}: {len(data)} bytes; allowed: up to {MAX_METADATA}")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [column.strip() for column in next(reader, [])]
        table = [(reader.line_num, row) for row in itertools.islice(reader, MAX_ROWS + 1)]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV ({error})") from None
    raise_problems([f"{path}: no column {column}" for column in COLUMNS if column not in header])
    twice = [column for column in COLUMNS if header.count(column) > 1]
    raise_problems([f"{path}: the column {column} occurs twice" for column in twice])
    if len(table) > MAX_ROWS:
        raise DataError(f"{path}: more than {MAX_ROWS} rows")
    table = [(number, row) for number, row in table if row]
    raise_problems([] if table else [f"{path}: no rows"])

    problems, names, values = [], [], []
    first: dict[str, int] = {}  # row of each file name
    for number, cells in table:
        where = f"{path}, row {number}"
        if len(cells) != len(header):
            problems.append(f"{where}: {len(cells)} values instead of {len(header)}")
            continue
        row = dict(zip(header, (cell.strip() for cell in cells)))
        for column, allowed in VALUES.items():
            if row[column] not in map(str, allowed):
                shown = ", ".join(map(str, allowed))
                problems.append(f"{where}: {column} is {row[column]!r}; allowed: {shown}")
        name = row["img_filename"]
        if leaves_folder(name):
            problems.append(f"{where}: img_filename is {name!r}, which leads out of the folder")
        if name in first:
            problems.append(f"{where}: img_filename {name!r} is in row {first[name]} already")
        first[name] = number
        names.append(name)
        values.append({column: row[column] for column in VALUES} | {"row": number})
    raise_problems(problems)
    return names, [{column: int(value) for column, value in row.items()} for row in values]
