"""Training: from epoch 0, before the first step, to the last one, with everything recorded.

`train(network, splits, config, run)` goes through the epochs. Each is one pass in batches, or one
step on the whole split group by group, along what the method says (`lab/methods/`). Then the
network is evaluated on every split, the analyses that are due are made, a row is appended to
`training_history.csv`, and the best epoch is kept. A checkpoint holds the state after a whole
step: training that continues from it repeats, bit for bit, what an uninterrupted one does.

- `lab/training/loop.py`: the loop; `state.py`: its position;
- `lab/training/steps.py`, `schedule.py`: the steps of an epoch, the optimizer and its rates;
- `lab/training/recording.py`, `selection.py`: evaluation, rows, the best epoch;
- `lab/training/checkpointing.py`, `checkpoints.py`: what is written for resuming, and read with
  distrust;
- `lab/training/run.py`: what training needs of the run that it belongs to;
- `lab/training/identification.py`: JTT's first network, a stage before training.
"""

from lab.training.loop import train
from lab.training.recording import Diverged

__all__ = ["Diverged", "train"]
