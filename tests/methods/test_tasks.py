"""Several tasks on one network: weights of tasks and samples, metrics, JTT's joins, end to end."""

import dataclasses
import itertools
import json
import math
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FakeRun, in_float64, limited, make_splits
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from material import NO_ANALYSES, at_call, celeba_keys, sent
from scipy.optimize import minimize

import main
import plotting
from lab import methods
from lab.config import loading
from lab.evaluation import metrics, predictions, selection, shortcuts
from lab.evaluation.losses import LOGISTIC
from lab.figures import tables
from lab.folders import reading
from lab.methods import entropy
from lab.networks import building
from lab.splits import groups
from lab.splits.splits import Split, Splits, Task
from lab.system.errors import ConfigError, DataError, UserError
from lab.training import identification, loop, schedule, steps

TWO = ["Blond_Hair:Male", "Smiling:Young"]


def two_tasks(n=40, seed=0, num_tasks=2):
    """Random splits with several tasks, stored group by group of the first."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [
        Task(f"t{t}", groups.GROUPS, [f"{t}{g}" for g in range(4)], (False, True, True, False))
        for t in range(num_tasks)
    ]

    def split():
        bits = torch.rand(n, num_tasks, 2, generator=generator) < 0.5
        y, a = bits.double().mul(2).sub(1).unbind(-1)
        group = groups.index(y, a)
        order = torch.argsort(group[:, 0], stable=True)
        inputs = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        counts = group[:, 0].bincount(minlength=4).tolist()
        return Split(inputs, y[order], a[order], counts, tasks[0].minority, group[order])

    return Splits(split(), split(), tasks[0].group_names, val=split(), tasks=tasks)


def build(splits, name="None", **changes):
    """A method for several tasks, on any splits."""
    asked = {
        "dataset_name": "CelebA", "groupings": [f"A{t}:B" for t in range(len(splits.tasks))],
        "debias_method": name, "use_dfr": False, "num_val_samples": None, **NO_ANALYSES,
    }  # fmt: skip
    return methods.build(loading.validate(asked | changes), splits)


TASK_LOSSES = torch.tensor([[0.5, 2.0], [1.5, 4.0], [1.0, 0.0]], dtype=torch.float64)


def test_the_plain_sum_and_fixed_weights_by_hand():
    splits = two_tasks()
    assert build(splits).tasks.combine(TASK_LOSSES).tolist() == [2.5, 5.5, 1.0]
    weighted = build(splits, task_weights=[0.25, 0.75]).tasks.combine(TASK_LOSSES)
    assert weighted.tolist() == [1.625, 3.375, 0.25]
    assert build(splits, task_weights=[1, 1]).tasks.combine(TASK_LOSSES).tolist() == [2.5, 5.5, 1.0]


def test_loss_balanced_weights_by_hand():
    method = build(two_tasks(), loss_balanced_task_weighting=True, lbtw_alpha=0.5)
    method.start_epoch(1, 0)
    assert method.tasks.combine(TASK_LOSSES).tolist() == [2.5, 5.5, 1.0]  # both ratios are 1
    # Means 1 and 2 at first, now 0.25 and 2: weights √0.25 = 0.5 and 1.
    now = TASK_LOSSES * torch.tensor([0.25, 1.0])
    assert method.tasks.combine(now).tolist() == pytest.approx([2.0625, 4.1875, 0.125])
    again = build(two_tasks(), loss_balanced_task_weighting=True)
    again.load_state(method.state())
    assert torch.equal(again.tasks.combine(now), method.tasks.combine(now))
    again.start_epoch(2, 1)  # going on within an epoch
    assert torch.equal(again.tasks.combine(now), method.tasks.combine(now))
    again.start_epoch(2, 0)  # a new epoch has its own first batch
    assert torch.equal(again.tasks.combine(now), now.sum(1))


def test_a_loss_balanced_weight_that_is_too_large_is_infinite():
    """So that training ends as one that diverges."""
    tasks = build(two_tasks(), loss_balanced_task_weighting=True, lbtw_alpha=100.0).tasks
    tasks.combine(torch.ones(3, 2))
    found = tasks.combine(torch.tensor([[1e4, 1.0]]))
    assert found.item() == math.inf


def test_the_minority_of_every_task_tells_the_best_epoch(fake_run):
    splits = two_tasks()
    assert selection.has_minority(splits)
    _, second = splits.val.of_task(1, splits.tasks[1])
    assert second.in_minority.any()
    splits.tasks[1] = dataclasses.replace(splits.tasks[1], minority=(False,) * 4)
    assert not selection.has_minority(splits)
    config = loading.validate({"best_epoch_by": "minority_acc", "hidden_dim": 4})
    network = building.build(config, (5,), 2).double()
    with pytest.raises(DataError, match="best_epoch_by: given minority_acc, but the validation"):
        loop.train(network, splits, config, fake_run)


def test_loss_balanced_weights_carry_no_gradient():
    splits = two_tasks()
    method = build(splits, loss_balanced_task_weighting=True)
    net = building.build(loading.validate({"hidden_dim": 4}), (5,), 2).double()
    loss = LOGISTIC
    x, y, group = splits.train.inputs, splits.train.y, splits.train.group
    method.backward(net, loss, x[:20], y[:20], group[:20])
    first = loss.value(net(x[:20]), y[:20]).mean(0).tolist()
    net.zero_grad()
    method.backward(net, loss, x[20:], y[20:], group[20:])
    ours = [p.grad.clone() for p in net.parameters()]
    now = loss.value(net(x[20:]), y[20:]).mean(0)
    weights = [(m / f) ** 0.5 for m, f in zip(now.tolist(), first)]
    net.zero_grad()
    sum(w * m for w, m in zip(weights, now)).backward()
    for found, p in zip(ours, net.parameters()):
        assert torch.allclose(found, p.grad, rtol=1e-10)


def test_weights_by_delta_are_a_softmax_over_what_validation_says():
    splits = two_tasks()
    method = build(splits, task_weighting="delta")
    assert method.tasks.combine(TASK_LOSSES).tolist() == [2.5, 5.5, 1.0]  # nothing is known yet
    right = {0: [0.9, 0.2, 0.1, 0.8], 1: [0.5, 0.5, 0.5, math.nan]}
    summary = {f"t{t}_group_{g}_acc": right[t][g] for t in right for g in range(4)}
    # The second task's last group is empty: its δ is NaN and counts as 0.
    val = splits.val
    val.task_groups[val.task_groups[:, 1] == 3, 1] = 0
    method.end_epoch({"val": summary})
    counts = val.task_groups[:, 0].bincount(minlength=4).tolist()
    delta = shortcuts.delta([a * n for a, n in zip(right[0], counts)], counts)
    assert delta > 10
    e = math.exp(delta / 100)
    assert method.tasks.weights == pytest.approx([e / (e + 1), 1 / (e + 1)])
    other = build(splits, task_weighting="delta")
    other.load_state(method.state())
    assert other.tasks.weights == method.tasks.weights


def test_metrics_of_every_task_against_its_own_split():
    splits = two_tasks(60, num_tasks=3)
    f = torch.randn(60, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = LOGISTIC
    found = metrics.task_summaries(f, splits.test, splits.tasks, loss, splits.train)
    worst, average = [], []
    for t in range(3):
        y, group = splits.test.y[:, t], splits.test.task_groups[:, t]
        right = (f[:, t] * y > 0).double()
        losses = torch.log1p(torch.exp(-f[:, t] * y))
        each = [right[group == g].mean().item() for g in range(4)]
        shares = splits.train.task_groups[:, t].bincount(minlength=4) / 60
        for g in range(4):
            assert found[f"t{t}_group_{g}_acc"] == pytest.approx(each[g])
            expected = losses[group == g].mean().item()
            assert found[f"t{t}_group_{g}_loss"] == pytest.approx(expected)
        minority = (group == 1) | (group == 2)
        assert found[f"t{t}_minority_acc"] == pytest.approx(right[minority].mean().item())
        expected = sum(s * a for s, a in zip(shares.tolist(), each))
        assert found[f"t{t}_adjusted_acc"] == pytest.approx(expected)
        assert found[f"t{t}_avg_acc"] == pytest.approx(right.mean().item())
        worst.append(min(each))
        average.append(right.mean().item())
    assert found["worst_acc"] == pytest.approx(min(worst))
    assert found["avg_acc"] == pytest.approx(sum(average) / 3)


def patterns_and_counts(labels):
    return np.unique(np.array(labels), axis=0, return_counts=True)


def test_entropy_weights_by_hand():
    """One task: every class has half of the weight."""
    weights = entropy.pattern_weights(np.array([[-1], [1]]), np.array([30, 10]), ["a"])
    assert weights == pytest.approx([1 / 60, 1 / 20])
    # Two independent tasks: the product of both.
    patterns = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    weights = entropy.pattern_weights(patterns, np.array([9, 3, 3, 1]), ["a", "b"])
    assert weights == pytest.approx([1 / 36, 1 / 12, 1 / 12, 1 / 4])


def generic(patterns, counts):
    """Maximal entropy by a general solver, over the shares of the patterns."""

    def negative(q):
        q = np.clip(q, 1e-300, None)
        return float(np.sum(q * np.log(q / counts)))

    constraints = [
        {"type": "eq", "fun": lambda q: q.sum() - 1},
        {"type": "eq", "fun": lambda q: patterns.T @ q},
    ]
    start = np.full(len(counts), 1 / len(counts))
    found = minimize(
        negative, start, bounds=[(0, 1)] * len(counts), constraints=constraints, method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )  # fmt: skip
    return found


@given(
    st.integers(1, 4).flatmap(
        lambda tasks: st.lists(
            st.tuples(*[st.sampled_from([-1, 1])] * tasks), min_size=2, max_size=40
        )
    )
)
@hypothesis_settings(max_examples=60)
def test_entropy_weights_against_a_generic_solver(labels):
    patterns, counts = patterns_and_counts(labels)
    found = generic(patterns, counts)
    feasible = np.abs(patterns.T @ found.x).max() < 1e-6 and abs(found.x.sum() - 1) < 1e-6
    names = [f"t{t}" for t in range(patterns.shape[1])]
    try:
        weights = entropy.pattern_weights(patterns, counts, names)
    except DataError:
        assert not feasible
        return
    shares = weights * counts
    assert shares.min() >= 0 and shares.sum() == pytest.approx(1)
    assert np.abs(patterns.T @ shares).max() < 1e-9
    if feasible and found.success:
        entropy_of = -sum(s * math.log(s / n) for s, n in zip(shares, counts) if s > 0)
        assert entropy_of == pytest.approx(-found.fun, abs=1e-3)
        assert entropy_of >= -found.fun - 1e-6  # the generic solver is less exact
        assert shares == pytest.approx(found.x, abs=0.02)


def test_patterns_that_no_weights_can_use_get_none():
    """In (-,-), (+,+), (+,-): b = + needs a = +, so (+,-) would tip a, and is of no use."""
    patterns, counts = np.array([[-1, -1], [1, -1], [1, 1]]), np.array([5, 7, 2])
    weights = entropy.pattern_weights(patterns, counts, ["a", "b"])
    assert weights == pytest.approx([0.1, 0, 0.25])
    assert weights[1] == 0


def test_many_patterns_take_little_memory():
    """All patterns of 12 tasks: independent, so each has the same share."""
    patterns = np.array(list(itertools.product((-1, 1), repeat=12)))
    counts = np.where(patterns[:, 0] > 0, 3, 1)
    with limited(seconds=20, memory=250 * 2**20):
        weights = entropy.pattern_weights(patterns, counts, [f"t{t}" for t in range(12)])
    assert weights == pytest.approx(1 / (4096 * counts))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([(-1, 1), (-1, -1)], "of a equally"),
        # b is + only with a = + and c = +, and one of a, c is + at most half of the time …
        ([(1, 1, -1), (1, -1, -1), (-1, 1, -1), (1, 1, 1)], None),
        ([(1, 1, 1), (1, -1, 1), (-1, 1, 1), (1, 1, -1)], "a and b and c"),
    ],
    ids=str,
)
def test_tasks_in_conflict_are_named(labels, named):
    patterns, counts = patterns_and_counts(labels)
    names = ["a", "b", "c"][: patterns.shape[1]]
    with pytest.raises(DataError) as error:
        entropy.pattern_weights(patterns, counts, names)
    text = str(error.value)
    reported = [n for n in names if n in text.partition("of ")[2].partition(" equally")[0].split()]
    assert named is None or named in text
    # The named set conflicts, and none of its parts without one task does.
    columns = [names.index(n) for n in reported]
    assert not entropy._usable(np.unique(patterns[:, columns], axis=0)).any()
    for left_out in columns:
        rest = [c for c in columns if c != left_out]
        assert not rest or entropy._usable(np.unique(patterns[:, rest], axis=0)).any()


def test_samplers_of_several_tasks_balance_each():
    splits = two_tasks(200, num_tasks=3)
    patterns, inverse, counts = np.unique(
        splits.train.y.numpy(), axis=0, return_inverse=True, return_counts=True
    )
    weights = entropy.pattern_weights(patterns, counts, ["t0", "t1", "t2"])[inverse]
    generator = torch.Generator().manual_seed(0)
    method = build(splits, "RWY")
    drawn = torch.cat([method.order(generator) for _ in range(300)])
    each = np.bincount(drawn, minlength=200) / len(drawn)
    assert np.abs(each - weights).max() < 5 * math.sqrt(weights.max() / len(drawn))
    assert splits.train.y[drawn].mean(0).abs().max() < 0.02

    kept = np.zeros(200)
    rows = {tuple(x): i for i, x in enumerate(splits.train.inputs.tolist())}
    for seed in range(100):
        part = build(splits, "SUBY", seed=seed).source
        found = [rows[tuple(x)] for x in part.inputs.tolist()]
        kept[found] += 1
        assert torch.equal(part.task_groups, splits.train.task_groups[found])
    expected = weights / weights.max()
    assert np.abs(kept / 100 - expected).max() < 5 * math.sqrt(0.25 / 100)


def test_join_rules_by_hand():
    wrong = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    assert identification.joined(wrong, "xor", None).tolist() == [0, 1, 0, 1]
    assert identification.joined(wrong, "inv", None).tolist() == pytest.approx([0, 1, 1 / 2, 1 / 3])
    joined = identification.joined(wrong, "task", [1.0, 2.0, 5.0])
    assert joined.tolist() == pytest.approx([0, 1 / 8, 7 / 8, 1])
    one = torch.tensor([[True], [False]])
    for rule in ("xor", "inv", "task"):
        assert identification.joined(one, rule, None).tolist() == [1, 0]


@pytest.mark.parametrize(("rule", "repeats"), [("xor", 10), ("inv", 5), ("task", 7)])
def test_samples_are_repeated_as_often_as_joined_weights_say(tmp_path, rule, repeats):
    """max(1, ⌊λ·weight⌋) for a sample that two of three tasks miss."""
    splits = two_tasks(40, num_tasks=3)
    group = splits.train.task_groups
    rows = [f"3,t{t},{group[3, t]}" for t in (1, 2)] + [f"5,t0,{group[5, 0]}"]
    (tmp_path / "set.csv").write_text("\n".join(["index,task,group", *rows, ""]))
    about = {"train_sha256": splits.train.digest(), "val_losses": {"t0": 3, "t1": 2, "t2": 5}}
    (tmp_path / "jtt_error_set.json").write_text(json.dumps(about))
    config = build(
        splits, jtt_error_set=str(tmp_path / "set.csv"), jtt_join=rule, jtt_lambda_up=10
    ).config

    class Run(FakeRun):
        leads = True

    (tmp_path / "run").mkdir()
    found = identification.identify(splits, config, Run(tmp_path / "run")).repeats.tolist()
    assert found[3] == {"xor": 1, "inv": 5, "task": repeats}[rule]
    assert found[5] == {"xor": 10, "inv": 10, "task": 3}[rule]
    assert sum(n > 1 for n in found) == {"xor": 1}.get(rule, 2)
    (tmp_path / "jtt_error_set.json").unlink()
    if rule == "task":
        (tmp_path / "other").mkdir()
        with pytest.raises(UserError, match="allowed without them: xor, inv"):
            identification.identify(splits, config, Run(tmp_path / "other"))


def test_one_task_among_several_is_the_single_task_bit_for_bit(tmp_path):
    """The same network, data and steps, with the labels as a column of one task."""
    single = in_float64(make_splits(train=(20, 5, 4, 22)))
    task = Task("label", groups.GROUPS, single.group_names)

    def column(split):
        return dataclasses.replace(
            split, y=split.y[:, None], a=split.a[:, None], task_groups=split.group[:, None]
        )

    several = dataclasses.replace(
        single, train=column(single.train), test=column(single.test), tasks=[task]
    )
    config = loading.validate(
        {"hidden_dim": 6, "epochs": 2, "train_batch_size": 8, "learning_rate": 0.3, **NO_ANALYSES}
    )
    found = []
    for splits in (single, several):
        net = building.build(config, (7,)).double()
        method = methods.build(config, splits)
        optimizer = schedule.build_optimizer(net, config)
        loss = LOGISTIC
        forward = net.forward
        if splits is several:
            net.forward = lambda x, forward=forward: forward(x)[:, None]
        for epoch in range(2):
            steps.minibatch_epoch(net, optimizer, splits.train, loss, 8, epoch, method)
        net.forward = forward
        f = predictions.outputs(net, single.test, 100)
        summary = metrics.summary(f, single.test, loss, single.train.shares)
        if splits is several:
            test, train = several.test, several.train
            reported = metrics.task_summaries(f[:, None], test, several.tasks, loss, train)
            summary = {name: reported[f"label_{name}"] for name in summary}
            assert reported["worst_acc"] == summary["worst_acc"]
        found.append((summary, [p.detach() for p in net.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, q) for p, q in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"debias_method": "GroupDRO"}, "allowed with several tasks: None, RWY, SUBY, JTT"),
        ({"debias_method": "RWG"}, "allowed with several tasks: None, RWY, SUBY, JTT"),
        ({"loss_function": "cross_entropy"}, "allowed with several tasks: logistic, mse"),
        ({"use_dfr": True}, "use_dfr: given true; allowed with several tasks: false"),
        ({"train_batch_size": None}, "allowed with several tasks: a whole number"),
        ({"analyze_jacobian_norm": True}, "allowed with several tasks: false"),
        ({"task_weights": [0.5, 0.4]}, "2 weights, all 1 or adding up to 1"),
        ({"task_weights": [1, 1, 1]}, "2 weights, all 1 or adding up to 1"),
        ({"task_weights": []}, "2 weights, all 1 or adding up to 1"),
        ({"task_weights": [0.5, 0.5], "loss_balanced_task_weighting": True}, "all 1"),
        ({"task_weights": [0.5, 0.5], "task_weighting": "delta"}, "makes the weights"),
        ({"task_weighting": "delta", "num_val_samples": 0}, "needs validation data"),
        (
            {"task_weighting": "delta", "groupings": ["A:B,C", "B:C"]},
            "needs one shortcut attribute for each task",
        ),
        (
            {"debias_method": "JTT", "jtt_join": "task", "num_val_samples": 0},
            "jtt_join: task needs validation data",
        ),
        ({"debias_method": "SCALE"}, "one task with one shortcut"),
    ],
    ids=str,
)
def test_what_several_tasks_cannot_have_is_refused(changes, message):
    given_keys = celeba_keys("x", groupings=TWO, use_dfr=False, **NO_ANALYSES)
    assert loading.validate(given_keys)
    with pytest.raises(ConfigError) as error:
        loading.validate(given_keys | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"task_weighting": "delta"},
        {"loss_balanced_task_weighting": True, "best_epoch_by": "avg_acc"},
        {"debias_method": "RWY"},
        {"debias_method": "SUBY", "train_batch_size": 4},
        {"debias_method": "JTT", "jtt_join": "task", "jtt_lambda_up": 3},
        {"debias_method": "JTT", "jtt_join": "inv", "jtt_lambda_up": 3},
    ],
    ids=str,
)
def test_several_tasks_end_to_end(celeba_run, changes):
    code, folder = celeba_run("run", groupings=TWO, epochs=2, target_resolution=8, **changes)
    assert code == 0
    log = (folder / "run.log").read_text()
    history = pd.read_csv(folder / "training_history.csv")
    for split in ("train", "val", "test"):
        for task in ("Blond_Hair", "Smiling"):
            for g in range(4):
                assert history[f"{split}_{task}_group_{g}_acc"].between(0, 1).all()
        worst = history[[f"{split}_{task}_worst_acc" for task in ("Blond_Hair", "Smiling")]]
        assert (worst.min(axis=1) == history[f"{split}_worst_acc"]).all()
    summary = json.loads((folder / "status.json").read_text())["summary"]
    for task in ("Blond_Hair", "Smiling"):
        worst, average = (summary[f"test_{task}_{name}_acc"] for name in ("worst", "avg"))
        assert f"  of {task}: worst group {worst:.3f}, average {average:.3f}" in log
    metric = changes.get("best_epoch_by", "worst_acc")
    by = [f"val_{metric}", "val_avg_acc", "val_avg_loss"]
    best = history[1:].sort_values(by, ascending=[False, False, True], kind="stable").index[0]
    assert summary["best_epoch"] == best
    counts = pd.read_csv(folder / "group_counts.csv").query(
        "split == 'train' and task == 'Smiling'"
    )
    assert counts["name"].tolist()[1] == "not Smiling, Young" and counts["count"].sum() == 216


def test_figures_of_every_task(celeba_run, monkeypatch):
    with monkeypatch.context():
        code, folder = celeba_run("run", groupings=TWO, epochs=1, target_resolution=8)
    assert code == 0
    run = reading.read_run(folder)
    assert tables.task_names(run) == ["Blond_Hair", "Smiling"]
    part = tables.of_task(run, "Smiling")
    assert part.labels[1] == "not Smiling, Young"
    expected = run.history["test_Smiling_group_2_acc"]
    assert part.history["test_group_2_acc"].tolist() == expected.tolist()
    assert "test_Blond_Hair_group_2_acc" not in part.history
    monkeypatch.undo()
    names = {path.stem for path in plotting.draw(folder)}
    per_task = {f"{name}_{task}" for task in ("Blond_Hair", "Smiling")
                for name in ("group_curves", "gaps", "misclassification")}  # fmt: skip
    assert names == per_task | {"training_history", "samples"}


@pytest.mark.parametrize("changes", [{"loss_balanced_task_weighting": True},
                                     {"task_weighting": "delta"}], ids=str)  # fmt: skip
def test_weights_of_tasks_survive_a_stop_in_the_middle_of_an_epoch(
    celeba_run, monkeypatch, changes
):
    """216 faces in batches of 40: six steps an epoch."""
    asked = {
        "groupings": TWO, "epochs": 2, "target_resolution": 8, "train_batch_size": 40,
    } | changes  # fmt: skip
    code, whole = celeba_run("whole", **asked)
    assert code == 0
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 9, sent(signal.SIGTERM))
        code, folder = celeba_run("run", **asked)
    assert code == 143
    assert main.main(["--resume", str(folder)]) == 0
    name = "training_history.csv"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
