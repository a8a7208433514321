"""Helpers that several test files share."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# Before torch is imported: one thread for each of the processes that share the tests, and for
# theirs, so that all of them round alike.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

from lab.config import loading
from lab.runs.silent import Silent
from lab.splits.splits import Split, Splits

# The same examples every time, and nothing written into the tree: even without a database
# hypothesis keeps tables of characters and constants, from the collection of tests on.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
hypothesis_home = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(hypothesis_home.name)


pytest.register_assert_rewrite("hostile", "material")

# The core's tests, marked `fast` for `make check`.
FAST = (
    "analyses/test_gram.py", "config/test_config.py", "config/test_records.py", "evaluation",
    "methods/test_methods.py", "methods/test_scale.py", "networks/test_mlp.py", "splits",
    "test_docs.py", "test_house.py", "training/test_loop.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(FAST):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One data folder for the session, so that the embedded digits are parsed once."""
    return tmp_path_factory.mktemp("data")


@contextmanager
def limited(seconds=2, memory=500 * 2**20):
    """Fails what takes more processor time, or more bytes in addition to the present ones."""

    def too_slow(*_):
        raise AssertionError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (allowed, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def settings(data_dir, tmp_path):
    """settings(**keys) -> a small, fast configuration with these keys changed."""

    def make(**keys):
        small = {
            "num_train_samples": 400,
            "num_test_samples": 200,
            "hidden_dim": 16,
            "epochs": 2,
            "results_dir": str(tmp_path / "results"),
            "data_dir": str(data_dir),
            "dfr_num_workers": 1,
            "wandb": {"enable": False},
        }
        return loading.validate(small | keys)

    return make


@pytest.fixture
def few_figures(monkeypatch):
    """Two figures instead of all: those take longer than the rest of a small run."""
    from lab.figures import drawing

    figures = {name: drawing.FIGURES[name] for name in ("training_history", "dfr")}
    monkeypatch.setattr(drawing, "FIGURES", figures)


@pytest.fixture
def intruder(tmp_path):
    """An object whose code must never run."""
    from hostile import Intruder

    yield Intruder(tmp_path / "intruded")
    assert not (tmp_path / "intruded").exists()


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """(data folder, attributes (N, 4)) of a small stand-in for CelebA."""
    from material import FACE_ATTRIBUTES, FACES, PLANTED

    from benchmarks import celeba_standin

    folder = tmp_path_factory.mktemp("faces")
    return folder, celeba_standin.write(folder, FACES, FACE_ATTRIBUTES, PLANTED)


@pytest.fixture
def celeba_run(tmp_path, faces, monkeypatch):
    """celeba_run(place, **keys) -> (exit code, run folder), without plots: other tests draw."""
    from material import NO_ANALYSES, celeba_keys

    import main
    import plotting

    monkeypatch.setattr(plotting, "draw", lambda folder, **_: [])

    def run(place, data=faces[0], **changes):
        given = celeba_keys(data, **{"use_dfr": False, **NO_ANALYSES, **changes})
        given |= {
            "results_dir": str(tmp_path / place), "model_name": "ConvNet", "latent_size": 8,
            "learning_rate": 0.05, "momentum": 0.9, "epochs": 1, "train_batch_size": 20,
            "wandb": {"enable": False},
        } | changes  # fmt: skip
        path = tmp_path / f"{place}.yaml"
        path.write_text(json.dumps(given))
        code = main.main(["--config", str(path)])
        (folder,) = (tmp_path / place).iterdir()
        return code, folder

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Runs that several tests start from, each made once and copied: {what: folder}."""
    return tmp_path_factory.mktemp("kept"), {}


@pytest.fixture
def go(tmp_path, data_dir, capsys, few_figures, kept):
    """go(argument, …) -> (exit code, stderr lines)."""
    from material import SMALL

    import main

    (tmp_path / "c.yaml").write_text("experiment_name: small\n")

    def run(*arguments, results="results"):
        if "--resume" not in arguments:
            fixed = [f"results_dir={tmp_path / results}", f"data_dir={data_dir}"]
            names = {argument.split("=")[0] for argument in arguments}
            small = [a for a in SMALL if a.split("=")[0] not in names]
            arguments = ["--config", str(tmp_path / "c.yaml"), *fixed, *small, *arguments]
        code = main.main(list(arguments))
        run.out, err = capsys.readouterr()
        return code, err.splitlines()

    def copied(what, make, results):
        place, made = kept
        if what not in made:
            make(f"kept_{what}")
            made[what] = shutil.move(run.folder(f"kept_{what}"), place / what)
        return Path(shutil.copytree(made[what], tmp_path / results / made[what].name))

    run.folder = lambda results="results": next((tmp_path / results).iterdir())
    run.copied = copied
    return run


def make_split(counts, shape=(7,), dtype=torch.float64, seed=0):
    """A split of random inputs with these group counts, stored group by group."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), v, dtype=dtype) for n, v in zip(counts, (-1, -1, 1, 1))])
    a = torch.cat([torch.full((n,), v, dtype=dtype) for n, v in zip(counts, (-1, 1, -1, 1))])
    inputs = torch.randn(sum(counts), *shape, generator=generator, dtype=dtype)
    # Something to learn from both: a group mean in the first two coordinates.
    flat = inputs.flatten(1)
    flat[:, 0] += 0.5 * y
    flat[:, 1] += a
    return Split(inputs / flat.norm(dim=1).view(-1, *[1] * len(shape)), y, a, list(counts))


def make_splits(train=(12, 5, 4, 9), test=(6, 5, 7, 3), **options):
    """Random training and test splits."""
    names = ["y < 0, a < 0", "y < 0, a > 0", "y > 0, a < 0", "y > 0, a > 0"]
    options.setdefault("seed", 0)
    seed = options.pop("seed")
    return Splits(
        train=make_split(train, seed=2 * seed, **options),
        test=make_split(test, seed=2 * seed + 1, **options),
        group_names=names,
    )


def many_groups(counts, num_attributes, seed=0):
    """A split with class indices as labels and attributes, group by group."""
    cells = torch.tensor([divmod(g, num_attributes) for g in range(len(counts))])
    y, a = cells.repeat_interleave(torch.tensor(counts), 0).T
    inputs = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    return Split(inputs, y.contiguous(), a.contiguous(), list(counts))


class FakeRun(Silent):
    """Records what a run would write."""

    leads = True

    def __init__(self, folder):
        super().__init__(folder)
        self.rows, self.analyses = [], []

    def history(self, row):
        self.rows.append(row)

    def analysis(self, rows):
        self.analyses += rows

    def holds(self, sizes):
        return True

    def values(self, analysis, quantity, split):
        """{(epoch, pair): value} of one quantity."""
        wanted = {"analysis": analysis, "quantity": quantity, "split": split}
        return {
            (row["epoch"], row["pair"]): row["value"]
            for row in self.analyses
            if all(row[k] == v for k, v in wanted.items())
        }


@pytest.fixture
def fake_run(tmp_path):
    return FakeRun(tmp_path)


def in_float64(splits):
    """The same splits with float64 tensors."""

    def convert(split):
        if split is None:
            return None
        return Split(split.inputs.double(), split.y.double(), split.a.double(), split.counts)

    return dataclasses.replace(
        splits, **{name: convert(split) for name, split in splits.named().items()}
    )
