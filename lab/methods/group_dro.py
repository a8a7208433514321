"""Group distributionally robust optimisation: the worse a group does, the more it counts.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020, Algorithm 1: in
full batch over groups, or online, with the group losses of each mini-batch.
"""

import math

import torch

from lab.methods.erm import ERM
from lab.system import distributed


class GroupDRO(ERM):
    """w = q, with q_g ← q_g·exp(η·R_g)/Z before every step; q starts uniform.

    Online R_g is the mean over the batch; a group absent from the batch keeps its q, up to Z, and
    counts nothing in this step. The flow of online steps is therefore Σ q_g P_g ∇R_g, on average,
    with P_g the probability that a batch holds a sample of group g.

    The state is log q: in long runs the weight of an easy group falls below what a float holds,
    and must still be able to come back. An empty group keeps log q = -inf.
    """

    def __init__(self, config, splits):
        super().__init__(config, splits)
        nonempty = sum(count > 0 for count in self.counts)
        self.log_q = [-math.log(nonempty) if count else -math.inf for count in self.counts]

        self.presence = [1.0] * len(self.counts)
        size, total = config.train_batch_size, sum(self.counts)
        online = config.group_batches != "full" or config.network.batch_norm
        if online and size is not None and size < total:
            self.presence = [presence(count, total, size) for count in self.counts]

    def _next_log_q(self, group_losses) -> list[float]:
        raised = [
            log_q + self.config.dro_eta_q * loss if log_q > -math.inf else log_q
            for log_q, loss in zip(self.log_q, group_losses)
        ]
        top = max(raised)
        log_z = top + math.log(sum(math.exp(value - top) for value in raised))
        return [value - log_z for value in raised]

    def flow_weights(self, group_losses, counts) -> list[float]:
        q = self.step_weights(group_losses)
        return [weight * p for weight, p in zip(q, self.presence)]

    def step_weights(self, group_losses) -> list[float]:
        return [math.exp(value) for value in self._next_log_q(group_losses)]

    def advance(self, group_losses) -> None:
        self.log_q = self._next_log_q(group_losses)

    def batch_loss(self, losses, group):
        """Σ q_g R_g over the groups of the batch, after the update of q."""
        counts = distributed.total(torch.bincount(group, minlength=len(self.counts)))
        sums = torch.zeros(len(self.counts), dtype=losses.dtype, device=losses.device)
        sums = distributed.total(sums.index_add_(0, group, losses.detach()))
        # exp(η·0) = 1: absent groups change by the normalisation only.
        self.log_q = self._next_log_q((sums / counts.clamp_min(1)).tolist())
        weights = losses.new_tensor([math.exp(value) for value in self.log_q]) / counts
        return (losses * weights[group]).sum()

    def state(self) -> dict:
        return {"log_q": self.log_q}

    def load_state(self, state: dict) -> None:
        self.log_q = state["log_q"]


def presence(count: int, total: int, size: int) -> float:
    """Probability that a batch of an epoch holds a group of `count` of `total` samples.

    An epoch is a random order cut into batches of `size`, the last one perhaps smaller; a batch of
    b samples misses the group with probability C(total - count, b) / C(total, b).
    """
    whole, rest = divmod(total, size)
    sizes = {size: whole} | ({rest: 1} if rest else {})
    missed = {b: math.comb(total - count, b) / math.comb(total, b) for b in sizes}
    return 1 - sum(missed[b] * number for b, number in sizes.items()) / sum(sizes.values())
