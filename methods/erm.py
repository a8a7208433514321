"""Empirical risk minimisation: every sample counts the same."""

import groups


class ERM:
    """Base of all methods. The flow of ERM is -∇R = -Σ π_g ∇R_g."""

    # Full batch over groups (one step an epoch), whatever `train_batch_size` says.
    full_batch = False

    def __init__(self, config, counts):
        """counts: samples per group of the training split."""
        self.config, self.counts = config, list(counts)

    def flow_weights(self, group_losses, counts) -> list[float]:
        """Weights w_g of the next step. Changes nothing.

        group_losses: mean losses R_g on the training split before the step; counts: samples per
        group of the split whose gradients are weighted (training's own for a step).
        """
        return groups.shares(counts)

    def advance(self, group_losses) -> None:
        """Update the method's state before a step from the mean losses R_g."""

    def state(self) -> dict:
        """What a checkpoint has to hold of the method."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take back what `state` gave."""
