"""How a setting is declared: its type, default, meaning, and what is allowed.

The types here are those that several keys share. Bounds belong to the type; what an error or the
table of keys says where the type alone does not say it well is in `ALLOWED`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.fields import FieldInfo

Samples = Annotated[int, Field(ge=0, le=10_000_000)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=-1, le=1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
# Where auto or null follows from other settings (`lab.config.defaults`): a configuration holds what
# it stands for, so that the code never meets it.
if TYPE_CHECKING:
    CountOrAuto = int | None
    SamplesOrAuto = int | None
    ChosenRate = float
    ChosenRatio = float
    ChosenName = str
else:
    CountOrAuto, SamplesOrAuto = (kind | Literal["auto"] | None for kind in (Count, Samples))
    ChosenRate, ChosenRatio, ChosenName = Rate | None, Ratio | None, str | None
Decay = Annotated[float, Field(ge=0, le=1e3)]
Epoch = Annotated[int, Field(ge=0, le=1_000_000)]
Epochs = Annotated[list[Epoch], Field(max_length=1000)] | None
Sign = Annotated[int, Field(ge=-1, le=1)]  # 0 is refused by the checks across keys
Cell = Annotated[list[Sign], Field(min_length=2, max_length=2)]
GroupPair = Annotated[list[Cell], Field(min_length=2, max_length=2)]
GroupPairs = Annotated[list[GroupPair], Field(max_length=12)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,49}$")]
Words = Annotated[list[Word], Field(max_length=100)]
LayerName = Annotated[str, StringConstraints(pattern=r"^(last_hidden|layer_[0-9]{1,3})$")]
# No control characters and line ends: no path can hold them, and terminals obey them.
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")
]

PAIRS = "a list of pairs of different groups, each [[y, a], [y, a]] with -1 or 1"
ALLOWED = {
    "Name or null": "up to 100 letters, digits and _ . + = -, the first no . + = -, or null",
    "Text": "text, up to 1000 characters, no control characters",
    "Text or null": "text, up to 1000 characters, no control characters, or null",
    "Weights": "null (the libraries' own pretrained weights), a file (.safetensors, .pth), random",
    "PretrainedWeights": "null (the libraries' own), a file (.safetensors, .pth)",
    "Epochs": "null (every epoch) or a list of up to 1000 epochs, such as [0, 1, 5]; [] = never",
    "GroupPairs": PAIRS,
    "LayerName": "last_hidden, layer_0, layer_1, …",
}


def key(default: Any, meaning: str, allowed: str | None = None) -> Any:
    """A setting of a section: its default, what it means, and what is allowed if the type does
    not say it (a text, or its name in `ALLOWED`)."""
    extra: Any = {"allowed": ALLOWED.get(allowed, allowed)} if allowed else None
    return Field(default, description=meaning, json_schema_extra=extra)


class When(NamedTuple):
    """A condition under which a key has an effect.

    holds(c): whether it does, with the settings as attributes of c; otherwise: why not, as the log
    shows it behind the key, such as "only with celeba_splits: drawn".
    """

    otherwise: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """A setting that a record brings along: the type, the rest as in a section, and `When`."""

    type: Any
    field: FieldInfo
    when: When | None = None


def own(type_: Any, default: Any, meaning: str, allowed: str | None = None, *,
        when: When | None = None, **bounds) -> Key:  # fmt: skip
    """A key of a record's own.

    type_: a Python type as in annotations (`int`, `float | None`, `Literal["a", "b"]`), strict:
    no text for numbers, no true for 1; bounds: ge, gt, le, lt for numbers; when: a condition
    besides the record being the configured one.
    """
    if wrong := set(bounds) - {"ge", "gt", "le", "lt"}:
        raise TypeError(f"own: given {', '.join(sorted(wrong))}; allowed as bounds: ge, gt, le, lt")
    if bounds:
        type_ = Annotated[type_, Field(**bounds)]
    return Key(type_, key(default, meaning, allowed), when)


class Section(BaseModel):
    """Strict: no text for numbers, no booleans for numbers, no unknown keys, no infinities."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),  # pydantic's own is model_, as in model_name
    )


MINORITY_MAJORITY = [[[-1, 1], [-1, -1]], [[1, -1], [1, 1]]]


class PairsConfig(Section):
    """Pairs of groups of an analysis."""

    group_pairs: GroupPairs = key(
        MINORITY_MAJORITY, "pairs [minority, majority] to analyse", "GroupPairs"
    )


class Square(Section):
    """A white square in a corner of the picture."""

    kind: Literal["square"]
    position: Literal["left_top", "left_bottom", "right_top", "right_bottom"] = Field(
        description="the corner"
    )
    size: Annotated[int, Field(ge=1, le=28)] = Field(description="side in pixels")


class Lines(Section):
    """White lines over the whole picture, behind the digit."""

    kind: Literal["lines"]
    orientation: Literal["horizontal", "vertical"] = Field(description="of the lines")
    distance: Annotated[int, Field(ge=1, le=28)] = Field(
        description="from one to the next in pixels"
    )


class NoShortcut(Section):
    """No shortcut."""

    kind: Literal["none"]


Shortcut = Annotated[Square | Lines | NoShortcut, Field(discriminator="kind")]
SHORTCUT = (
    "{kind: square, position: …, size: …}, {kind: lines, orientation: …, distance: …}, {kind: none}"
)
SPURIOUS_FEATURES = (
    "null, or a mapping {label: {main: shortcut, minority: shortcut, probability: …}} with "
    "{kind: square, position: left_top, left_bottom, right_top or right_bottom, size: 1 to 28}, "
    "{kind: lines, orientation: horizontal or vertical, distance: 1 to 28} or {kind: none}"
)


class SpuriousFeature(Section):
    """What is drawn on the digits of a label."""

    main: Shortcut = Field(
        description="shortcut of the share `probability`", json_schema_extra={"allowed": SHORTCUT}
    )
    minority: Shortcut | None = key(None, "shortcut of the others; null = none", SHORTCUT)
    probability: Share = key(1.0, "share with the main shortcut")


SpuriousFeatures = Annotated[
    dict[Literal["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], SpuriousFeature],
    Field(max_length=10),
]
