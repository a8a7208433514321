"""WaterBirds from small archives drawn here: labels, splits, hostile and damaged files, streams."""

import csv
import io
import json
import multiprocessing
import pickle
import shutil
import struct
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import data_loader
import main
import plotting
from lab.analyses import measuring
from lab.config import loading
from lab.data_sets import waterbirds as waterbirds_set
from lab.data_sets.sources import waterbirds
from lab.evaluation import predictions
from lab.splits import groups, pictures, pixels
from lab.system import picture_files
from lab.system.errors import ConfigError, DataError

HEADER = ["img_id", "img_filename", "y", "split", "place", "place_filename"]
# (split, y, place) -> pictures
COUNTS = {
    (0, 0, 0): 12, (0, 0, 1): 5, (0, 1, 0): 4, (0, 1, 1): 10,
    (1, 0, 0): 4, (1, 0, 1): 3, (1, 1, 0): 3, (1, 1, 1): 4,
    (2, 0, 0): 3, (2, 0, 1): 4, (2, 1, 0): 3, (2, 1, 1): 3,
}  # fmt: skip
TRAIN = [12, 5, 4, 10]
VAL = [4, 3, 3, 4]
TEST = [3, 4, 3, 3]


def colour(i, y, place):
    """The colour of the drawn picture i: its labels and its number can be read off."""
    return (40 + 170 * y, 40 + 170 * place, (i * 5) % 256)


def jpeg(i, y, place):
    """A picture of one colour with a dark bird-like spot in a corner, of its own size."""
    picture = Image.new("RGB", (40 + i % 7 * 9, 30 + i % 5 * 11), colour(i, y, place))
    picture.paste((10, 10, 10), (0, 0, 8 + i % 4, 8))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=95)
    return out.getvalue()


def drawn_rows():
    """Rows of metadata.csv, shuffled, and the bytes of their pictures by file name."""
    cells = [cell for cell, n in COUNTS.items() for _ in range(n)]
    np.random.default_rng(0).shuffle(cells)
    rows, files = [], {}
    for i, (split, y, place) in enumerate(map(tuple, np.array(cells).tolist()), 1):
        name = f"{i % 3:03d}.Bird/Bird_{i:04d}.jpg"
        rows.append([str(i), name, str(y), str(split), str(place), f"/x/{i}.jpg"])
        files[name] = jpeg(i, y, place)
    return rows, files


