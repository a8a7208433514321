"""The first stage of JTT: which training samples a network trained by ERM gets wrong.

Liu et al., "Just Train Twice: Improving Group Robustness without Training Group Information", 2021.
`<run>/identification/` has the tables and checkpoints of that network, `<run>/jtt_error_set.csv`
the samples, by their index in the training split, `jtt_error_set.json` the hash of that split.
"""

import csv
import io
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from lab.config.registry import Analysis
from lab.config.schema import Config
from lab.evaluation import metrics, predictions
from lab.networks import building
from lab.splits.splits import Splits
from lab.system import distributed, files
from lab.system.errors import DataError, UserError
from lab.training.loop import train
from lab.training.recording import Diverged
from lab.training.run import Run

log = logging.getLogger(f"spurious.{__name__}")

FILE, ABOUT = "jtt_error_set.csv", "jtt_error_set.json"
COLUMNS = ["index", "task", "group"]
MAX_BYTES = 256 * 2**20


def identify(splits: Splits, config: Config, run: Run) -> Splits:
    """The splits with `repeats` for JTT, λ for samples of the error set and 1 for others.

    The error set is the run's own if it has one already, else that of `jtt_error_set`, else found
    by training a network, from its last checkpoint on. Raises `UserError` when the file is not of
    this training split, `Diverged` when training that network diverges.
    """
    path, digest = run.folder / FILE, splits.train.digest()
    losses: dict[str, float]
    if not path.exists():
        if config.jtt_error_set is None:
            wrong, losses = _train(splits, config, run)
        else:
            given = Path(config.jtt_error_set)
            wrong = read(given, splits, digest)
            names = [task.name for task in splits.tasks]
            losses = dict(zip(names, _losses(given, splits, config) or []))
        if run.leads:
            _write(path, wrong, splits, {"train_sha256": digest, "val_losses": losses})
    distributed.barrier()  # all read what the first rank has written
    wrong = read(path, splits, digest)
    for name, rates in error_rates(wrong, splits).items():
        log.info("JTT error set of %s: %s", name, rates)
    if not wrong.any():
        log.warning("JTT: the identification network made no error, so this is plain ERM")
    weights = joined(wrong, config.jtt_join, _losses(path, splits, config))
    return replace(splits, repeats=(config.jtt_lambda_up * weights + 1e-9).long().clamp_min(1))


def joined(wrong: torch.Tensor, join: str, losses: list[float] | None) -> torch.Tensor:
    """Weight of every sample, (N,) float64, from the tasks that miss it, (N, tasks) bool.

    xor: 1 where an odd number of tasks does; inv: 1/(number of tasks that do); task: the sum over
    the tasks that do of their validation losses, normalised to Σ = 1. 0 where none does.
    """
    missed = wrong.sum(1).double()
    if join == "xor" or wrong.shape[1] == 1:
        return missed % 2
    if join == "inv":
        return torch.where(missed > 0, 1 / missed.clamp_min(1), 0.0)
    shares = torch.tensor(losses, dtype=torch.float64)
    return wrong.double() @ (shares / shares.sum())


def _losses(path: Path, splits: Splits, config: Config) -> list[float] | None:
    """Validation losses of the identification network by task, None where joining needs none."""
    if config.jtt_join != "task" or len(splits.tasks) == 1:
        return None
    try:
        about = json.loads(path.with_name(ABOUT).read_text(encoding="utf-8"))
        found = [float(about["val_losses"][task.name]) for task in splits.tasks]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"jtt_join: task needs the validation losses in {path.with_name(ABOUT)} ({error}); "
            "allowed without them: xor, inv"
        ) from None
    if not all(math.isfinite(loss) and loss >= 0 for loss in found) or not sum(found):
        raise UserError(f"{path.with_name(ABOUT)}: losses {found} are not usable")
    return found


def stage_config(config: Config) -> Config:
    """The configuration of the identification network: ERM with settings of its own."""
    rate, decay = config.jtt_learning_rate, config.jtt_weight_decay
    changed = {
        "debias_method": "None",
        "epochs": config.jtt_epochs,
        "early_stopping_patience": None,
        "learning_rate": config.learning_rate if rate is None else rate,
        "weight_decay": config.weight_decay if decay is None else decay,
    }
    return config.model_copy(
        update=changed | {record.switch: False for record in config.catalogue.of(Analysis).values()}
    )


