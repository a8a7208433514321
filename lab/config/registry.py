"""Records: what the laboratory knows of each data set, network, method, analysis, loss, figure and
backbone, without importing it.

A record has a name, one line of meaning, the keys that only it uses, positive facts, and where its
code is. Allowed values, lines on keys without effect, checks across keys, tables of the docs and
the choice of the code derive from the records. The built-in ones are the list `RECORDS` in
`lab.config.records`; a plugin file has a list of the same name.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from lab.config.keys import Epochs, Key, PairsConfig, When, own
from lab.system.errors import ConfigError, UserError

NAME = re.compile("[A-Za-z][A-Za-z0-9_]{0,49}")  # also a part of file names


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records have.

    code: "module:name" of the code, imported when it is used, or the object itself;
    keys: {name: `own(…)`}, the settings of its own; uses: names of common keys that only some
    records use, or pairs (name, `When`); facts of each kind: see the subclasses.
    """

    selected_by: ClassVar[str] = ""  # the key whose value is the name
    what: ClassVar[str] = ""  # in messages

    name: str = field(kw_only=False)
    meaning: str = field(kw_only=False)
    code: Any = None
    keys: Mapping[str, Key] = field(default_factory=dict)
    uses: tuple[str | tuple[str, When], ...] = ()
    plugin: str | None = None  # the file that it comes from
    repeat: str = ""  # the override that imports all plugins of a stored run

    def __post_init__(self):
        for name in (self.name, *self.keys):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r}: a name is a letter, then up to 49 letters, digits, _")

    def load(self) -> Any:
        """The code. Raises `UserError` where its plugin has not been imported."""
        if self.code is None and self.plugin:
            raise UserError(
                f"{self.selected_by}: {self.name} comes from the plugin {self.plugin}, which is "
                f"imported only if you repeat it: {self.repeat or f'plugins=[{self.plugin}]'}"
            )
        return imported(self.code)

    def own_keys(self) -> dict[str, Key]:
        """The keys that this record adds to the schema."""
        return dict(self.keys)

    def used(self) -> dict[str, When | None]:
        """{common key: condition} of `uses`."""
        return dict((item, None) if isinstance(item, str) else item for item in self.uses)

    def facts(self) -> dict[str, Any]:
        """Plain data that describe the record without its code, for a run's folder."""
        plain = (str, bool, int, float, tuple, list, dict, type(None))
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        left_out = ("code", "keys", "uses", "plugin", "repeat")
        shown = {k: v for k, v in facts.items() if isinstance(v, plain) and k not in left_out}
        keys = {
            name: {"default": item.field.default, "meaning": item.field.description}
            for name, item in self.own_keys().items()
            if isinstance(item.field.default, plain)
        }
        return {"kind": type(self).__name__, **shown, "keys": keys}


def imported(code: Any) -> Any:
    """The object that "module:name" names; any other object is itself."""
    if not isinstance(code, str):
        return code
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)


def a_few(c) -> tuple[int | None, int | None, int | None]:
    """Samples for training, validation and test of a data set that does not say it."""
    return 3000, 0, 1000


def everything(c) -> tuple[int | None, int | None, int | None]:
    """All samples of the official splits."""
    return None, None, None


def small_rate(c) -> float:
    """The learning rate of SGD of a network that does not say it."""
    return 0.01


def no_changes(c) -> dict[str, Any]:
    """A data set whose facts are the same at all settings."""
    return {}


def no_problems(c) -> Iterable[str]:
    """A record without checks of its own."""
    return ()