def csv_text(rows, header=HEADER):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def write_archive(path, metadata, files, prefix="waterbird/", method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{prefix}{waterbirds.METADATA}", metadata)
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    return path


@pytest.fixture(scope="module")
def drawn():
    return drawn_rows()


@pytest.fixture(scope="module")
def good(tmp_path_factory, drawn):
    """A data folder with a good archive."""
    folder = tmp_path_factory.mktemp("waterbirds")
    rows, files = drawn
    write_archive(folder / waterbirds.HOME / "archive.zip", csv_text(rows), files)
    return folder


@pytest.fixture
def archive_with(tmp_path, drawn):
    """archive_with(rows=…, files=…, metadata=…) -> a data folder with an archive of these."""

    def make(rows=None, files=None, metadata=None, **options):
        rows = drawn[0] if rows is None else rows
        files = drawn[1] if files is None else files
        folder = tmp_path / "data"
        metadata = csv_text(rows) if metadata is None else metadata
        write_archive(folder / waterbirds.HOME / "archive.zip", metadata, files, **options)
        return folder

    return make


def keys(folder, **changes):
    """Settings that take all of a small WaterBirds."""
    everything = {
        "dataset_name": "WaterBirds",
        "data_dir": str(folder),
        "num_train_samples": None,
        "num_val_samples": None,
        "num_test_samples": None,
        "dfr_val_split_strategy": "original",
    }
    return everything | changes


def load(folder, **changes):
    return data_loader.load(loading.validate(keys(folder, **changes)))


def run(folder, results, **changes):
    """Runs main with a small network; returns (exit code, results folder or None)."""
    small = {
        "results_dir": str(results),
        "hidden_dim": 4,
        "epochs": 2,
        "learning_rate": 0.1,
        "eval_batch_size": 7,
        "dfr_num_retrains": 2,
        "dfr_num_workers": 1,
        "wandb.enable": False,
    }
    overrides = [
        f"{key}={'null' if value is None else value}"
        for key, value in (keys(folder, **small) | changes).items()
    ]
    empty = results.parent / "empty.yaml"
    empty.touch()
    code = main.main(["--config", str(empty), *overrides])
    found = sorted(results.glob("*")) if results.exists() else []
    return code, found[-1] if found else None


def test_splits_groups_and_labels(good):
    splits = load(good)
    assert splits.train.counts == TRAIN
    assert splits.test.counts == TEST
    assert splits.val.counts == splits.dfr.counts == VAL
    for split in splits.named().values():
        assert split.inputs.shape == (len(split), 3, 224, 224)
        expected = [g for g, n in enumerate(split.counts) for _ in range(n)]
        assert split.group.tolist() == expected
        source, rows = split.inputs.source, split.inputs.rows
        assert (2 * source.y[rows] - 1).tolist() == split.y.tolist()
        assert (2 * source.place[rows] - 1).tolist() == split.a.tolist()
    assert splits.group_names[groups.index(1, -1)] == "waterbird, land"
    assert splits.samples["pictures"].shape == (4 + 5 + 8 + 8, 112, 112, 3)


def test_pictures_are_those_of_their_rows(good):
    split = load(good, normalize_inputs=False).train
    for k, batch in enumerate(split.inputs[:]):
        i = split.inputs.rows[k] + 1
        y, place = int(split.y[k] > 0), int(split.a[k] > 0)
        assert (batch[:, -40:, -40:].mean((1, 2)) * 255).tolist() == pytest.approx(
            colour(i, y, place), abs=3
        )


def test_values_norm_and_luminance(good):
    raw = load(good, normalize_inputs=False).test.inputs
    assert raw[:3].dtype == torch.float32
    assert raw[:3].min() >= 0 and raw[:3].max() <= 1
    assert raw.decode_uint8(1).dtype == np.uint8
    torch.testing.assert_close(raw[1:2][0], torch.from_numpy(raw.decode_uint8(1) / 255).float())
    unit = load(good).test.inputs[:]
    norms = raw[:].double().flatten(1).norm(dim=1)
    torch.testing.assert_close(unit, (raw[:] / norms.view(-1, 1, 1, 1)).float())
    grey = load(good, normalize_inputs=False, use_grayscale=True).test.inputs
    assert grey.shape == (len(grey), 1, 224, 224)
    expected = sum(w * raw[:][:, c] for c, w in enumerate(pictures.LUMA))[:, None]
    torch.testing.assert_close(grey[:], expected)
    found = grey.decode_uint8(1)
    assert found.shape == (3, 224, 224) and (found == found[0]).all()
    assert np.abs(found - expected[1].numpy() * 255).max() <= 0.51


def test_indexing_like_a_tensor(good):
    inputs = load(good).train.inputs
    whole = inputs[:]
    index = torch.tensor([5, 0, 5, 30])
    torch.testing.assert_close(inputs[index], whole[index])
    torch.testing.assert_close(inputs[4:9], whole[4:9])
    assert inputs[3:3].shape == (0, 3, 224, 224)
    torch.testing.assert_close(inputs.subset(index)[1:3], whole[index][1:3])
    batches = list(inputs.batches([slice(0, 2), index, slice(30, 31)]))
    assert [len(batch) for batch in batches] == [2, 4, 1]
    torch.testing.assert_close(batches[1], whole[index])
    assert inputs.to("meta")[:2].device.type == "meta"


def test_resizing_is_pils_bilinear(drawn):
    data = drawn[1][drawn[0][0][1]]
    expected = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.BILINEAR)
    assert (picture_files.decode(data) == np.asarray(expected).transpose(2, 0, 1)).all()


def test_grey_and_transparent_files_become_rgb():
    for mode in ("L", "RGBA", "P", "1"):
        out = io.BytesIO()
        Image.new(mode, (9, 5)).save(out, "PNG")
        assert picture_files.decode(out.getvalue()).shape == (3, 224, 224)


