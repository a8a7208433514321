"""Group distributionally robust optimisation: the worse a group does, the more it counts.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020, Algorithm 1, in
full batch over groups.
"""

import math

from methods.erm import ERM


class GroupDRO(ERM):
    """w = q, with q_g ← q_g·exp(η·R_g)/Z before every step; q starts uniform.

    The state is log q: in long runs the weight of an easy group falls below what a float holds,
    and must still be able to come back. An empty group has log q = -inf and stays there.
    """

    full_batch = True

    def __init__(self, config, counts):
        super().__init__(config, counts)
        there = sum(count > 0 for count in self.counts)
        self.log_q = [-math.log(there) if count else -math.inf for count in self.counts]

    def _next_log_q(self, group_losses) -> list[float]:
        raised = [
            log_q + self.config.dro_eta_q * loss if log_q > -math.inf else log_q
            for log_q, loss in zip(self.log_q, group_losses)
        ]
        top = max(raised)
        log_z = top + math.log(sum(math.exp(value - top) for value in raised))
        return [value - log_z for value in raised]

    def flow_weights(self, group_losses, counts) -> list[float]:
        return [math.exp(value) for value in self._next_log_q(group_losses)]

    def advance(self, group_losses) -> None:
        self.log_q = self._next_log_q(group_losses)

    def state(self) -> dict:
        return {"log_q": self.log_q}

    def load_state(self, state: dict) -> None:
        self.log_q = state["log_q"]
