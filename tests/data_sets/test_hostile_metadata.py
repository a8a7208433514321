"""WaterBirds' archive and metadata: what is damaged or hostile is refused by name and soon."""

import zipfile

import pytest
from hostile import refused

from lab.data_sets.sources import waterbirds
from lab.system import picture_files, zip_files


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
        (HEAD + "," * (waterbirds.MAX_METADATA - 99), "row 2: 16777118 values instead of 4"),
        (HEAD + " " * waterbirds.MAX_METADATA, "bytes; allowed: up to 16777216"),
        (HEAD + " " * picture_files.MAX_FILE_BYTES, "bytes unpacked; allowed: up to 67108864"),
        (HEAD + "x" * 200_000 + ",0,0,0\n", "not readable as CSV"),
        (HEAD + '"a.jpg,0,0,0\n' * 3, "not readable as CSV"),
        (HEAD + "a\0b.jpg,0,0,0\n", "metadata.csv"),
        (HEAD + "a.jpg,0,0,9" + "9" * 9000 + "\n", "row 2: place is '99999"),
        (HEAD + f"{'a' * 9000}/../x.jpg,0,0,0\n", "row 2: img_filename is 'aaaa"),
    ],
)
def test_hostile_metadata(tmp_path, text, reason):
    with_metadata(tmp_path, text)
    limits = {"seconds": 5, "memory": 400 * 2**20}
    refused(lambda: waterbirds.load(tmp_path), "metadata.csv", reason, **limits)


def test_a_folder_with_names_that_no_file_can_have(tmp_path, settings):
    folder = tmp_path / waterbirds.HOME / waterbirds.KAGGLE_FOLDER
    folder.mkdir(parents=True)
    (folder / "metadata.csv").write_text(HEAD + "x" * 300 + ".jpg,0,0,0\na\x1b.jpg,1,2,1\n")
    source = waterbirds.load(tmp_path)
    assert source.missing.all()
    refused(source.check_missing, folder, "no such file")
