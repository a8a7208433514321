"""A checkpoint with evaluation and all five analyses against one autograd call per quantity.

    python -m benchmarks.analysis [--samples 50000] [--pairs 5]

The twin does what a paper's repository does: for each group one gradient of the loss and one of
the mean output (a forward and a backward pass each), all of them flattened, and forward passes of
their own for the evaluation and for the output statistics.
"""

import argparse

import torch

from benchmarks.common import PIXELS, interleaved, peak_memory, problem, report
from lab import methods
from lab.analyses.measuring import Analyses
from lab.evaluation import metrics


def checkpoint(net, splits, config):
    """Ours: returns the rows of `analysis.csv` and the summary of the split."""
    analyses = Analyses(config, splits)
    measurement = analyses.measure(net, 0)
    loss = config.loss.load()
    train = splits.train
    summary = metrics.summary(measurement.outputs["train"], train, loss, train.shares)
    method = methods.build(config, splits)
    return analyses.rows(measurement, method, metrics.group_losses(summary)), summary


def naive_checkpoint(net, split, loss):
    """The twin: eight flattened gradients, their products, and two more forward passes."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for g in range(4):
        mask = split.group == g
        value = loss.value(net(split.inputs[mask]), split.y[mask]).mean()
        rows.append(torch.cat([x.flatten() for x in torch.autograd.grad(value, parameters)]))
    for g in range(4):
        mean = net(split.inputs[split.group == g]).mean()
        rows.append(torch.cat([x.flatten() for x in torch.autograd.grad(mean, parameters)]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    with torch.no_grad():
        losses = loss.value(net(split.inputs), split.y)
        evaluation = [losses[split.group == g].mean().item() for g in range(4)]
        f = net(split.inputs)
        statistics = [(f[split.group == g].mean(), f[split.group == g].std()) for g in range(4)]
    return gram, evaluation, statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    net, splits, config = problem(arguments.samples, analysis_target="train")
    loss, split = config.loss.load(), splits.train

    def ours():
        return checkpoint(net, splits, config)

    def naive():
        return naive_checkpoint(net, split, loss)

    check(ours()[0], naive()[0])
    # forward, backward to the hidden layers, and two weighted sums per weight matrix
    weights = PIXELS * 512 + 512 * 512
    flops = 2.0 * len(split) * (3 * weights + 512 * 512)
    report("checkpoint", *interleaved(ours, naive, arguments.pairs), flops)
    mine, theirs = peak_memory(ours), peak_memory(naive)
    print(
        f"  peak memory beyond the data {mine / 2**20:.0f} MiB, naive {theirs / 2**20:.0f} MiB, "
        f"ratio {mine / theirs:.2f}"
    )


def check(rows, gram) -> None:
    """Both must measure the same thing."""
    found = next(r["value"] for r in rows if r["quantity"] == "norm_sq_G(-1,+1)")
    expected = gram[5, 5].item()
    if abs(found - expected) > 1e-3 * abs(expected):
        raise AssertionError(f"{found} is not the naive {expected}")


if __name__ == "__main__":
    main()
