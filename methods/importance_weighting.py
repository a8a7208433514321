"""Importance weighting to uniform groups: every non-empty group counts the same."""

from methods.erm import ERM


class IWUniform(ERM):
    """w_g = 1/4, or spread evenly over the non-empty groups."""

    full_batch = True

    def flow_weights(self, group_losses, counts) -> list[float]:
        there = sum(count > 0 for count in counts)
        return [float(count > 0) / there for count in counts]