def test_caps_are_seeded_subsets(good):
    def rows(**changes):
        return {n: s.inputs.rows.tolist() for n, s in load(good, **changes).named().items()}

    caps = {"num_train_samples": 9, "num_val_samples": 5, "num_test_samples": 6}
    few = rows(**caps)
    assert {name: len(found) for name, found in few.items()} == {
        "train": 9, "val": 5, "test": 6, "dfr": sum(VAL),
    }  # fmt: skip
    assert rows(**caps) == few
    assert rows(**caps, seed=1)["train"] != few["train"]
    everything = rows()
    assert all(set(few[name]) <= set(everything[name]) for name in few)
    assert rows(num_train_samples=1000, num_test_samples=13) == everything
    assert "val" not in rows(num_val_samples=0)


def test_minority_groups_removed(good):
    splits = load(good, remove_minority_groups_train=True)
    assert splits.train.counts == [12, 0, 0, 10]
    assert splits.test.counts == TEST and splits.val.counts == VAL
    assert len(load(good, remove_minority_groups_train=True, num_train_samples=20).train) == 20


def test_hold_out_from_training(good):
    splits = load(good, dfr_val_split_strategy="split_from_train", dfr_val_ratio=0.25)
    assert splits.dfr.counts == [round(0.25 * n) for n in TRAIN]
    assert splits.train.counts == [n - round(0.25 * n) for n in TRAIN]
    assert splits.val.counts == VAL
    rows = np.concatenate([splits.train.inputs.rows, splits.dfr.inputs.rows])
    assert sorted(rows) == sorted(load(good).train.inputs.rows)


def test_folders_hold_the_same_pictures(good, tmp_path, drawn):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(good / waterbirds.HOME / "archive.zip") as archive:
        archive.extractall(unpacked)
    expected = load(good)
    home = waterbirds.HOME
    for k, place in enumerate(
        (
            f"{home}/waterbird",
            home,
            waterbirds.ORIGINAL_FOLDER,
            f"{home}/{waterbirds.ORIGINAL_FOLDER}",
        )
    ):
        shutil.copytree(unpacked / "waterbird", tmp_path / str(k) / place)
        found = load(tmp_path / str(k))
        assert found.train.counts == expected.train.counts
        assert torch.equal(found.train.inputs[:], expected.train.inputs[:])
    rows, files = drawn
    for k, options in enumerate(
        (
            {"prefix": "", "method": zipfile.ZIP_DEFLATED},
            {"prefix": f"{waterbirds.ORIGINAL_FOLDER}/"},
        )
    ):
        path = tmp_path / f"zip{k}" / waterbirds.HOME / "archive.zip"
        write_archive(path, "\ufeff" + csv_text(rows), files, **options)
        assert torch.equal(load(tmp_path / f"zip{k}").train.inputs[:], expected.train.inputs[:])


