"""The memory that there is, and the networks that are refused because of it."""

import pytest

from lab.config.loading import validate
from lab.networks import building
from lab.system import memory
from lab.system.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """machine(gigabytes) makes the machine as large."""
    return lambda gigabytes: monkeypatch.setattr(memory, "available", lambda: gigabytes * 1e9)


def test_a_network_larger_than_the_memory(machine):
    machine(16)
    with pytest.raises(ConfigError) as caught:
        validate({"hidden_dim": 65_536, "num_hidden_layers": 100})
    (line,) = caught.value.problems
    assert line == (
        "hidden_dim, num_hidden_layers: given 65536, 100, which is at least 3,401.6 GB for "
        "parameters, gradients and optimizer, but 16.0 GB are available; allowed: less"
    )
    validate({"hidden_dim": 65_536, "num_hidden_layers": 100, "device": "cuda"})
    machine(1e6)
    validate({"hidden_dim": 65_536, "num_hidden_layers": 100})


@pytest.mark.parametrize("keys", [{"optimizer": "Adam"}, {"momentum": 0.5}, {}])
def test_the_first_layer_counts_when_the_inputs_are_known(machine, keys):
    config = validate({"hidden_dim": 1000, "device": "cpu", **keys})
    parameters = 1000 * 50_000 + 1000
    copies = 4 if "optimizer" in keys else 3 if "momentum" in keys else 2
    machine((4 * parameters * copies - 1) / 1e9)
    with pytest.raises(ConfigError, match="hidden_dim, num_hidden_layers: given 1000, 1, which"):
        building.build(config, (50_000,))
    machine((4 * parameters * copies + 1) / 1e9)
    building.build(config, (50_000,))


def test_a_machine_of_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    validate({"hidden_dim": 65_536, "num_hidden_layers": 100})


@pytest.mark.parametrize("table", ["0::/job/step\n", "4:cpu,memory:/job/step\n1:name=x:/other\n"])
def test_limits_of_control_groups_count(tmp_path, monkeypatch, table):
    (tmp_path / "table").write_text(table)
    folder, name = {
        "0": (tmp_path, "memory.max"),
        "4": (tmp_path / "memory", "memory.limit_in_bytes"),
    }[table[0]]
    (folder / "job" / "step").mkdir(parents=True)
    (folder / "job" / "step" / name).write_text("max\n")
    whole = memory.available()
    monkeypatch.setattr(
        memory, "_control_groups", lambda real=memory._control_groups: real(
            tmp_path, tmp_path / "table"
        )
    )  # fmt: skip
    physical = memory.available()
    assert physical >= whole > 1e8
    (folder / "job" / name).write_text("123456789\n")
    assert memory.available() == 123_456_789
    (folder / "job" / "step" / name).write_text("1000000\n")
    assert memory.available() == 1_000_000
