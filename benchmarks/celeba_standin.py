"""A stand-in for CelebA: pictures in its layout that show their attributes, with planted shortcuts.

    python -m benchmarks.celeba_standin FOLDER [N]      writes FOLDER/celeba, then data_dir=FOLDER

Every attribute is a patch at a place of its own, brighter where a face has it. A planted pair
label:shortcut agrees in a share `AGREE` of the faces (-1: disagrees), and the label's patch is
fainter than the shortcut's and so noisy that it shows the label in only 84 % of the faces: a
network learns the shortcut first, and gains by it. All others are independent and clear.
"""

import argparse
import csv
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = [
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
]
# label -> (shortcut, whether they go together or against each other)
PLANTED = {"Blond_Hair": ("Male", -1), "Big_Lips": ("Chubby", 1), "Gray_Hair": ("Young", -1)}
AGREE = 0.9
WIDTH, HEIGHT, TOP = 178, 218, 20  # the middle square starts at row 20
PARTS = (0.6, 0.2, 0.2)  # train, val, test
CONTRAST, FAINT, GRAIN = 60.0, 20.0, 4.0  # of a patch, a label's, and of every pixel


def attributes(n: int, names, planted, rng) -> np.ndarray:
    """(n, K) of -1 and +1: independent but for the planted pairs; labels have a share of 0.4."""
    values = np.where(rng.random((n, len(names))) < 0.5, 1, -1)
    for label, (shortcut, sign) in planted.items():
        y = np.where(rng.random(n) < 0.4, 1, -1)
        agrees = np.where(rng.random(n) < AGREE, sign, -sign)
        values[:, names.index(label)] = y
        values[:, names.index(shortcut)] = y * agrees
    return values


def picture(values: np.ndarray, noisy: np.ndarray, rng) -> np.ndarray:
    """(218, 178, 3) uint8 of a face with these attributes (K,); noisy: (K,) bool."""
    side = int(np.ceil(np.sqrt(len(values))))
    cell = WIDTH // side
    level = np.where(noisy, FAINT * (values + rng.normal(size=len(values))), CONTRAST * values)
    pixels = rng.normal(128, GRAIN, (HEIGHT, WIDTH, 3))
    for j, value in enumerate(level):
        top, left = TOP + (j // side) * cell, (j % side) * cell
        pixels[top : top + cell, left : left + cell, j % 3] += value
    return pixels.clip(0, 255).astype(np.uint8)


def write(folder, n=2000, names=NAMES, planted=PLANTED, seed=0, kaggle=False) -> np.ndarray:
    """Write `folder`/celeba, as torchvision or as Kaggle has it; returns the values (n, K)."""
    rng, home = np.random.default_rng(seed), Path(folder) / "celeba"
    home.mkdir(parents=True)
    names = list(names)
    values = attributes(n, names, planted, rng)
    noisy = np.isin(names, list(planted))
    parts = np.repeat(range(3), np.diff([0, *np.round(np.cumsum(PARTS) * n).astype(int)]))
    files = [f"{i + 1:06d}.jpg" for i in range(n)]
    pictures = {}
    for file, row in zip(files, values):
        data = io.BytesIO()
        Image.fromarray(picture(row, noisy, rng)).save(data, "JPEG", quality=90)
        pictures[file] = data.getvalue()
    if kaggle:
        with zipfile.ZipFile(home / "archive.zip", "w") as archive:
            for file, data in pictures.items():
                archive.writestr(f"img_align_celeba/img_align_celeba/{file}", data)
            archive.writestr("list_attr_celeba.csv", _csv(["image_id", *names], files, values))
            text = _csv(["image_id", "partition"], files, parts[:, None])
            archive.writestr("list_eval_partition.csv", text)
        return values
    (home / "img_align_celeba").mkdir()
    for file, data in pictures.items():
        (home / "img_align_celeba" / file).write_bytes(data)
    rows = [f"{file} " + " ".join(f"{v:2d}" for v in row) for file, row in zip(files, values)]
    lines = [str(n), " ".join(names) + " ", *rows]
    (home / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{file} {part}\n" for file, part in zip(files, parts)]
    (home / "list_eval_partition.txt").write_text("".join(rows))
    return values


def _csv(header, files, values) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *([file, *row] for file, row in zip(files, values))])
    return text.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="data folder, in which celeba/ is made")
    parser.add_argument("faces", type=int, nargs="?", default=6000, help="how many (default: 6000)")
    given = parser.parse_args()
    write(given.folder, given.faces)
