"""Balanced sampling and subsets, and JTT's two stages."""

import csv
import json
import logging
import math
import signal

import numpy as np
import pytest
import torch
from helpers import FakeRun, make_splits, many_groups
from material import REBALANCING, at_call, sent

import main
from lab import methods
from lab.config.loading import validate
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.config.seeds import derive_seed
from lab.evaluation.losses import LOGISTIC
from lab.networks import building
from lab.splits import splits as splits_of
from lab.system.errors import UserError
from lab.training import identification, loop, schedule


def build(name, splits, **keys):
    return methods.build(validate({"debias_method": name, **keys}), splits)


def draws(method, epochs):
    generator = torch.Generator().manual_seed(0)
    return torch.cat([method.order(generator) for _ in range(epochs)])


@pytest.mark.parametrize("counts", [(10, 5, 3, 12), (8, 0, 3, 19)], ids=str)
def test_rwg_takes_every_group_equally_often(counts):
    splits = make_splits(train=counts)
    drawn = draws(build("RWG", splits), 2000)
    assert len(drawn) == 2000 * 30
    there = sum(count > 0 for count in counts)
    each = np.bincount(drawn, minlength=30) / len(drawn)
    for part, count in zip(splits.train.slices, counts):
        expected = 1 / (there * count) if count else 0
        deviation = 5 * math.sqrt(expected / len(drawn))
        assert np.abs(each[part] - expected).max(initial=0) < deviation + 1e-12


def test_rwy_takes_every_class_equally_often():
    splits = make_splits(train=(10, 5, 3, 2))
    drawn = draws(build("RWY", splits), 3000)
    each = np.bincount(drawn, minlength=20) / len(drawn)
    expected = np.array([1 / (2 * 15)] * 15 + [1 / (2 * 5)] * 5)
    assert np.abs(each - expected).max() < 5 * math.sqrt(0.1 / len(drawn))


def test_rebalanced_classes_with_more_than_two_of_them():
    train = many_groups([4, 0, 0, 1, 6, 2], 2)  # three classes of 4, 1 and 8
    names = [str(g) for g in range(6)]
    cells = tuple(divmod(g, 2) for g in range(6))
    splits = splits_of.Splits(train, train, names, cells=cells, num_classes=3)
    drawn = draws(build("RWY", splits), 3000)
    each = np.bincount(drawn, minlength=13) / len(drawn)
    expected = np.array([1 / 12] * 4 + [1 / 3] + [1 / 24] * 8)
    assert np.abs(each - expected).max() < 5 * math.sqrt(0.3 / len(drawn))
    weights = build("RWY", splits).flow_weights(None, train.counts)
    assert weights == pytest.approx([1 / 3, 0, 0, 1 / 3, 6 / 24, 2 / 24])
    assert build("SUBY", splits).source.y.bincount().tolist() == [1, 1, 1]
    assert build("SUBG", splits).source.counts == [1, 0, 0, 1, 1, 1]


def test_expected_flow_of_the_samplers_by_hand():
    splits = make_splits(train=(10, 5, 3, 2))
    assert build("RWG", splits).flow_weights(None, (10, 5, 3, 2)) == [0.25] * 4
    assert build("RWG", splits).flow_weights(None, (10, 0, 3, 2)) == [1 / 3, 0, 1 / 3, 1 / 3]
    assert build("RWY", splits).flow_weights(None, (10, 5, 3, 2)) == pytest.approx(
        [10 / 30, 5 / 30, 3 / 10, 2 / 10]
    )
    # As the gradient of many drawn batches says, too.
    split, method = splits.train, build("RWY", splits)
    net = building.build(validate({"hidden_dim": 4}), (7,)).double()
    loss = LOGISTIC
    each = loss.value(net(split.inputs), split.y).detach()
    drawn = draws(method, 3000)
    means = [each[part].mean().item() for part in split.slices]
    expected = sum(w * m for w, m in zip(method.flow_weights(None, split.counts), means))
    error = 5 * each.std().item() / 60_000**0.5
    assert each[drawn].mean().item() == pytest.approx(expected, abs=error)


@pytest.mark.parametrize(
    ("name", "counts", "sizes"),
    [
        ("SUBG", (10, 5, 3, 12), [3, 3, 3, 3]),
        ("SUBG", (10, 0, 3, 12), [3, 0, 3, 3]),
        ("SUBY", (10, 5, 3, 4), None),
    ],
    ids=str,
)
def test_subsets_have_the_size_of_the_smallest(name, counts, sizes):
    splits = make_splits(train=counts)
    chosen, again = build(name, splits).source, build(name, splits).source
    other = build(name, splits, seed=1).source
    if sizes:
        assert chosen.counts == sizes
    else:
        assert (chosen.y < 0).sum() == (chosen.y > 0).sum() == 7
        assert len(chosen) == 14
    assert torch.equal(chosen.inputs, again.inputs)
    assert not torch.equal(chosen.inputs, other.inputs)
    # Real samples, none twice, with their own labels and groups.
    rows = {tuple(x.tolist()): i for i, x in enumerate(splits.train.inputs)}
    found = [rows[tuple(x.tolist())] for x in chosen.inputs]
    assert len(set(found)) == len(found)
    assert torch.equal(splits.train.group[found], chosen.group)
    assert torch.equal(splits.train.y[found], chosen.y)


