"""The training loop: epochs, evaluation, analyses when due, checkpoints.

Every epoch, 0 (before the first step) included, ends with a row in `training_history.csv` and,
when analyses are due, their rows in `analysis.csv`.

Training that continues from a checkpoint repeats, bit for bit, what an uninterrupted one does:
batches derive from (seed, epoch), so no generator's state has to survive.
"""

import logging
from typing import Any

from torch import nn

from lab import methods
from lab.config.schema import Config
from lab.evaluation import selection
from lab.splits.splits import Splits
from lab.system.command import Stopped, whole_step
from lab.training.checkpointing import Checkpointer
from lab.training.progress import progress_of, text
from lab.training.recording import Diverged, Recorder
from lab.training.run import Run
from lab.training.state import Summaries
from lab.training.steps import Steps

log = logging.getLogger(f"spurious.{__name__}")


def train(
    model: nn.Module, splits: Splits, config: Config, run: Run
) -> tuple[Summaries, dict[str, Any]]:
    """Train the network and record everything in the run.

    Continues from the run's last checkpoint, if there is one. Returns the last epoch's summaries
    (see `metrics.summary`) by split, and {"epoch", "score", "summaries"} of the epoch with the
    best validation accuracy (`selection_metric`), {} without validation data. Raises `Diverged`
    when the loss turns NaN or infinite, after recording that epoch.

    Ends after `epochs`, or when `early_stopping_patience` is over. Raises `DataError` for a
    patience without validation data.
    """
    selection.check(splits, config)
    method = methods.build(config, splits)
    steps = Steps(model, method, config)
    recorder = Recorder(model, method, splits, config, run)
    checkpointer = Checkpointer(
        model, steps.optimizer, method, splits, config, run, recorder.analyses.one_pass
    )
    state = checkpointer.restore()
    try:
        with progress_of(state.epoch, config.epochs) as progress:
            while not state.finished(config):
                epoch = state.epoch + 1
                if epoch > 0:
                    with run.timed("training", epoch):
                        steps.train_epoch(epoch, state)
                with run.timed("evaluation and analyses", epoch):
                    summaries, measurement = recorder.record(epoch, state.summaries)
                    checkpointer.keep_best(epoch, summaries, state)
                    if measurement.K is not None or measurement.K_jacobian is not None:
                        state.grams[epoch] = (measurement.K, measurement.K_jacobian)
                    with whole_step():
                        method.end_epoch(summaries)
                        state.end_epoch(epoch, summaries, run.sizes())
                progress.show(epoch, text(state.summaries))
                if state.checkpoint_is_due(config):
                    checkpointer.write(state)
        if state.out_of_patience(config):
            ended, lowest = state.epoch, state.lowest[1]
            log.info(
                "Training ended at epoch %d: the validation loss was lowest at epoch %d",
                ended,
                lowest,
            )
    except Stopped as stop:
        if not stop.torn:  # else the state is neither the last step's nor the next one's
            checkpointer.write(state)
        raise
    except Diverged:
        checkpointer.write_grams(state)
        raise
    recorder.end(state.epoch, state.summaries)
    checkpointer.write_weights()
    return state.summaries, state.best
