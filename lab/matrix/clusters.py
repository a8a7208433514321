"""Attributes and tasks that belong together: co-clusters of T, clusters of its directions."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lab.config.seeds import derive_seed
from lab.evaluation import shortcuts
from lab.matrix.tables import write_square
from lab.system import files

log = logging.getLogger(f"spurious.{__name__}")


def write_clusters(
    folder: Path, names: list[str], T: np.ndarray, options: dict[str, Any], seed: int
) -> None:
    """Write `cosine_rows.csv`, `cosine_directions.csv` and `clusters.json`.

    T: (K, K) δ, attribute × task; options: eps, k and gamma of the command.
    """
    k = options["k"]
    Z = shortcuts.standardised(T)
    # Rows of T with columns of T, each standardised: Pearson correlations.
    cosines = shortcuts.cosines(Z, shortcuts.standardised(T.T))
    write_square(folder / "cosine_rows.csv", names, cosines)
    vectors, sigma, d = shortcuts.directions(T, options["gamma"])
    write_square(folder / "cosine_directions.csv", names, shortcuts.cosines(vectors, vectors))
    seeds = {name: derive_seed(seed, "clusters", name) for name in ("rows", "cosine", "svd")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = shortcuts.coclusters(Z, k, seeds["rows"])
        similar = shortcuts.coclusters(cosines, k, seeds["cosine"])
        apart = shortcuts.clusters(vectors, k, seeds["svd"])
    for warning in caught:
        log.warning("Clusters: %s", warning.message)
    described = {
        "eps": options["eps"],
        "k": k,
        "gamma": options["gamma"],
        "coclusters": {
            "standardised": _pairs_of_names(rows, names, k),
            "cosine": _pairs_of_names(similar, names, k),
        },
        "directions": {
            "d": d,
            "singular_values": sigma.tolist(),
            "clusters": None if apart is None else _names(apart, names, k),
        },
    }
    text = json.dumps(described, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(folder / "clusters.json", text + "\n")


def _names(labels: np.ndarray, names: list[str], k: int) -> list[list[str]]:
    """The names in each cluster."""
    return [[name for name, label in zip(names, labels) if label == c] for c in range(k)]


def _pairs_of_names(
    labels: tuple[np.ndarray, np.ndarray] | None, names: list[str], k: int
) -> list[dict[str, list[str]]] | None:
    """The attributes and tasks in each co-cluster; None where there are no clusters."""
    if labels is None:
        return None
    attributes, tasks = (_names(side, names, k) for side in labels)
    return [{"attributes": a, "tasks": t} for a, t in zip(attributes, tasks)]
