"""The records: each names code that exists, keys that exist, and reaches the schema."""

import pytest

from lab.config import records
from lab.config.loading import validate
from lab.config.registry import (
    Analysis,
    Backbone,
    Catalogue,
    DataSet,
    Figure,
    Loss,
    Method,
    Network,
    imported,
)
from lab.config.schema import layout, schema
from lab.system.errors import ConfigError

BUILT_IN = records.BUILT_IN


@pytest.mark.parametrize(
    "record", [r for r in records.RECORDS if not isinstance(r, Backbone)], ids=lambda r: r.name
)
def test_the_code_of_every_record_exists(record):
    assert callable(record.load()) or isinstance(record, Loss)
    if isinstance(record, Method):
        from lab.methods.erm import ERM

        assert issubclass(record.load(), ERM)
        assert record.stage is None or callable(imported(record.stage))


def test_every_key_is_in_the_layout_once():
    names = layout(BUILT_IN)
    assert len(set(names)) == len(names)
    assert set(names) == set(schema(BUILT_IN).model_fields)


def test_activations_are_those_of_the_networks():
    from lab.networks.mlp import ACTIVATIONS

    assert set(records.ACTIVATIONS) == set(ACTIVATIONS)


def test_names_of_one_kind_are_taken_once_and_allowed_words():
    with pytest.raises(ConfigError, match="the method JTT exists already"):
        BUILT_IN.with_plugins([Method("JTT", "again", plugin="x.py")])
    with pytest.raises(ValueError, match="a name is"):
        Method("no/name", "a path")
    assert BUILT_IN.with_plugins([Figure("JTT", "another kind")]).of(Figure)["JTT"]


def test_a_key_that_is_taken_is_refused():
    from lab.config.keys import own

    for name in ("epochs", "dro_eta_q"):
        taken = Method("Mine", "with a key that exists", keys={name: own(int, 1, "…")})
        with pytest.raises(ConfigError, match=f"the key {name} of Mine exists already"):
            schema(BUILT_IN.with_plugins([taken]))
    wrong = Method("Mine", "uses a key that does not exist", uses=("nonsense",))
    with pytest.raises(ConfigError, match="uses nonsense, which is no common key"):
        schema(BUILT_IN.with_plugins([wrong]))


@pytest.mark.parametrize("kind", [DataSet, Network, Method, Loss])
def test_allowed_names_derive_from_the_records(kind):
    field = schema(BUILT_IN).model_fields[kind.selected_by]
    names = field.annotation.__args__
    if kind is Loss:  # or null
        names = names[0].__args__
    assert list(names) == list(BUILT_IN.of(kind))
    assert getattr(validate({}), kind.selected_by) in BUILT_IN.of(kind)


def test_every_analysis_has_a_figure_of_its_name():
    figures = BUILT_IN.of(Figure)
    for name in BUILT_IN.of(Analysis):
        assert figures[name].table == f"analysis:{name}"


def test_a_catalogue_has_the_records_in_their_order():
    assert [r.name for r in Catalogue(records.METHODS).of(Method).values()] == [
        r.name for r in records.METHODS
    ]
