"""Trackers: they show the numbers of a run's tables elsewhere, and can never stop the run."""

import csv
import io
import json
import logging
import math
import os
import time
from functools import reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab.config import schema
from lab.config.schema import Config
from lab.runs.tables import tagged
from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")

WANDB_TIMEOUT = 5  # seconds; wandb's own without a network is over 90


class Tracker:
    """What a run reports to its trackers; each overrides what it shows."""

    def samples(self, pictures: dict) -> None:
        """Some training pictures (n, H, W, C) in [0, 1] of each group, by its name."""

    def rewind(self, epoch: int) -> None:
        """Training continues after this epoch (-1: from the start) and reports later ones again."""

    def log(self, epoch: int, values: dict) -> None:
        """Numbers of an epoch, by name: a row of a table, or several rows."""

    def histograms(self, epoch: int, values: dict) -> None:
        """Tensors of an epoch, by name."""

    def images(self, paths) -> None:
        """Saved plots."""

    def finish(self, summary: dict, failed: bool) -> None:
        """The final metrics by name, and whether the run ended before it was done."""


class Wandb(Tracker):
    """Shows a run on Weights & Biases, with the epoch as x-axis."""

    def __init__(self, run):
        self.run = run
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, values: dict) -> None:
        # NaN would end the axes of wandb's charts; the tables keep it.
        self.run.log(_finite(values) | {"epoch": epoch})

    def images(self, paths) -> None:
        import wandb

        if _are_png(paths, "wandb"):
            self.run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})

    def finish(self, summary: dict, failed: bool) -> None:
        self.run.summary.update(_finite(summary))
        self.run.finish(exit_code=int(failed))