def test_a_subset_is_the_same_in_every_epoch_and_full_batches_are_of_it(fake_run):
    splits = make_splits(train=(10, 5, 3, 12))
    config = validate(
        {
            "debias_method": "SUBG", "train_batch_size": None, "epochs": 3, "hidden_dim": 5,
            "learning_rate": 0.1, "eval_batch_size": 4,
        }
    )  # fmt: skip
    net, twin = (building.build(config, (7,)).double() for _ in range(2))
    loop.train(net, splits, config, fake_run)
    part = build("SUBG", splits).source
    optimizer = schedule.build_optimizer(twin, config)
    for _ in range(3):
        optimizer.zero_grad()
        LOGISTIC.value(twin(part.inputs), part.y).mean().backward()
        optimizer.step()
    for ours, expected in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(ours, expected, rtol=1e-10)


def test_jtt_repeats_what_its_error_set_says():
    splits = make_splits(train=(2, 1, 1, 2))
    splits.repeats = torch.tensor([1, 1, 5, 5, 1, 1])
    order = draws(build("JTT", splits), 1)
    assert order.bincount().tolist() == [1, 1, 5, 5, 1, 1]


def jtt(tmp_path, **keys):
    given = {
        "debias_method": "JTT", "hidden_dim": 8, "epochs": 2, "train_batch_size": 8,
        "learning_rate": 0.5, "jtt_learning_rate": 0.05, "jtt_lambda_up": 7, "jtt_epochs": 2,
    }  # fmt: skip
    return validate(given | keys), make_splits(train=(20, 5, 4, 22)), Part(tmp_path)


class Part(FakeRun):
    """A run with a part in a folder of its own."""

    leads = True

    def part(self, name):
        (self.folder / name).mkdir(exist_ok=True)
        return Part(self.folder / name)

    def close(self):
        pass


def double(monkeypatch):
    build = building.build_for
    monkeypatch.setattr(building, "build_for", lambda *given: build(*given).double())