def test_missing_archive_says_what_to_do(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "bahardibaie/waterbird" in text
    assert str(tmp_path / "waterbirds_v1.0" / "archive.zip") in text


def test_empty_data_folder_is_exit_code_2(tmp_path, capfd):
    code, folder = run(tmp_path / "nothing", tmp_path / "results")
    assert code == 2 and folder is None
    assert "bahardibaie/waterbird" in capfd.readouterr().err


def add_member(folder, name, data=b"x", **attributes):
    info = zipfile.ZipInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    with zipfile.ZipFile(folder / waterbirds.HOME / "archive.zip", "a") as archive:
        archive.writestr(info, data)


@pytest.mark.parametrize(
    "name, attributes, reason",
    [
        ("../evil.jpg", {}, "leads out of the folder"),
        ("waterbird/../../evil.jpg", {}, "leads out of the folder"),
        ("/tmp/evil.jpg", {}, "leads out of the folder"),
        ("..\\evil.jpg", {}, "leads out of the folder"),
        ("C:/evil.jpg", {}, "leads out of the folder"),
        ("waterbird/link.jpg", {"external_attr": 0o120777 << 16}, "symbolic link"),
        ("waterbird/b.jpg", {"compress_type": zipfile.ZIP_BZIP2}, "stored or deflated"),
    ],
)
def test_hostile_members_are_refused(archive_with, tmp_path, name, attributes, reason):
    folder = archive_with()
    before = sorted(tmp_path.rglob("*"))
    add_member(folder, name, **attributes)
    with pytest.raises(DataError, match=reason) as caught:
        load(folder)
    assert repr(name) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_repeated_member_is_refused(archive_with, drawn):
    folder = archive_with()
    with pytest.warns(UserWarning, match="Duplicate name"):
        add_member(folder, f"waterbird/{drawn[0][0][1]}")
    with pytest.raises(DataError, match="the name of another member"):
        load(folder)


def test_bombs_are_refused(archive_with, monkeypatch):
    folder = archive_with()
    size = picture_files.MAX_FILE_BYTES + 1
    add_member(folder, "waterbird/zeros.jpg", bytes(size), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=f"{size} bytes unpacked"):
        load(folder)
    monkeypatch.setattr(waterbirds, "MAX_BYTES", 10_000)
    with pytest.raises(DataError, match="allowed: up to 10000"):
        load(folder)


def patch_entry(folder, name, offset, value):
    """Overwrites bytes of a member's entry in the central directory."""
    path = folder / waterbirds.HOME / "archive.zip"
    data = bytearray(path.read_bytes())
    at = data.rindex(f"waterbird/{name}".encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)


def test_encrypted_member_is_refused(archive_with, drawn):
    folder = archive_with()
    patch_entry(folder, drawn[0][3][1], 8, struct.pack("<H", 1))
    with pytest.raises(DataError, match="encrypted"):
        load(folder)


@pytest.mark.parametrize("stated", [10, 40_000])
def test_member_of_another_size_than_stated(archive_with, drawn, stated):
    folder = archive_with(method=zipfile.ZIP_DEFLATED)
    name = drawn[0][3][1]
    patch_entry(folder, name, 24, struct.pack("<I", stated))
    source = waterbirds.load(folder)
    with pytest.raises(DataError, match=f"{name} .metadata.csv, row 5.*wrong size"):
        source.decode(3)


@pytest.mark.parametrize("share", [0, 0.3, 0.95])
def test_truncated_archive(archive_with, share):
    folder = archive_with()
    path = folder / waterbirds.HOME / "archive.zip"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"archive\.zip: damaged or not downloaded completely"):
        load(folder)


def test_archive_of_something_else(archive_with):
    with pytest.raises(DataError, match=r"holds no waterbird/metadata\.csv"):
        load(archive_with(prefix="penguins/"))


def changed(rows, number, column, value):
    """The rows with one value changed, in row `number` of the file (the header is row 1)."""
    rows = [list(row) for row in rows]
    rows[number - 2][HEADER.index(column)] = value
    return rows


@pytest.mark.parametrize(
    "number, column, value, message",
    [
        (4, "y", "2", "row 4: y is '2'; allowed: 0, 1"),
        (5, "place", "", "row 5: place is ''; allowed: 0, 1"),
        (6, "split", "-1", "row 6: split is '-1'; allowed: 0, 1, 2"),
        (7, "img_filename", "../x.jpg", "row 7: img_filename is '../x.jpg', which leads out"),
        (8, "img_filename", "", "row 8: img_filename is '', which leads out"),
        (9, "img_filename", "001.Bird/Bird_0001.jpg", "row 9: .* is in row 2 already"),
    ],
)
def test_metadata_problems_name_row_and_value(archive_with, drawn, number, column, value, message):
    folder = archive_with(rows=changed(drawn[0], number, column, value))
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert len(caught.value.problems) == 1
    assert "metadata.csv" in str(caught.value)