@dataclass(frozen=True, kw_only=True)
class DataSet(Record):
    """code: `load(config)` → `lab.splits.splits.Splits`.

    inputs: "pictures" or "vectors"; class_indices: labels are class indices (else -1 and +1), so
    that the loss needs an output a class; four_groups: the groups are two labels × two values of
    one attribute; tasks: how many questions at once; official_validation: it has a validation split
    of its own; target_size: the key that sizes its unbiased target set, "" = it has none;
    drawn_to_moments: its groups follow the configured correlation and marginals; validation_size:
    the key that sizes its validation split; side: the key of its pictures' side, of which a feature
    extractor needs 224; standardised: without `normalize_inputs` the channels come standardised;
    any_task: every attribute can be the label of a task (`groupings`); retrains_on_train: DFR uses
    the training samples, so that nothing is set aside; variant: which
    settings make it so, for messages; experiment: what a results folder is called by default.

    sizes: c → what `auto` stands for in num_train_samples, num_val_samples and num_test_samples,
    None for all; at: c → the facts that differ at the settings c; resolve: config → what null
    stands for in its own keys; checks: c → one line a problem.
    """

    selected_by = "dataset_name"
    what = "data set"

    experiment: str = ""
    inputs: str = "pictures"
    class_indices: bool = False
    four_groups: bool = True
    tasks: int = 1
    official_validation: bool = False
    target_size: str = ""
    drawn_to_moments: bool = False
    validation_size: str = "num_val_samples"
    side: str = ""
    standardised: bool = False
    any_task: bool = False
    retrains_on_train: bool = False
    variant: str = ""
    sizes: Callable[[Any], tuple[int | None, int | None, int | None]] = a_few
    at: Callable[[Any], dict[str, Any]] = no_changes
    resolve: Callable[[Any], dict[str, Any]] = no_changes
    checks: Callable[[Any], Iterable[str]] = no_problems

    def __post_init__(self):
        super().__post_init__()
        if self.inputs not in ("pictures", "vectors"):
            raise ValueError(f"inputs: given {self.inputs!r}; allowed: pictures, vectors")

    def with_settings(self, c) -> "DataSet":
        """The record with the facts at these settings."""
        return replace(self, **self.at(c))

    @property
    def described(self) -> str:
        """The name and the settings that make it so, for messages."""
        return f"{self.name} with {self.variant}" if self.variant else self.name


@dataclass(frozen=True, kw_only=True)
class Network(Record):
    """code: body(config, input_shape) → (module: inputs (N, …) → features (N, d), d); the linear
    layer behind it is added. whole: code is the whole network, `lab.networks.mlp.MLP`'s interface.

    pictures: it takes pictures, not features; batch_norm: it needs mini-batches with the groups
    mixed; full_batches: what `group_batches: null` stands for; bytes_per_pixel: memory of a
    forward and a backward pass, measured; gradcam_layer: place of the last convolutions in the
    body, such as "1.layer4"; depth: the key with the number of its numbered layers; sgd_rate: c →
    what `learning_rate: null` stands for with SGD.
    """

    selected_by = "model_name"
    what = "network"

    whole: bool = False
    pictures: bool = False
    batch_norm: bool = False
    full_batches: bool = False
    bytes_per_pixel: int = 2000
    gradcam_layer: str = ""
    depth: str = ""
    sgd_rate: Callable[[Any], float] = small_rate
    checks: Callable[[Any], Iterable[str]] = no_problems


@dataclass(frozen=True, kw_only=True)
class Method(Record):
    """code: a subclass of `lab.methods.erm.ERM`.

    weights_groups: it may take the full batch, group by group (`group_batches`); draws_samples: it
    weights samples by drawing them, so that there is no full batch; several_tasks: it serves
    several tasks at once; needs_target: it trains on a target set; optimizers: those it works
    with; mini_batches: it has no full batch at all; stage: "module:name" of
    `stage(splits, config, run)` → splits, what precedes training.
    """

    selected_by = "debias_method"
    what = "method"

    weights_groups: bool = False
    draws_samples: bool = False
    several_tasks: bool = False
    needs_target: bool = False
    optimizers: tuple[str, ...] = ("SGD", "Adam")
    mini_batches: bool = False
    stage: Any = None
    checks: Callable[[Any], Iterable[str]] = no_problems


@dataclass(frozen=True, kw_only=True)
class Loss(Record):
    """code: a `lab.evaluation.losses.Loss`. class_outputs: it takes one output a class."""

    selected_by = "loss_function"
    what = "loss"

    class_outputs: bool = False


