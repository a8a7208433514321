"""The last layer trained anew by stochastic gradient descent, on the features of a frozen body.

As the body does not change, its features are computed once: a step on them is the step of the
whole network with everything but its last layer frozen and in evaluation mode.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import torch

from lab.config.schema import Config
from lab.config.seeds import derive_seed
from lab.evaluation import metrics
from lab.networks.building import fresh_classifier
from lab.networks.mlp import ScaledLinear
from lab.retraining.subsets import fifths, fitting_and_scoring, rows_to_fit
from lab.splits.splits import Split
from lab.system.errors import UserError


def by_gradient_descent(model, features, source: Split, config: Config):
    """(coefficients, intercept, facts) of a fresh last layer trained on these features."""
    rng = np.random.default_rng(derive_seed(config.seed, "dfr", "sgd", "split"))
    fitting, held_out = fitting_and_scoring(source, rng, fifths(source.counts))
    device = source.y.device
    layer = fresh_classifier(model, config, "dfr", "sgd", "classifier").to(device)
    history = train(
        layer,
        replace(source, inputs=torch.from_numpy(features).to(device)),
        lambda rng: rows_to_fit(fitting, rng, config),
        held_out,
        config,
    )
    plain = layer.effective() if isinstance(layer, ScaledLinear) else (layer.weight, layer.bias)
    coefficients, bias = (p.detach().cpu().double().numpy() for p in plain)
    intercept: float | np.ndarray = bias
    if not config.loss.class_outputs:
        coefficients, intercept = coefficients[0], float(bias[0])
    counts = [len(rows) for rows in fitting]
    smallest = min(filter(None, counts)) if config.dfr_balance else None
    facts = {
        "num_samples": smallest * sum(map(bool, counts)) if smallest else sum(counts),
        "samples_per_group": smallest,
        "best_epoch": min(history, key=lambda row: row["val_loss"])["epoch"],
        "epochs": history,
    }
    return coefficients, intercept, facts


def train(layer, features: Split, epoch_rows, held_out, config: Config) -> list[dict]:
    """Train `layer` in place by Adam on the run's loss; it keeps the weights of its best epoch.

    layer: features (N, d) → outputs (N, C); features: a split with features as inputs, on the
    layer's device; epoch_rows(rng): which of its rows an epoch goes through; held_out: rows of each
    group for the loss that decides which epoch is best and, by `dfr_sgd_patience`, which is the
    last: the mean over the groups if `dfr_balance`, else over the samples.

    Returns a row an epoch, {"epoch", "val_loss"}. Raises `UserError` when training diverges.
    """
    loss = config.loss.load().value
    counts = [len(rows) for rows in held_out]
    val = features.subset(torch.from_numpy(np.concatenate(held_out)), counts)
    nonempty = [count > 0 for count in counts]
    weights = [one / sum(nonempty) for one in nonempty] if config.dfr_balance else val.shares
    optimizer = torch.optim.Adam(layer.parameters(), lr=config.dfr_sgd_learning_rate)
    history: list[dict] = []
    best, kept = None, None
    for epoch in range(1, config.dfr_sgd_epochs + 1):
        rng = np.random.default_rng(derive_seed(config.seed, "dfr", "sgd", "epoch", epoch))
        order = torch.from_numpy(rng.permutation(epoch_rows(rng)))
        for batch in order.split(config.dfr_sgd_batch_size):
            optimizer.zero_grad()
            f = layer(features.inputs[batch]).squeeze(1)
            loss(f, features.y[batch]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses = loss(layer(val.inputs).squeeze(1), val.y)
        row: dict[str, float] = {"epoch": epoch}
        row["val_loss"] = metrics.weighted(metrics.group_means(losses, val.slices), weights)
        if not math.isfinite(row["val_loss"]):
            raise UserError(
                f"dfr_sgd_learning_rate: given {config.dfr_sgd_learning_rate:g}, with which the "
                f"loss is {row['val_loss']} after epoch {epoch} of retraining; lower it"
            )
        history.append(row)
        if best is None or row["val_loss"] < best["val_loss"]:
            best, kept = row, copy.deepcopy(layer.state_dict())
        elif epoch - best["epoch"] == config.dfr_sgd_patience:
            break
    layer.load_state_dict(kept)
    return history
