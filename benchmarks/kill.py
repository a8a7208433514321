"""Kill small runs with SIGKILL at random moments, resume them, compare with uninterrupted ones.

    python -m benchmarks.kill [kills]

Every killed run must have only readable files at that moment; resumed (and perhaps killed again)
until it is done, its tables must equal the uninterrupted run's byte for byte, and every row that
it had reported before must be present. Prints one line per kill; exit code 1 if anything differs.
"""

import argparse
import json
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

COMMON = [
    "num_train_samples=400", "num_test_samples=200", "num_val_samples=50", "hidden_dim=16",
    "epochs=12", "checkpoint_every=3", "dfr_num_workers=1", "dfr_num_retrains=4",
    "wandb.enable=false", "plot_format=png",
]  # fmt: skip
CASES = {
    "mini-batches, Adam": ["optimizer=Adam", "learning_rate=1e-3", "train_batch_size=16"],
    "GroupDRO, SGD": ["debias_method=GroupDRO", "learning_rate=0.1", "momentum=0.5"],
}
COMPARED = (
    "training_history.csv", "analysis.csv", "group_counts.csv", "dfr_results.json",
    "dfr_results.txt", "model.pt", "config_used.yaml",
)  # fmt: skip
APPENDED = ("training_history.csv", "analysis.csv")

# A server that has imported everything once and forks, so that runs start at once.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["main", "data_loader", "trainer", "dfr", "plotting", "lab.runs.run", "lab.runs.trackers"]
)


def _run(arguments, log) -> None:
    import main
    from lab.figures import drawing

    # Two figures instead of all, which take longer than the rest and would get most of the kills.
    drawing.FIGURES = {name: drawing.FIGURES[name] for name in ("training_history", "dfr")}
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115, until the process ends
    sys.exit(main.main(arguments))


def run(arguments, log, seconds: float | None = None) -> tuple[int, float]:
    """Run `main.py` with these arguments; SIGKILL after some seconds. (exit code, seconds)."""
    start = time.perf_counter()
    process = context.Process(target=_run, args=(arguments, log))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.perf_counter() - start


def read_everything(folder: Path) -> None:
    """Raises an error if a whole file of the run cannot be read."""
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".png": lambda path: Image.open(path).load(),
    }
    for path in folder.rglob("[!.]*"):
        if path.suffix in readers:
            readers[path.suffix](path)


def reported(folder: Path) -> dict[str, set[str]]:
    """The complete lines of the growing tables, without values of `measured` not yet known."""
    found = {}
    for name in APPENDED:
        path = folder / name
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        found[name] = {line for line in lines if not re.search(r",measured,nan$", line)}
    return found


def differences(folder: Path, reference: Path) -> list[str]:
    """Names of the files that differ from the uninterrupted run's."""
    found = [
        name for name in COMPARED
        if _content(folder / name) != _content(reference / name)
    ]  # fmt: skip
    for name in ("gram.npz", "dfr_model.npz", "samples.npz"):
        present = [(place / name).exists() for place in (folder, reference)]
        if not all(present):
            found += [name] if any(present) else []
            continue
        with (
            np.load(folder / name, allow_pickle=False) as a,
            np.load(reference / name, allow_pickle=False) as b,
        ):
            equal = a.files == b.files and all(a[k].tobytes() == b[k].tobytes() for k in a.files)
        if not equal:
            found.append(name)
    final = [json.loads((f / "status.json").read_text()) for f in (folder, reference)]
    if any(final[0][key] != final[1][key] for key in ("state", "phase", "summary")):
        found.append("status.json")
    plots = [sorted(p.name for p in (f / "plots").iterdir()) for f in (folder, reference)]
    return found if plots[0] == plots[1] else [*found, "plots"]


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    # The one setting that must differ: every run has a results folder of its own.
    return re.sub(rb"results_dir: .*", b"", data) if path.suffix == ".yaml" else data


def attempt(place: Path, arguments, reference: Path, chance, whole: float) -> list[str]:
    """One run, killed at a random moment and perhaps again when resumed; returns the faults."""
    log, faults, rows = place / "log.txt", [], {name: set() for name in APPENDED}
    results = place / "results"
    command, kills = [*arguments, f"results_dir={results}"], chance.choice([1, 1, 2])
    while True:
        moment = chance.uniform(0.05, 1.1) * whole if kills else None
        code, _ = run(command, log, moment)
        kills -= kills > 0
        folders = [path for path in results.glob("*") if not path.name.startswith(".")]
        if len(folders) > 1:
            faults.append(f"{len(folders)} folders")
        if code == 0:
            break
        if code != -signal.SIGKILL:
            return [*faults, f"exit code {code}\n{log.read_text()}"]
        if folders:
            read_everything(folders[0])
            for name, lines in reported(folders[0]).items():
                rows[name] |= lines
            command = ["--resume", str(folders[0])]
    missing = sum(len(rows[name] - reported(folders[0])[name]) for name in APPENDED)
    if missing:
        faults.append(f"{missing} reported rows are gone")
    return [*faults, *differences(folders[0], reference)]


def main(kills: int = 50, seed: int = 0) -> int:
    """Returns the number of runs with faults."""
    faulty, chance = 0, random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        place = Path(name)
        configuration = place / "config.yaml"
        configuration.write_text("experiment_name: small\n")
        references, wholes, commands = {}, {}, {}
        for i, (case, extra) in enumerate(CASES.items()):
            commands[case] = ["--config", str(configuration), f"data_dir={place}", *COMMON, *extra]
            for warm in range(bool(i), 2):  # the first one of all parses the digits
                results = place / f"reference_{i}_{warm}"
                command = [*commands[case], f"results_dir={results}"]
                code, wholes[case] = run(command, place / "reference.txt")
                if code:
                    print((place / "reference.txt").read_text())
                    return 1
            (references[case],) = (p for p in results.iterdir())
        for i in range(kills):
            case = list(CASES)[i % len(CASES)]
            work = place / f"run_{i}"
            work.mkdir()
            faults = attempt(work, commands[case], references[case], chance, wholes[case])
            faulty += bool(faults)
            print(f"{i + 1}/{kills}  {case}: {', '.join(faults) or 'equal'}", flush=True)
    print(f"{kills} runs killed and resumed, {faulty} with differences")
    return faulty


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50, help="how many (default: 50)")
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of the moments (default: 0)")
    given = parser.parse_args()
    sys.exit(bool(main(given.kills, given.seed)))