def _train(splits: Splits, config: Config, run: Run) -> tuple[torch.Tensor, dict[str, float]]:
    """Train a network by ERM; which training samples it gets wrong, (N, tasks) bool.

    With its validation losses by task, {} without validation data.
    """
    config = stage_config(config)
    network = building.build_for(config, splits).to(splits.train.y.device)
    log.info("JTT, identification: %d epochs of ERM", config.epochs)
    part = run.part("identification")
    try:
        with run.timed("identification"):
            summaries, _ = train(network, splits, config, part)
    except Diverged as error:
        raise Diverged(f"the identification network of JTT: {error}") from None
    finally:
        part.close()
    f = predictions.outputs(network, splits.train, config.eval_batch_size)
    y, f = splits.train.y.view(len(f), -1), f.view(len(f), -1)
    wrong = torch.stack([~metrics.correct(f[:, t], y[:, t]) for t in range(y.shape[1])], dim=1)
    val, prefixed = summaries.get("val", {}), len(splits.tasks) > 1
    losses = {
        task.name: val[f"{task.name}_avg_loss" if prefixed else "avg_loss"]
        for task in splits.tasks
        if val
    }
    return wrong.cpu(), losses


def _groups(splits: Splits) -> torch.Tensor:
    """Group of every training sample in every task, (N, tasks)."""
    train = splits.train
    return (train.group[:, None] if train.task_groups is None else train.task_groups).cpu()


def error_rates(wrong: torch.Tensor, splits: Splits) -> dict[str, str]:
    """{task: share of each group's training samples that are in the error set}, as text."""
    texts, group = {}, _groups(splits)
    for t, task in enumerate(splits.tasks):
        rates = [
            f"{name} {wrong[group[:, t] == g, t].float().mean().item():.3f}"
            for g, name in enumerate(task.group_names)
            if (group[:, t] == g).any()
        ]
        omitted = f" … ({len(rates)} groups)" if len(rates) > 16 else ""
        total = wrong[:, t].float().mean().item()
        texts[task.name] = f"{total:.3f} of all; " + "; ".join(rates[:16]) + omitted
    return texts


def _write(path: Path, wrong: torch.Tensor, splits: Splits, about: dict) -> None:
    """Write an error set, and beside it what it is of."""
    group = _groups(splits)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, t in wrong.nonzero().tolist():
        writer.writerow([index, splits.tasks[t].name, group[index, t].item()])
    files.write_text(path.with_name(ABOUT), json.dumps(about) + "\n")
    files.write_text(path, text.getvalue())


def read(path: Path, splits: Splits, digest: str) -> torch.Tensor:
    """Which training samples, (N, tasks) bool, an error set holds.

    digest: of the training split. Raises `UserError` for a file that is not an error set, or is
    one of another training split.
    """
    names = [task.name for task in splits.tasks]
    wrong, group = torch.zeros(_groups(splits).shape, dtype=torch.bool), _groups(splits)
    try:
        about = path.with_name(ABOUT)
        if (
            about.exists()
            and json.loads(about.read_text(encoding="utf-8"))["train_sha256"] != digest
        ):
            raise DataError(
                f"jtt_error_set: {path} is of another training split than these settings make; "
                "take the same data, seed and sizes, or null"
            )
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            if next(rows, None) != COLUMNS:
                raise ValueError(f"its first line is not {','.join(COLUMNS)}")
            for number, row in enumerate(rows, 2):
                index, t = int(row[0]), names.index(row[1])
                if not 0 <= index < len(wrong) or int(row[2]) != group[index, t]:
                    raise ValueError(f"row {number} is of another training split")
                wrong[index, t] = True
    except OSError as error:
        raise UserError(f"jtt_error_set: {path} cannot be read, {error.strerror}") from None
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"jtt_error_set: {path} is not usable ({error})") from None
    return wrong
