"""Time and memory of feature extraction against a naive twin, ResNet18 with random weights.

    python -m benchmarks.extraction [--fraction 0.1] [--archive ARCHIVE] [--pictures 600]

The twin decodes everything with PIL into one float32 tensor, then runs the eager backbone in
batches of 64. Both run in processes of their own; imports are not timed. Without an archive of
WaterBirds a smaller one of the same layout is drawn. Expected on 2 cores: ratio ≤ 0.8, main
process ≤ 1.8 GB, second run < 3 s.
"""

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

BATCH = 64


def _drawn(number: int) -> bytes:
    """A JPEG of coloured noise of the size of WaterBirds' pictures."""
    rng = np.random.default_rng(number)
    size = tuple(int(side) for side in rng.integers(250, 501, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def draw_archive(path: Path, number: int) -> None:
    """An archive with the layout of WaterBirds and `number` drawn pictures."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive, ProcessPoolExecutor() as pool:
        for i, picture in enumerate(pool.map(_drawn, range(number), chunksize=16)):
            name = f"class/{i:05d}.jpg"
            writer.writerow([i, name, i % 2, i // 4 % 3, i // 2 % 2, "-"])
            archive.writestr(f"waterbird/{name}", picture)
        archive.writestr("waterbird/metadata.csv", table.getvalue())


def _config(folder: Path):
    from lab.config import loading

    return loading.validate(
        {
            "use_feature_extractor": True,
            "feature_extractor_weights": "random",
            "normalize_inputs": False,
            "features_cache_dir": str(folder / "cache"),
            "feature_extractor_batch_size": BATCH,
        }
    )


def ours(data_dir: Path, folder: Path, fraction: float) -> dict:
    """Open, extract, keep; then build a network and make one step, as the first epoch begins."""
    import torch

    from lab.data_sets.sources import waterbirds
    from lab.evaluation.losses import LOGISTIC
    from lab.features import extraction as feature_extractor
    from lab.networks import building
    from lab.splits.pictures import Pictures
    from lab.splits.splits import Split, Splits
    from lab.training import schedule, steps

    config = _config(folder)
    start = time.perf_counter()
    source = waterbirds.load(data_dir)
    rows = np.arange(round(fraction * len(source)))
    signs = torch.from_numpy(2 * source.y[rows] - 1).float()
    split = Split(Pictures(source, rows), signs, signs, [len(rows), 0, 0, 0])
    extracted = feature_extractor.Extractor(config).extract(Splits(split, split, list("abcd")))
    seconds = time.perf_counter() - start
    network = building.build(config, extracted.train.inputs.shape[1:])
    first = Split(extracted.train.inputs[:BATCH], signs[:BATCH], signs[:BATCH], [BATCH, 0, 0, 0])
    steps.minibatch_epoch(
        network, schedule.build_optimizer(network, config), first, LOGISTIC, BATCH, 0
    )
    return {
        "pictures": len(rows),
        "seconds": seconds,
        "until_first_step": time.perf_counter() - start,
        "features": str(folder / "cache"),
    }


def twin(data_dir: Path, folder: Path, fraction: float) -> dict:
    """All pictures in one tensor, then the backbone as the library has it."""
    import torch
    import torchvision
    from torchvision.transforms import functional

    from lab.config.seeds import derive_seed
    from lab.features import backbones

    start = time.perf_counter()
    with zipfile.ZipFile(data_dir / "waterbirds_v1.0" / "archive.zip") as archive:
        text = archive.read("waterbird/metadata.csv").decode()
        names = [row["img_filename"] for row in csv.DictReader(io.StringIO(text))]
        names = names[: round(fraction * len(names))]
        inputs = torch.empty(len(names), 3, backbones.SIDE, backbones.SIDE)
        for i, name in enumerate(names):
            with archive.open(f"waterbird/{name}") as file:
                picture = Image.open(file).convert("RGB")
            picture = picture.resize((backbones.SIDE,) * 2, Image.Resampling.BILINEAR)
            inputs[i] = functional.normalize(
                functional.to_tensor(picture), backbones.IMAGENET_MEAN, backbones.IMAGENET_STD
            )
    torch.manual_seed(derive_seed(_config(folder).seed, "backbone"))
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.eval()
    with torch.no_grad():
        features = torch.cat([model(batch) for batch in inputs.split(BATCH)])
    seconds = time.perf_counter() - start
    np.save(folder / "twin.npy", features.numpy())
    return {"pictures": len(names), "seconds": seconds}


def _child(role: str, data_dir: Path, folder: Path, fraction: float) -> dict:
    command = [sys.executable, "-m", "benchmarks.extraction", "--role", role]
    command += ["--data", str(data_dir), "--work", str(folder), "--fraction", str(fraction)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(data_dir: Path, fraction: float) -> None:
    """Run both sides and the second run, and print what they took."""
    import safetensors.torch

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        mine = _child("ours", data_dir, folder, fraction)
        again = _child("ours", data_dir, folder, fraction)
        naive = _child("twin", data_dir, folder, fraction)
        (path,) = (folder / "cache").glob("*.safetensors")
        found = safetensors.torch.load_file(path)["features"].numpy()
        expected = np.load(folder / "twin.npy", allow_pickle=False)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    for name, side in (("ours", mine), ("twin", naive)):
        rate = side["pictures"] / side["seconds"]
        print(
            f"{name}: {side['pictures']} pictures in {side['seconds']:.1f} s, {rate:.1f} a second; "
            f"{side['cpu_seconds']:.1f} s of processor time; peak of the main process "
            f"{side['peak_gb']:.2f} GB"
        )
    ratios = [mine[key] / naive[key] for key in ("seconds", "cpu_seconds")]
    print(f"ratio of the times: {ratios[0]:.2f}; of processor time: {ratios[1]:.2f}")
    print(f"second run, until after the first training step: {again['until_first_step']:.2f} s")
    print(f"largest difference of the features, relative to the largest feature: {error:.1e}")


def main() -> None:
    """The command line; with --role it is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, default=0.1, help="share of the pictures used")
    parser.add_argument("--archive", type=Path, help="archive.zip of WaterBirds or a stand-in")
    parser.add_argument("--pictures", type=int, default=600, help="in a drawn archive, all used")
    for hidden in ("--role", "--data", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        side = {"ours": ours, "twin": twin}[arguments.role]
        facts = side(Path(arguments.data), Path(arguments.work), arguments.fraction)
        facts["cpu_seconds"] = sum(os.times()[:4])  # of the workers too, and of the imports
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux
        print(json.dumps(facts | {"peak_gb": peak * 1024 / 1e9}))
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "waterbirds_v1.0" / "archive.zip"
        if arguments.archive:
            archive.parent.mkdir()
            archive.symlink_to(arguments.archive.resolve())
        else:
            draw_archive(archive, arguments.pictures)
        compare(Path(folder), arguments.fraction if arguments.archive else 1.0)


if __name__ == "__main__":
    main()
