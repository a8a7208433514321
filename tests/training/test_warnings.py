"""Outputs that are no predictions are reported."""

import pytest
import torch
from helpers import make_splits
from material import trained

from lab.networks.mlp import MLP


def test_a_run_with_too_large_steps_ends_with_a_warning(go):
    code, lines = go("learning_rate=1000", "epochs=2", "use_dfr=false")
    assert code == 0
    (line,) = [line for line in lines if line.startswith("Warning: Epoch 2: ")]
    assert "one class" in line or "all outputs are 0" in line or "below chance" in line


def test_a_usual_run_has_no_warning(go):
    code, lines = go("epochs=3", "use_dfr=false")
    assert code == 0 and not any(line.startswith("Warning: Epoch") for line in lines)


@pytest.mark.parametrize(
    ("outputs", "reported"),
    [
        (lambda x: torch.zeros(len(x)), "Epoch 1: all outputs are 0"),
        (lambda x: torch.ones(len(x)), "Epoch 1: the network predicts one class"),
        (lambda x: x[:, 0], None),
    ],
)
def test_what_is_reported_of_the_outputs(
    settings, fake_run, monkeypatch, caplog, outputs, reported
):
    parameter = lambda self: 0 * sum(p.sum() for p in self.parameters())
    monkeypatch.setattr(MLP, "forward", lambda self, x: outputs(x).to(x) + parameter(self))
    with caplog.at_level("INFO"):
        trained(fake_run, settings, make_splits(), epochs=1, analyses="none")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert (reported is None) == (not warnings)
    if reported:
        assert warnings[0].startswith(reported)
        untrained = any("Epoch 0: all outputs are 0" in r.message for r in caplog.records)
        assert untrained == ("0" in reported.removeprefix("Epoch 1"))