def test_metadata_of_another_shape(archive_with, drawn):
    rows = drawn[0]
    for column in ("y", "place", "split", "img_filename"):
        header = [name if name != column else "other" for name in HEADER]
        with pytest.raises(DataError, match=f"metadata.csv: no column {column}"):
            load(archive_with(metadata=csv_text(rows, header)))
    with pytest.raises(DataError, match="the column y occurs twice"):
        load(archive_with(metadata=csv_text([*rows], [*HEADER, "y"])))
    with pytest.raises(DataError, match="no rows"):
        load(archive_with(metadata=csv_text([])))
    with pytest.raises(DataError, match="no column"):
        load(archive_with(metadata=""))
    with pytest.raises(DataError, match="UTF-8"):
        load(archive_with(metadata=b"\xff\xfe\x00"))
    with pytest.raises(DataError, match="row 3: 2 values instead of 6"):
        load(archive_with(rows=[rows[0], ["1", "2"]]))
    with pytest.raises(DataError) as caught:
        load(archive_with(rows=[[*row[:2], "7", *row[3:]] for row in rows]))
    assert caught.value.problems[-1] == f"… and {len(rows) - 10} more"


def test_split_without_pictures(archive_with, drawn):
    with pytest.raises(DataError, match="no readable picture to test on"):
        load(archive_with(rows=[row for row in drawn[0] if row[3] != "2"]))
    rows = [row for row in drawn[0] if row[3] != "1"]
    with pytest.raises(DataError, match="no readable picture for DFR"):
        load(archive_with(rows=rows))
    assert load(archive_with(rows=rows), dfr_val_split_strategy="split_from_train").val is None


def number_of(rows, split, y, place):
    """Row numbers of metadata.csv with these values."""
    wanted = [str(split), str(place), str(y)]
    return [n for n, row in enumerate(rows, 2) if [row[3], row[4], row[2]] == wanted]


def test_row_without_file(archive_with, drawn):
    rows, files = drawn
    number = number_of(rows, split=0, y=0, place=1)[0]
    gone = rows[number - 2][1]
    folder = archive_with(files={n: data for n, data in files.items() if n != gone})
    with pytest.raises(DataError, match=f"{gone} .metadata.csv, row {number}.: no such"):
        load(folder)
    splits = load(folder, on_bad_image="skip")
    assert splits.train.counts == [12, 4, 4, 10]
    assert splits.skipped["train"] == [0, 1, 0, 0]


