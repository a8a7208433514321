"""What is wrong with a setting, in one line: the key, what was given, what is allowed."""

import difflib
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lab.config.keys import Section
from lab.config.schema import Config, fields
from lab.config.strict_yaml import shorten, show

PROBLEMS = 50  # in one error
# Names that other codes have for our keys.
MEANINGS = {
    "lr": "learning_rate", "eta": "learning_rate", "step_size": "learning_rate",
    "method": "debias_method", "algorithm": "debias_method", "batch_size": "train_batch_size",
    "bs": "train_batch_size", "wd": "weight_decay", "l2": "weight_decay", "arch": "model_name",
    "model": "model_name", "architecture": "model_name", "network": "model_name",
    "backbone": "feature_extractor_model_name", "data": "dataset_name", "dataset": "dataset_name",
    "hidden_size": "hidden_dim", "width": "hidden_dim", "depth": "num_hidden_layers",
    "num_layers": "num_hidden_layers", "num_epochs": "epochs", "n_epochs": "epochs",
    "max_epochs": "epochs", "loss": "loss_function", "criterion": "loss_function",
    "activation": "activation_function", "random_seed": "seed", "root": "data_dir",
    "root_dir": "data_dir", "output_dir": "results_dir", "out_dir": "results_dir",
    "save_dir": "results_dir", "patience": "early_stopping_patience", "opt": "optimizer",
    "lr_scheduler": "scheduler", "amp": "mixed_precision",
}  # fmt: skip


def allowed(annotation, metadata=()) -> str:
    """What a type allows, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(args[0], args[1:])
    if origin is Literal:
        return ", ".join(map(str, args))
    if type(None) in args:
        inner = [arg for arg in args if arg is not type(None)]
        return ", ".join(allowed(arg, metadata) for arg in inner) + ", or null"
    if annotation is bool:
        return "true, false"
    if origin is list:
        return f"a list, each entry {allowed(args[0])}"
    if annotation in (int, float):
        noun = "a whole number" if annotation is int else "a number"
        bounds = {}
        for item in metadata:
            for part in getattr(item, "metadata", [item]):
                for kind in ("ge", "gt", "le", "lt"):
                    if getattr(part, kind, None) is not None:
                        bounds[kind] = getattr(part, kind)
        low = f"from {bounds['ge']:g}" if "ge" in bounds else ""
        low = f"above {bounds['gt']:g}" if "gt" in bounds else low
        high = f"to {bounds['le']:.12g}" if "le" in bounds else ""
        high = f"below {bounds['lt']:g}" if "lt" in bounds else high
        return " ".join(part for part in (noun, low, high) if part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with " + ", ".join(annotation.model_fields)
    return "text"


def field_allowed(field) -> str:
    """What a setting allows, in words."""
    extra = field.json_schema_extra or {}
    return extra.get("allowed") or allowed(field.annotation, field.metadata)


def of_error(error: ValidationError, document: dict, model: type[Config]):
    """(problems, names of the keys that are wrong, how many problems are left out).

    One problem a setting, however many entries of its list are wrong; the first `PROBLEMS`.
    """
    bad: dict[tuple, tuple] = {}
    for item in error.errors(include_url=False):
        names, field = _place(item["loc"], model)
        bad.setdefault(tuple(names), (field, item["type"]))
    lines = [
        _problem(names, field, kind, document, model)
        for names, (field, kind) in islice(bad.items(), PROBLEMS)
    ]
    return lines, {names[0] for names in bad}, max(0, len(bad) - PROBLEMS)


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _near_key(name: str, known: list[str]) -> str:
    """The hint on a key that does not exist: the key of the same meaning, or of a like spelling."""
    meant = MEANINGS.get(name.lower().replace("-", "_"))
    if meant in known:
        return f"; did you mean {meant}?"
    return _near(name, [key for key in known if _alike(name, key)])


def _alike(name: str, key: str) -> bool:
    """Whether the words of two keys are alike one by one: tsne_learning_rate means no jtt_…."""
    words, others = name.split("_"), key.split("_")
    return len(words) != len(others) or all(
        difflib.SequenceMatcher(None, word, other).ratio() >= 0.6
        for word, other in zip(words, others)
    )


def _place(location, model: type[Config]) -> tuple[list[str], Any]:
    """(names of the setting, its field) of an error's location; the field of no setting is None."""
    names: list[str] = []
    field: Any = None
    inside: Any = model
    for part in map(str, location):
        sections = _sections(inside)
        if part in sections:  # which of several sections it is
            inside = sections[part]
            continue
        if part == "[key]":
            return names, None
        if len(sections) == 1:
            (section,) = sections.values()
            field = section.model_fields.get(part)
        elif get_origin(_without_null(inside)) is dict:
            field = FieldInfo.from_annotation(get_args(_without_null(inside))[1])
        else:  # within a value
            break
        names.append(part)
        inside = field and field.annotation
    return names, field


def _without_null(annotation) -> Any:
    """The type that null or constraints are added to."""
    if get_origin(annotation) is Annotated:
        return _without_null(get_args(annotation)[0])
    inner = [arg for arg in get_args(annotation) if arg is not type(None)]
    return _without_null(inner[0]) if len(inner) < len(get_args(annotation)) else annotation


def _sections(annotation) -> dict[str, type[Section]]:
    """The sections that a type consists of, by their `kind` (a single one by its name)."""
    annotation = _without_null(annotation)
    parts = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    sections = [p for p in parts if isinstance(p, type) and issubclass(p, Section)]
    if len(sections) < 2:
        return {section.__name__: section for section in sections}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def _problem(names, field, kind: str, document: dict, model: type[Config]) -> str:
    """What is wrong with one setting of the document; kind: pydantic's name of the error."""
    full, given = ".".join(names), document
    if kind == "missing":
        return f"{full}: not given; allowed: {field_allowed(field)}"
    for name in names:
        given = given[name]
    if field is None:
        return _unknown(names, given, model)
    kinds = (field.annotation, *get_args(field.annotation))
    choices = [choice for part in kinds if get_origin(part) is Literal for choice in get_args(part)]
    hint = ""
    if isinstance(given, str):
        lower = {str(choice).lower(): str(choice) for choice in choices}
        hint = _near(given.lower(), lower)
        for small, choice in lower.items():
            hint = hint.replace(f"mean {small}?", f"mean {choice}?")
    elif kind == "string_type" and given is not None:
        hint = f" (this is no text for YAML: put it in quotes, '{show(given)}')"
    return f"{full}: given {show(given)}; allowed: {field_allowed(field)}{hint}"


def _unknown(names, given, model: type[Config]) -> str:
    """The line on a key that does not exist."""
    full = ".".join(names)
    known, sections = [name for name, _, _ in fields(model.catalogue)], []
    if len(names) == 1:
        sections = [name for name in model.model_fields if name not in known]
    hint = _near_key(full, [n for n in known + sections if n.count(".") == full.count(".")])
    if len(names) == 1 and full in known:
        section, _, name = full.partition(".")
        hint = f"; in a file it is written {section}: {{{name}: …}}"
    return f"{shorten(full) or repr('')}: given {show(given)}, but there is no such key{hint}"
