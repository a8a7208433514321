"""An ERM epoch against a `DataLoader` over a `TensorDataset`.

python -m benchmarks.training [--samples 50000] [--pairs 5]
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import PIXELS, interleaved, problem, report
from lab.training import schedule, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    net, splits, config = problem(arguments.samples)
    loss, split = config.loss.load(), splits.train
    optimizer = schedule.build_optimizer(net, config)
    loader = DataLoader(
        TensorDataset(split.inputs, split.y), batch_size=arguments.batch_size, shuffle=True
    )

    def ours():
        steps.minibatch_epoch(net, optimizer, split, loss, arguments.batch_size, seed=0)

    def naive():
        net.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss.value(net(x), y).mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    # forward, and backward to weights and to the inputs of the upper layer
    flops = 2.0 * len(split) * (2 * PIXELS * 512 + 3 * 512 * 512)
    report("ERM epoch", *interleaved(ours, naive, arguments.pairs), flops)


if __name__ == "__main__":
    main()
