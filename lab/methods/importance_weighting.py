"""Importance weighting to uniform groups: every non-empty group counts the same."""

from lab.methods.erm import ERM, even_weights
from lab.system import distributed


class IWUniform(ERM):
    """w_g = 1/G, or spread evenly over the non-empty groups."""

    def flow_weights(self, group_losses, counts) -> list[float]:
        return even_weights(counts)

    def batch_loss(self, losses, group):
        """Mean of ℓ_i·w_g/π_g, whose expectation over batches is Σ w_g R_g."""
        size = distributed.total(losses.new_tensor([len(losses)]))
        ratios = [
            weight * sum(self.counts) / count if count else 0.0
            for weight, count in zip(self.flow_weights(None, self.counts), self.counts)
        ]
        return (losses * losses.new_tensor(ratios)[group]).sum() / size.squeeze()
