"""SCALE, spurious correlation via auxiliary learning: train gradients as far as target ones agree.

A shared body has two heads. In every step the gradient g of a batch of the biased training set,
through the train head, and the gradient t of a batch of the small unbiased target set, through
the target head, meet row by row of the body's parameters: the row moves along λ·g + t, where λ
grows with the cosine of g and t. Momentum and weight decay are those of SGD. What is evaluated
is the target head, which is the network's own last layer.
"""

import copy
import logging

import torch

from lab.config.seeds import derive_seed
from lab.evaluation import predictions
from lab.methods.erm import ERMTarget
from lab.system import distributed
from lab.system.errors import DataError

log = logging.getLogger(f"spurious.{__name__}")

EPS = 1e-8  # as in the published code
# λ of the cosine c.
MODES = {
    "linear": lambda c: (c + 1) / 2,
    "relu": lambda c: c.clamp_min(0),
    "raw": lambda c: c,
    "step": lambda c: (c > 0).to(c.dtype),
}


def num_rows(shape, group_size: int) -> int:
    """Into how many rows a parameter tensor of this shape is cut.

    A convolution's (out, in) kernels make rows of `group_size` in row-major order, or of the
    largest divisor of out·in below it; one row an output channel if it sees at most 3 channels.
    Every other tensor is one row.
    """
    if len(shape) != 4:
        return 1
    outputs, inputs = shape[:2]
    if inputs <= 3:
        return outputs
    size = min(group_size, outputs * inputs)
    while outputs * inputs % size:
        size -= 1
    return outputs * inputs // size


def cosines(g: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Cosine of every row of g and t (rows, k), (rows,), with the product of norms at least `EPS`.

    Where one of them is rounding noise the cosine is so close to 0, and the linear λ to 1/2.
    """
    return (g * t).sum(1) / (g.norm(dim=1) * t.norm(dim=1)).clamp_min(EPS)


class SCALE(ERMTarget):
    """Batches are of the training set; `targets` gives as many samples of the target set."""

    def __init__(self, config, splits):
        super().__init__(config, splits)
        if config.train_batch_size > min(len(splits.target), len(splits.train)):
            raise DataError(
                f"train_batch_size: given {config.train_batch_size}, but SCALE draws as many "
                f"samples from the target set, which has {len(splits.target)}, and from training, "
                f"which has {len(splits.train)}"
            )
        self.steps = 0
        self.cosine_sums = None

    @property
    def source(self):
        return self.splits.train

    def prepare(self, model) -> list:
        self.train_head = copy.deepcopy(model.classifier)
        heads = {id(p) for p in model.classifier.parameters()}
        self.body = {
            name: p for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in heads
        }  # fmt: skip
        size = self.config.scale_group_size
        self.rows = {name: num_rows(p.shape, size) for name, p in self.body.items()}
        for name, parameter in self.body.items():
            kernels = parameter.shape[:2].numel() // self.rows[name]
            if parameter.dim() == 4 and parameter.shape[1] > 3 and kernels != size:
                log.info("SCALE: rows of %d kernels in %s", kernels, name)
        self.cosine_sums = torch.zeros(len(self.body), device=next(model.parameters()).device)
        return [p for p in self.train_head.parameters() if p.requires_grad]

    def start_epoch(self, epoch: int, first: int) -> None:
        super().start_epoch(epoch, first)
        if first == 0:
            self.steps = 0
            self.cosine_sums.zero_()
        self.targets = self._target_batches(epoch, first)

    def _target_batches(self, epoch: int, first: int):
        """Yields (x, y) for every step: drawn anew without replacement, changed like training.

        The pictures' random changes are drawn anew after as many steps as make up the set.
        """
        target, size = self.splits.target, self.config.train_batch_size
        seed = derive_seed(self.config.seed, "target batches", epoch)
        generator = torch.Generator().manual_seed(seed)
        drawn = self._draws(len(target), size, generator)
        chunk, steps = 0, max(1, len(target) // size)
        while True:
            part = target
            if self.config.data_augmentation:
                purpose = ("target augmentation", epoch, chunk)
                part = target.augmented(derive_seed(self.config.seed, *purpose))
            plan = [(None, next(drawn)) for _ in range(steps)]
            skipped = min(first, steps)
            first, chunk = first - skipped, chunk + 1
            for _, index, x in predictions.batches(part, plan[skipped:]):
                yield x, target.y[index]

    @staticmethod
    def _draws(n: int, size: int, generator):
        """Index tensors of `size` out of n, this rank's part of them."""
        while True:
            order = torch.randperm(n, generator=generator)[:size]
            yield order[distributed.rank() :: distributed.world()]

    def backward(self, model, loss, x, y, group) -> None:
        target_x, target_y = next(self.targets)
        parameters = [*self.body.values(), *self.train_head.parameters()]
        f = self.train_head(model.hidden(x)).squeeze(1)
        self.batch_loss(loss.value(f, y), group).backward()
        distributed.sum_gradients(parameters)
        g = {name: p.grad.clone() for name, p in self.body.items()}
        for p in self.body.values():
            p.grad = None
        self.batch_loss(loss.value(model(target_x), target_y), None).backward()
        distributed.sum_gradients(model.parameters())
        means = []
        for name, p in self.body.items():
            train, target = (v.reshape(self.rows[name], -1) for v in (g[name], p.grad))
            c = cosines(train, target)
            scale = MODES[self.config.scale_mode](c)
            p.grad.copy_((scale[:, None] * train + target).view(p.shape))
            means.append(c.mean())
        self.cosine_sums += torch.stack(means)
        self.steps += 1

    def measured(self) -> dict[str, float]:
        """Mean cosine over rows and steps of every tensor of the body."""
        if not self.steps:
            return {}
        values = (self.cosine_sums / self.steps).tolist()
        return {f"cosine_{name}": value for name, value in zip(self.body, values)}

    def state(self) -> dict:
        return {
            "train_head": self.train_head.state_dict(),
            "cosine_sums": self.cosine_sums,
            "steps": self.steps,
        }

    def load_state(self, state: dict) -> None:
        self.train_head.load_state_dict(state["train_head"])
        self.cosine_sums.copy_(state["cosine_sums"])
        self.steps = state["steps"]