def test_the_error_set_is_what_erm_gets_wrong(tmp_path, monkeypatch, caplog):
    double(monkeypatch)
    config, splits, run = jtt(tmp_path)
    with caplog.at_level(logging.INFO, "spurious"):
        found = identification.identify(splits, config, run)

    # The twin: ERM written out, with the identification's own learning rate.
    twin = building.build(config, (7,)).double()
    erm = validate({"hidden_dim": 8, "learning_rate": 0.05, "train_batch_size": 8, "epochs": 2})
    optimizer = schedule.build_optimizer(twin, erm)
    for epoch in (1, 2):
        seed = derive_seed(0, "batches", epoch)
        order = torch.randperm(51, generator=torch.Generator().manual_seed(seed))
        for batch in order.split(8):
            optimizer.zero_grad()
            f = twin(splits.train.inputs[batch])
            torch.log1p(torch.exp(-f * splits.train.y[batch])).mean().backward()
            optimizer.step()
    f = twin(splits.train.inputs)
    wrong = [i for i in range(51) if f[i] * splits.train.y[i] <= 0]
    assert 0 < len(wrong) < 51
    assert found.repeats.tolist() == [7 if i in wrong else 1 for i in range(51)]

    with open(tmp_path / "jtt_error_set.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["index", "task", "group"]
    group = splits.train.group.tolist()
    assert rows[1:] == [[str(i), "label", str(group[i])] for i in wrong]
    rate = sum(group[i] == 1 for i in wrong) / 5
    assert f"y < 0, a > 0 {rate:.3f}" in caplog.text


def test_an_error_set_is_used_again_only_on_its_training_split(tmp_path, monkeypatch):
    double(monkeypatch)
    config, splits, run = jtt(tmp_path / "one")
    (tmp_path / "one").mkdir()
    first = identification.identify(splits, config, run)
    path = tmp_path / "one" / "jtt_error_set.csv"

    def again(place, splits=splits, **keys):
        (tmp_path / place).mkdir()
        config, _, run = jtt(tmp_path / place, jtt_error_set=str(path), **keys)
        monkeypatch.setattr(identification, "_train", None)
        return identification.identify(splits, config, run).repeats

    assert torch.equal(again("same"), first.repeats)
    assert (tmp_path / "same" / "jtt_error_set.csv").read_bytes() == path.read_bytes()
    assert again("more", jtt_lambda_up=3).max() == 3

    other = make_splits(train=(20, 5, 4, 22), seed=1)
    with pytest.raises(UserError, match="of another training split"):
        again("other", other)
    for about in ("[" * 100_000, "[]", "{}", "x"):
        path.with_name("jtt_error_set.json").write_text(about)
        with pytest.raises(UserError, match=r"jtt_error_set.csv is not usable"):
            again(f"about {about[:3]}")
    path.with_name("jtt_error_set.json").unlink()
    text = path.read_text()
    for row, reason in (
        ("51,label,3", "row 2 is of another training split"),
        ("0,label,3", "row 2 is of another training split"),
        ("0,colour,0", "not usable"),
        ("x,label,0", "not usable"),
        ("0,label", "not usable"),
    ):
        path.write_text(f"index,task,group\n{row}\n")
        with pytest.raises(UserError, match=reason):
            again(f"bad {row}")
    path.write_text(text.replace("index", "i"))
    with pytest.raises(UserError, match="its first line is not index,task,group"):
        again("header")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read, No such file"):
        again("missing")


def test_what_the_samplers_do_not_know_is_nan():
    splits = make_splits()
    splits.repeats = torch.ones(30, dtype=torch.int64)
    for name in ("SUBY", "SUBG", "JTT"):
        assert all(math.isnan(w) for w in build(name, splits).flow_weights(None, (1, 2, 3, 4)))


SMALL = {
    "num_train_samples": 200, "num_test_samples": 100, "hidden_dim": 8, "epochs": 2,
    "train_batch_size": 20, "use_dfr": "false", "wandb.enable": "false",
    "checkpoint_every": 1, "analyses": "none",
}  # fmt: skip


@pytest.fixture
def go(tmp_path, data_dir, monkeypatch):
    """go(place, **keys) -> (exit code, run folder), without plots, which other tests draw."""
    import plotting

    monkeypatch.setattr(plotting, "draw", lambda folder, **_: [])

    def run(place, **keys):
        given = {"data_dir": data_dir, "results_dir": tmp_path / place, **SMALL, **keys}
        code = main.main([f"{key}={value}" for key, value in given.items()])
        (folder,) = (tmp_path / place).iterdir()
        return code, folder

    return run


@pytest.mark.parametrize("name", REBALANCING)
@pytest.mark.parametrize("size", [20, "null"], ids=["minibatches", "full batch"])
def test_every_method_on_digits(go, name, size):
    code, folder = go(name, debias_method=name, train_batch_size=size)
    assert code == 0
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert (folder / "jtt_error_set.csv").exists() == (name == "JTT")


def test_a_full_batch_of_jtt_is_all_that_an_epoch_takes(go, monkeypatch):
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *given: steps.append(step(*given)))
    code, folder = go("run", debias_method="JTT", train_batch_size="null", jtt_epochs=3)
    assert code == 0 and (folder / "jtt_error_set.csv").read_text().count("\n") > 1
    assert len(steps) == 3 + 2


@pytest.mark.parametrize("step", [6, 13, 17], ids=["identification", "its last", "training"])
def test_both_stages_of_jtt_resume(go, monkeypatch, step):
    """Stopped after any step, and gone on with: the same bytes. 8 steps an epoch of stage one."""
    code, whole = go("whole", debias_method="JTT", jtt_epochs=2, jtt_lambda_up=2)
    assert code == 0
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", step, sent(signal.SIGTERM))
        code, folder = go("run", debias_method="JTT", jtt_epochs=2, jtt_lambda_up=2)
    assert code == 143
    first = folder / "identification"
    left = first / "checkpoints" / ".epoch-x1.pt"  # what SIGKILL leaves, as is half a line
    left.touch()
    with open(first / "timings.csv", "a") as file:
        file.write("trai")
    assert main.main(["--resume", str(folder)]) == 0
    assert not left.exists()
    lines = (first / "timings.csv").read_text().splitlines()
    assert {line.count(",") for line in lines} == {2} and not any("trait" in x for x in lines)
    history = "training_history.csv"
    for name in (history, "jtt_error_set.csv", f"identification/{history}"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (torch.load(f / "model.pt", weights_only=True) for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_identification_network_has_its_own_settings():
    given = {
        "debias_method": "JTT", "num_val_samples": 50, "early_stopping_patience": 1, "epochs": 9,
        "jtt_epochs": 4, "learning_rate": 0.5, "weight_decay": 0.2,
    }  # fmt: skip
    stage = identification.stage_config(validate(given))
    assert (stage.debias_method, stage.epochs) == ("None", 4)
    assert stage.early_stopping_patience is None  # it trains for jtt_epochs, no fewer
    assert (stage.learning_rate, stage.weight_decay) == (0.5, 0.2)
    assert not any(getattr(stage, f"analyze_{name}") for name in BUILT_IN.of(Analysis))
    own = {"jtt_learning_rate": 0.1, "jtt_weight_decay": 0.0}
    stage = identification.stage_config(validate(given | own))
    assert (stage.learning_rate, stage.weight_decay) == (0.1, 0.0)
