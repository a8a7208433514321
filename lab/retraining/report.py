"""What DFR reports: results as JSON, and tables for reading. Without torch."""

import json
import math

MOST_GROUPS = 8  # of more groups the text lists none; the JSON file has all
QUANTITIES = {
    "avg_acc": "average accuracy",
    "adjusted_acc": "adjusted accuracy",
    "worst_acc": "worst-group accuracy",
}


def strict_json(results: dict) -> str:
    """The results as JSON, NaN and infinities as null."""
    return json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n"


def _without_nan(value):
    """The same data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(results: dict, group_names: list[str]) -> str:
    """A table for reading: every metric before and after, side by side."""
    names = dict(QUANTITIES)
    if len(group_names) <= MOST_GROUPS:
        names |= {f"group_{g}_acc": f"  {name}" for g, name in enumerate(group_names)}
    names |= {"minority_acc": "minority accuracy", "majority_acc": "majority accuracy"}
    names |= {"avg_loss": "average loss", "worst_loss": "worst-group loss"}
    fitted = f"{results['num_samples']} samples"
    if results["balanced"]:
        fitted = f"{results['samples_per_group']} of each group"
    if results["solver"] == "sgd":
        how = f"gradient descent on {fitted} an epoch, {results['best_epoch']} epochs"
    else:
        fits = f"{results['num_retrains']} fits" if results["balanced"] else "one fit"
        c = results["c"]
        penalty = "no penalty" if c is None else f"{results['reg']} penalty, C = {c:g}"
        how = f"{penalty}, {fits} on {fitted}"
    lines = [
        f"DFR on {results['target_layer']}: {how}, {results['nonzero_coefficients']} of "
        f"{results['num_coefficients']} coefficients in use"
    ]
    for split in results["after"]:
        name = f"{split} (fitted on)" if split == results["fitted_on"] else split
        lines += ["", f"{name:<24}{'before':>10}{'after':>10}"]
        for quantity, name in names.items():
            before, after = (results[when][split][quantity] for when in ("before", "after"))
            lines.append(f"{name:<24}{before:>10.4f}{after:>10.4f}")
    return "\n".join(lines) + "\n"


def comparison(results: dict[str, dict]) -> list[dict]:
    """Average and worst-group accuracy of every split before DFR and after it with each solver.

    results: of `retrain`, by solver. Rows {"split", "quantity", "before", <solver>, …}.
    """
    before = next(iter(results.values()))["before"]
    return [
        {"split": split, "quantity": quantity, "before": before[split][quantity]}
        | {solver: found["after"][split][quantity] for solver, found in results.items()}
        for split in before
        for quantity in ("avg_acc", "worst_acc")
    ]


def comparison_text(rows: list[dict]) -> str:
    """The same table for reading."""
    lines = []
    for row in rows:
        split, quantity, *values = row.values()
        if quantity == "avg_acc":
            lines += ["", f"{split:<24}" + "".join(f"{name:>10}" for name in list(row)[2:])]
        lines.append(f"{QUANTITIES[quantity]:<24}" + "".join(f"{v:>10.4f}" for v in values))
    return "\n".join(lines[1:]) + "\n"