def bad_files(files, names):
    """The files with these three damaged: cut off, no picture, and nothing."""
    cut, text, empty = names
    return files | {cut: files[cut][: len(files[cut]) // 2], text: b"not a picture", empty: b""}


def test_broken_picture_stops_with_its_name(archive_with, drawn, tmp_path, capfd):
    rows, files = drawn
    number = number_of(rows, split=2, y=1, place=0)[1]
    name = rows[number - 2][1]
    for data, reason in (
        (files[name][:400], "not a readable picture"),
        (b"x", "none of JPEG, PNG"),
    ):
        folder = archive_with(files=files | {name: data})
        with pytest.raises(DataError, match=f"{name} .metadata.csv, row {number}.: .*{reason}"):
            predictions.outputs(torch.nn.Identity(), load(folder).test, 4)
    code, _ = run(folder, tmp_path / "results", on_bad_image="error")
    assert code == 2
    assert f"{name} (metadata.csv, row {number})" in capfd.readouterr().err


def test_skipped_pictures_are_counted(archive_with, drawn, tmp_path):
    rows, files = drawn
    numbers = [number_of(rows, *cell)[0] for cell in ((0, 1, 1), (1, 0, 0), (2, 1, 0))]
    folder = archive_with(files=bad_files(files, [rows[n - 2][1] for n in numbers]))
    code, results = run(folder, tmp_path / "results", on_bad_image="skip", epochs=1)
    assert code == 0
    table = pd.read_csv(results / "group_counts.csv")
    skipped = table[table.skipped > 0].set_index(["split", "group"])["skipped"].to_dict()
    assert skipped == {("train", 3): 1, ("val", 0): 1, ("dfr", 0): 1, ("test", 2): 1}
    assert table[table.split == "train"]["count"].tolist() == [12, 5, 4, 9]
    assert (results / "plots" / "samples.png").is_file()
    log = (results / "run.log").read_text()
    assert "3 unreadable pictures skipped" in log
    assert all(f"row {number})" in log for number in numbers)


def test_picture_bomb(monkeypatch, drawn):
    data = drawn[1][drawn[0][0][1]]
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 100)
    with pytest.raises(picture_files.Damaged, match="pixels; allowed: up to 100"):
        picture_files.decode(data)


def test_corrupt_bytes_are_noticed_by_the_checksum(archive_with, drawn):
    folder = archive_with()
    path = folder / waterbirds.HOME / "archive.zip"
    data = bytearray(path.read_bytes())
    at = data.index(drawn[1][drawn[0][0][1]])
    data[at + 200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"row 2\): damaged in the archive"):
        waterbirds.load(folder).decode(0)


def test_identity(good, archive_with, drawn):
    identity = waterbirds.load(good).identity()
    assert waterbirds.load(archive_with()).identity() == identity
    other = waterbirds.load(archive_with(rows=changed(drawn[0], 3, "place_filename", "new")))
    assert other.identity() != identity
    redrawn = drawn[1] | {drawn[0][0][1]: drawn[1][drawn[0][3][1]]}
    assert waterbirds.load(archive_with(files=redrawn)).identity() != identity

    def key(**changes):
        return load(good, **changes).train.inputs.identity

    assert key() == key()
    assert len({key(), key(use_grayscale=True), key(num_train_samples=9)}) == 3
    # What only concerns raw pixels does not matter to a backbone.
    assert key(normalize_inputs=False) == key()


def test_pickles_and_works_in_other_processes(good):
    inputs = load(good).train.inputs
    copied = pickle.loads(pickle.dumps(inputs))
    assert torch.equal(copied[:3], inputs[:3])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert (pool.submit(inputs.source.decode, 0).result() == inputs.source.decode(0)).all()


class CountingSource:
    """Pictures of one value each; counts how many are decoded, and how many at once."""

    side, augments = picture_files.SIDE, False

    def __init__(self):
        self.lock, self.decoded, self.now, self.most = threading.Lock(), 0, 0, 0
        self.pair = threading.Barrier(2, timeout=5)

    def decode(self, i):
        with self.lock:
            self.decoded += 1
            self.now += 1
            self.most = max(self.most, self.now)
        if i < 2:
            self.pair.wait()  # passes only when two pictures are decoded at the same time
        with self.lock:
            self.now -= 1
        return np.full((3, picture_files.SIDE, picture_files.SIDE), i % 256, dtype=np.uint8)


@pytest.mark.parametrize("size, ahead", [(3, pictures.AHEAD + 3), (80, 80)])
def test_memory_is_bounded(size, ahead):
    source = CountingSource()
    inputs = pictures.Pictures(source, np.arange(400), num_workers=4)
    used = 0
    for batch in inputs.batches([slice(i, i + size) for i in range(0, 400, size)]):
        used += len(batch)
        assert (batch[:, 0, 0, 0] * 255).round().tolist() == [
            i % 256 for i in range(used - len(batch), used)
        ]
        assert source.decoded <= used + ahead
    assert used == source.decoded == 400
    assert 2 <= source.most <= 4


def test_batches_have_a_limit_in_bytes(good, monkeypatch):
    split = load(good).test
    monkeypatch.setattr(pixels, "BATCH_BYTES", 2 * 4 * 3 * 224 * 224)
    plan = list(predictions.group_batches(split, 1000))
    assert [group for group, _ in plan] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert max(part.stop - part.start for _, part in plan) == 2


def test_stopping_early_stops_decoding():
    source = CountingSource()
    inputs = pictures.Pictures(source, np.arange(4000), num_workers=2)
    batches = inputs._pixels([slice(i, i + 10) for i in range(0, 4000, 10)])
    next(batches)
    batches.close()
    assert source.decoded < 200
    assert source.now == 0


def test_caps_of_analyses_decode_nothing(good, monkeypatch):
    split = load(good).train
    monkeypatch.setattr(split.inputs.source, "decode", None)
    few = measuring.capped(split, 4, seed=0)
    assert few.counts == [4, 4, 4, 4]
    assert few.inputs.shape == (16, 3, 224, 224)
    chosen = few.inputs.rows
    assert (2 * split.inputs.source.y[chosen] - 1).tolist() == few.y.tolist()


LOAD = waterbirds_set.load


def in_memory(config):
    """The oracle twin: the same splits with all pictures as one tensor."""
    splits = LOAD(config)
    for split in splits.named().values():
        split.inputs = torch.cat([split.inputs[i : i + 1] for i in range(len(split))])
    return splits


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 8, "gradient_gram_num_samples": 4},
        {"debias_method": "GroupDRO", "use_grayscale": True, "dfr_target_layer": "layer_1"},
    ],
    ids=["minibatches", "full_batch"],
)
def test_streamed_run_equals_run_in_memory(good, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(plotting, "draw", lambda folder, **_: [])  # slow, and drawn in another test
    code, streamed = run(good, tmp_path / "streamed", **changes)
    assert code == 0
    code, again = run(good, tmp_path / "again", **changes)
    assert code == 0
    monkeypatch.setattr(waterbirds_set, "load", in_memory)
    code, loaded = run(good, tmp_path / "loaded", **changes)
    assert code == 0
    for name in ("analysis", "training_history", "group_counts"):
        assert (streamed / f"{name}.csv").read_bytes() == (again / f"{name}.csv").read_bytes()
        ours, theirs = (pd.read_csv(folder / f"{name}.csv") for folder in (streamed, loaded))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(pd.read_csv(streamed / "analysis.csv")) > 100
    assert (streamed / "dfr_results.txt").read_text() == (again / "dfr_results.txt").read_text()


def test_configuration(good):
    config = loading.validate(keys(good, mnist_source="full", train_correlation=0.9))
    ignored = " ".join(config.ignored)
    assert "mnist_source" in ignored and "train_correlation" in ignored
    # A correlation that the other marginals forbid does not matter where groups are given.
    loading.validate(keys(good, train_correlation=1, train_label_marginal=0.5))
    colored = loading.validate(
        {"remove_minority_groups_train": True, "on_bad_image": "skip", "train_correlation": 0.5}
    )
    assert colored.ignored == (
        "on_bad_image, remove_minority_groups_train (only for WaterBirds, CelebA)",
    )
    with pytest.raises(ConfigError, match=r"on_bad_image: given 'ignore'.*allowed: error, skip"):
        loading.validate({"on_bad_image": "ignore"})
    with pytest.raises(ConfigError, match="ColoredMNIST has no official validation set"):
        loading.validate({"dfr_val_split_strategy": "original"})


def test_features_end_to_end_with_the_official_validation_set(good, tmp_path, monkeypatch):
    """ResNet18 with random weights: analyses, DFR on the validation set, a second run cached."""
    monkeypatch.setattr(plotting, "draw", lambda folder, **_: [])  # slow, and drawn in another test
    changes = {
        "use_feature_extractor": "true",
        "feature_extractor_weights": "random",
        "features_cache_dir": tmp_path / "cache",
        "num_workers": 0,
    }
    code, first = run(good, tmp_path / "first", **changes)
    assert code == 0
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    kept = [name for name in files if name.endswith(".safetensors")]
    assert len(kept) == 3  # DFR's pictures are the validation set's
    code, second = run(good, tmp_path / "second", **changes)
    assert code == 0
    assert files == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    for name in ("training_history.csv", "analysis.csv", "dfr_results.json", "group_counts.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    rows = pd.read_csv(first / "analysis.csv")
    assert set(rows["split"]) == {"train", "test", "test_under_train"}
    results = json.loads((first / "dfr_results.json").read_text())
    assert results["split_strategy"] == "original"
    assert results["samples_per_group"] == min(VAL)
    counts = pd.read_csv(first / "group_counts.csv")
    assert counts[counts["split"] == "dfr"]["count"].tolist() == VAL
    weights = torch.load(first / "model.pt", weights_only=True)
    assert weights["layers.0.weight"].shape[1] == 512
    facts = json.loads((first / "environment.json").read_text())
    assert facts["features"]["weights"].startswith("random-0 of torch")
