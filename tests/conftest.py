"""Helpers that several test files share."""

import json
import os
import shutil
import tempfile
from pathlib import Path

# Before torch is imported: one thread for each of the processes that share the tests, and for
# theirs, so that all of them round alike.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
from helpers import FakeRun
from hypothesis.configuration import set_hypothesis_home_dir

from lab.config import loading

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


@pytest.fixture
def fake_run(tmp_path):
    return FakeRun(tmp_path)