class TensorBoard(Tracker):
    """Shows a run in TensorBoard, by an event file in `<run>/tensorboard/`.

    Every process, and every cut of the tables, begins a new file with the rows that the tables
    hold and with what only the file before has, histograms and sample pictures. So it shows what
    the tables say, every row once. It is written record by record, without a thread of its own:
    a run that is killed loses nothing.
    """

    def __init__(self, config: Config, folder: Path):
        self.run_folder, self.folder = folder, folder / "tensorboard"
        settings = config.resolved()
        self.hyperparameters = {
            name: _number_or_text(reduce(getitem, name.split("."), settings))
            for name, _, _ in schema.fields()
        }
        self.file: Any = None
        self.folder.mkdir(exist_ok=True)
        files.remove_temporaries(self.folder)
        self.rewind(math.inf)

    def rewind(self, epoch: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary as protos

        before = sorted(self.folder.glob("events.out.tfevents.*"))
        kept = {}  # by tag and step, so once even if a kill here left two files
        times: dict[int, float] = {}
        for event in _events(before):
            for value in event.summary.value:
                histogram = value.HasField("histo") and event.step <= epoch
                if histogram or value.tag.startswith("samples/"):
                    kept[value.tag, event.step] = event
                if value.HasField("simple_value"):
                    times.setdefault(event.step, event.wall_time)

        buffer = io.BytesIO()
        self.writer = RecordWriter(buffer)
        self.epoch = 0  # the last one reported
        self._add(Event(file_version="brain.Event:2"))
        _, start, _ = protos.hparams(self.hyperparameters, {})
        self._add(Event(summary=start))
        for event in kept.values():
            self.writer.write(event.SerializeToString())
        self.has_samples = any(tag.startswith("samples/") for tag, _ in kept)
        for row_epoch, values in _recorded(self.run_folder):
            self.log(row_epoch, values, times.get(row_epoch))

        # A new name: TensorBoard would keep its position in the old file.
        path = self.folder / f"events.out.tfevents.{time.time_ns()}"
        files.write(path, buffer.getvalue())
        if self.file:
            self.file.close()
        for old in before:
            old.unlink()
        self.file = files.Growing(path)
        self.writer = RecordWriter(SimpleNamespace(write=self.file.append))

    def samples(self, pictures: dict) -> None:
        from torch.utils.tensorboard import summary as protos

        if not self.has_samples:  # a resumed run reports them again
            for name, group in pictures.items():
                self._add_summary(0, protos.image(f"samples/{name}", group, dataformats="NHWC"))

    def log(self, epoch: int, values: dict, wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = _finite(values)
        shown.pop("epoch", None)  # the x-axis
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        if scalars:
            self._add_summary(epoch, Summary(value=scalars), wall_time)
        self.epoch = max(self.epoch, epoch)

    def histograms(self, epoch: int, values: dict) -> None:
        from torch.utils.tensorboard import summary as protos

        for name, tensor in values.items():
            finite = tensor[tensor.isfinite()]
            if len(finite):
                self._add_summary(epoch, protos.histogram(name, finite, bins=64))

    def images(self, paths) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not _are_png(paths, "tensorboard"):
            return
        for path in paths:
            with Image.open(path) as picture:
                width, height = picture.size
            encoded = path.read_bytes()
            image = Summary.Image(width=width, height=height, encoded_image_string=encoded)
            value = Summary.Value(tag=f"plots/{path.stem}", image=image)
            self._add_summary(self.epoch, Summary(value=[value]))

    def finish(self, summary: dict, failed: bool) -> None:
        from torch.utils.tensorboard import summary as protos

        metrics = {f"final/{name}": value for name, value in _finite(summary).items()}
        self.log(self.epoch, metrics)
        if not failed:
            # SummaryWriter.add_hparams would write them to a folder of their own.
            experiment, _, end = protos.hparams(self.hyperparameters, metrics)
            self._add_summary(0, experiment)
            self._add_summary(0, end)
        self.file.close()

    def _add_summary(self, step: int, summary, wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(step=step, summary=summary), wall_time)

    def _add(self, event, wall_time: float | None = None) -> None:
        event.wall_time = wall_time or time.time()
        self.writer.write(event.SerializeToString())


def start_tensorboard(config: Config, folder: Path) -> TensorBoard | None:
    """A tracker for TensorBoard as the configuration asks for, or None with one warning."""
    if not config.tensorboard:
        return None
    try:
        return TensorBoard(config, folder)
    except Exception as error:  # a tracker must never stop a run
        log.warning("tensorboard: not used, %s", error)
        return None


def _number_or_text(value):
    """A setting as TensorBoard takes it."""
    plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return value if plain else json.dumps(value)


def _events(paths):
    """The whole events of event files."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in paths:
        yield from LegacyEventFileLoader(str(path)).Load()


def _recorded(folder: Path):
    """(epoch, values) of the rows in a run's tables, as `Tracker.log` gets them."""
    for row in _rows(folder / "training_history.csv"):
        yield int(row["epoch"]), {name: float(value) for name, value in row.items()}
    rows = _rows(folder / "analysis.csv")
    numbers = [{"epoch": int(row["epoch"]), "value": float(row["value"])} for row in rows]
    yield from tagged([row | n for row, n in zip(rows, numbers)]).items()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _finite(values: dict) -> dict:
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def _are_png(paths, tracker: str) -> bool:
    """Whether a tracker can show these plots; logs a warning if not."""
    if any(path.suffix != ".png" for path in paths):
        log.warning("%s: shows no SVG; plot_format: png has the plots there, too", tracker)
        return False
    return True


def start_wandb(config: Config, folder: Path, run_id: str) -> Wandb | None:
    """A wandb run as the configuration asks for, or None with one warning.

    run_id: the same when the run is resumed, so that wandb continues it. Never waits longer than
    a few seconds: without a key it goes offline at once, without a network after
    `WANDB_TIMEOUT`.
    """
    if not config.wandb.enable:
        return None
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE", "auto")
        mode = config.wandb.mode if config.wandb.mode != "auto" else mode
        if mode in ("auto", "online") and not _logged_in(wandb):
            if mode == "online":
                log.warning("wandb: not logged in (`wandb login`), so this run is kept offline")
            mode = "offline"
        mode = "online" if mode == "auto" else mode
        try:
            run = _init_wandb(wandb, config, folder, run_id, mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            log.warning("wandb: no connection, so this run is kept offline (%s)", error)
            mode, run = "offline", _init_wandb(wandb, config, folder, run_id, "offline")
        if mode == "offline":
            log.info("wandb: offline; to upload: wandb sync %s", Path(run.dir).parent)
        elif mode == "online":
            log.info("wandb: %s", run.url)
        return Wandb(run)
    except Exception as error:  # a tracker must never stop a run
        log.warning("wandb: not used, %s", error)
        return None


def _logged_in(wandb) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # a key that cannot be one
        log.warning("wandb: the key is not usable (%s)", error)
        return False


def _init_wandb(wandb, config: Config, folder: Path, run_id: str, mode: str):
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        group=config.wandb.group,
        name=folder.name,
        id=run_id,
        resume="allow",
        config=config.resolved(),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True, console="off"),
    )
