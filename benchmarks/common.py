"""What the benchmarks share: the data, interleaved timing, peak memory."""

import statistics
import threading
import time

import torch

from lab.config import loading
from lab.networks import building
from lab.splits.splits import Split, Splits

PIXELS = 2352  # 3 × 28 × 28


def problem(samples: int, **keys):
    """(network, splits, config): random inputs of unit norm at the size of ColoredMNIST."""
    config = loading.validate(
        {"num_hidden_layers": 2, "hidden_dim": 512, "learning_rate": 0.1, "use_dfr": False} | keys
    )
    shares = (0.45, 0.05, 0.05, 0.45)
    split = _split([round(samples * share) for share in shares])
    test = _split([1, 1, 1, 1])
    splits = Splits(train=split, test=test, group_names=["0", "1", "2", "3"])
    return building.build(config, (PIXELS,)), splits, config


def _split(counts) -> Split:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(counts), PIXELS, generator=generator)
    inputs /= inputs.norm(dim=1, keepdim=True)
    y = torch.tensor([-1.0, -1.0, 1.0, 1.0]).repeat_interleave(torch.tensor(counts))
    a = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(torch.tensor(counts))
    return Split(inputs, y, a, counts)


def interleaved(first, second, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, A B A B …, so that a drift of the machine's speed hits both."""
    first(), second()
    times = ([], [])
    for _ in range(pairs):
        for call, kept in zip((first, second), times):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return times


def report(name: str, ours: list[float], naive: list[float], flops: float) -> None:
    """Print medians, the median of the pairs' ratios, and our share of the product peak."""
    ratio = statistics.median(a / b for a, b in zip(ours, naive))
    seconds = statistics.median(ours)
    peak = product_peak()
    print(f"{name}: {seconds:.2f} s, naive {statistics.median(naive):.2f} s, ratio {ratio:.2f}")
    print(
        f"  {flops / seconds / 1e9:.0f} GFLOP/s in matrix products, "
        f"{100 * flops / seconds / peak:.0f} % of this machine's {peak / 1e9:.0f}"
    )


def product_peak() -> float:
    """FLOP/s of a large float32 matrix product here, the best of a few."""
    a, b = torch.randn(4096, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.numel() * b.shape[1] / (time.perf_counter() - start))
    return best


def peak_memory(call) -> int:
    """Bytes by which the resident memory rises at most while `call` runs."""
    resident = _resident()
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident() - resident)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak[0], _resident() - resident)


def _resident() -> int:
    import resource

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
