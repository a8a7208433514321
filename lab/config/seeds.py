"""Seeds: everything random derives from the one `seed` of a configuration."""

import hashlib


def derive_seed(seed: int, *purpose) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(seed, "batches", epoch)`.

    Different purposes get independent generators, so that drawing more numbers for one leaves
    the others as they were.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