@dataclass(frozen=True, kw_only=True)
class Analysis(Record):
    """code: rows(view: `lab.analyses.measuring.View`) → pairs (pair of groups or "", {quantity:
    value}).

    standard: made under `analyses: standard`; needs: of "gradient", "jacobian" (rows of the Gram
    matrix) and "outputs"; flows: it also has rows of the test gap under the training flow; pairs:
    it has pairs of groups, `<name>.group_pairs`; own_samples: on `jacobian_num_samples`, not on
    `gradient_gram_num_samples`; any_problem: it also applies without a scalar output and four
    groups.
    """

    selected_by = "analyses"
    what = "analysis"

    standard: bool = True
    needs: tuple[str, ...] = ()
    flows: bool = False
    pairs: bool = False
    own_samples: bool = False
    any_problem: bool = False

    def __post_init__(self):
        super().__post_init__()
        if wrong := set(self.needs) - {"gradient", "jacobian", "outputs"}:
            raise ValueError(
                f"needs: given {', '.join(sorted(wrong))}; allowed: gradient, jacobian, outputs"
            )

    @property
    def switch(self) -> str:
        return f"analyze_{self.name}"

    @property
    def epochs(self) -> str:
        return f"{self.name}_analysis_epochs"

    def own_keys(self) -> dict[str, Key]:
        keys = {
            self.switch: own(bool | None, None, f"{self.meaning}; null = as `analyses` says"),
            self.epochs: own(Epochs, None, "at these epochs", "Epochs"),
        }
        if self.pairs:
            keys[self.name] = own(PairsConfig, PairsConfig(), "")
        return keys | dict(self.keys)

    def applies(self, c) -> str:
        """Why the analysis does not apply to the settings c; "" if it does."""
        if self.any_problem:
            return ""
        if c.loss.class_outputs:
            return f"loss_function {c.loss_function}"
        if c.data_set.tasks > 1:
            return "several tasks"
        return "" if c.data_set.four_groups else "more than one shortcut attribute"


@dataclass(frozen=True, kw_only=True)
class Figure(Record):
    """code: draw(run: `lab.folders.reading.RunTables`) → figure, list of figures, or None.

    table: "history" or "analysis:<name>", without whose rows it is not drawn; "" = it looks for its
    own file; by_task: drawn for every task where there are several.
    """

    what = "figure"

    table: str = ""
    by_task: bool = False


@dataclass(frozen=True, kw_only=True)
class Backbone(Record):
    """A frozen network of `feature_extractor_model_name`.

    blocks: of a ViT; maps: {layer: side of its square maps} of a ResNet.
    """

    selected_by = "feature_extractor_model_name"
    what = "backbone"

    blocks: int | None = None
    maps: Mapping[str, int] | None = None


KINDS = (DataSet, Network, Method, Loss, Analysis, Figure, Backbone)
R = TypeVar("R", bound=Record)


class Catalogue:
    """All records of a session, the built-in ones and those of plugins."""

    def __init__(self, records: Iterable[Record]):
        self.records = tuple(records)
        self._of: dict[type[Record], dict[str, Any]] = {kind: {} for kind in KINDS}
        for record in self.records:
            known = self._of[type(record)]
            if record.name in known:
                raise ConfigError(
                    f"plugins: {record.plugin}: the {record.what} {record.name} exists already; "
                    "take another name"
                )
            known[record.name] = record

    def of(self, kind: type[R]) -> dict[str, R]:
        """{name: record} of one kind, in the order of the records."""
        return self._of[kind]

    @cached_property
    def users(self) -> dict[str, tuple[type[Record], dict[str, When | None]]]:
        """{key: (kind, {record's name: condition})} of the keys that only some records use."""
        users: dict[str, tuple[type[Record], dict[str, When | None]]] = {}
        for record in self.records:
            own_keys = {name: item.when for name, item in record.own_keys().items()}
            for name, when in (own_keys | record.used()).items():
                users.setdefault(name, (type(record), {}))[1][record.name] = when
        return users

    def with_plugins(self, records: Iterable[Record]) -> "Catalogue":
        """A catalogue that has these records, too."""
        records = tuple(records)
        return Catalogue((*self.records, *records)) if records else self


class Chosen:
    """The records that settings choose; for a class with the settings as attributes."""

    catalogue: Any

    @property
    def data_set(self) -> DataSet:
        """The record of the data set, with its facts at these settings."""
        return self._record(DataSet).with_settings(self)

    @property
    def network(self) -> Network:
        """The record of the network."""
        return self._record(Network)

    @property
    def method(self) -> Method:
        """The record of the training method."""
        return self._record(Method)

    @property
    def loss(self) -> Loss:
        """The record of the loss."""
        return self._record(Loss)

    def _record(self, kind: type[R]) -> R:
        return self.catalogue.of(kind)[getattr(self, kind.selected_by)]
