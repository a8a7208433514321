"""Mutated configurations: read, or refused with clear lines, soon and in little memory.

The slow pass, by hand:
`SPURIOUS_FUZZ_EXAMPLES=20000 python -m pytest tests/config/test_config_fuzz.py`.
Without it a few hundred examples are tried, the same ones every time.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import hypothesis
import pytest
from helpers import limited
from hypothesis import strategies as st
from pydantic import ValidationError

import main
import plotting
from lab.config import loading, messages, schema, strict_yaml
from lab.config.loading import load_config, validate
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.config.schema import Config
from lab.system.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("SPURIOUS_FUZZ_EXAMPLES", 100))
RUNS = max(20, EXAMPLES // 100)
FIELDS = {name: field for name, field, _ in schema.fields()}
SHIPPED = [path.read_text() for path in (ROOT / "config.yaml", *sorted(ROOT.glob("configs/*")))]

# Values as they stand in a file, right for some keys and wrong for most.
VALUES = [
    "", "~", "null", "true", "no", "0", "-0", "+1", "1", "-1", "-0.0", "0.5", "1.", ".5", "1e3",
    "1e-400", "1e400", "-1e400", ".inf", "-.Inf", ".nan", "nan", "inf", "9" * 30, "9" * 5000,
    "1_000", "_1", "0o17", "017", "0x1F", "0b1", "1:30", "1:30.5", "2001-01-01",
    "2001-12-14t21:59:43.10-05:00", "١٢", "½", "1,5", "1 000", "1e", "--1", "'1'", '"1"', "'", '"',
    "[]", "{}", "[[]]", "[1, 2", "{a: 1", "]", "[1, 2.5, x]", "[0, 1, 5]", "{a: {b: {c: d}}}",
    "[[[-1, 1], [1, 1]]]", "[[[0, 1], [1, 1]]]", "[[1, 1], [1, 1]]", "[" * 40 + "]" * 40, "[" * 400,
    "{a: " * 400, "[" * 400 + "]" * 400, "&x 1", "*x", "&x [*x]", "<<: {a: 1}", "!!int 5",
    "!!int 0xFFFF", "!!float 1", "!!str 5", "!!binary aGk=", "!!timestamp 2001-01-01", "!!set {a}",
    "!!omap [a: 1]", "!!python/object/apply:os.system [id]", "!!python/name:os.system",
    "!!python/object:config.Config {}", "!x 1", "! 1", "!<tag:yaml.org,2002:int> 5", "%TAG", "@",
    "`", "|", ">", "|\n  text\n  more", "? a", ": a", "- a", "# only a comment", "a: b", "a # b",
    "{1: 2}", r'"\0"', r'"\x1b[31m"', r'"\ud800"', r'"\U0010FFFF"', r'"\UFFFFFFFF"', r'"\x"',
    r'"a\nb"', r'"\e"', "'a\tb'", "ünïcödé", "日本", "😀", "\u202eabc", "\ufeff", "\u2028",
    "\x85", "a\u200db", "\x00", "\x07", "\x7f", "\udcff", "x" * 101, "x" * 1001, "../..",
    "/dev/zero", "~nobody/x", "a/b", "-x", "layer_0", "layer_1", "layer_999", "layer_1000", "None",
    "WaterBirds", "timm:resnet18", "ResNet50",
]  # fmt: skip
PIECES = [
    "\t", "\n", "\r", "\r\n", "\x00", "\x1b", "\ufeff", "\u2028", "---\n", "...\n", "%YAML 9.9\n",
    ": ", "- ", "? ", "[", "{", "&a ", "*a", "<<: ", "!!python/object:os.system ", "'", '"', "#",
    "|\n", "\n  ", "\nepochs: 3", "\n? [a]\n: b", "\n3: 4", "\n~: 1", "\n'': 1",
    "\nwandb.mode: online",
]  # fmt: skip
RAW = [b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\x80", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\xa1"]


def outcome(path, overrides=()):
    """The configuration, which reads back as it is, or the lines of its error, all readable."""
    with limited():
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            lines = error.problems
            assert 1 <= len(lines) <= messages.PROBLEMS + 1
            for line in lines:
                assert line.strip() and line.isprintable() and len(line) < 1000, line
            return lines
    again = validate(strict_yaml.parse(strict_yaml.dump(config.resolved()), "again"))
    assert again.resolved() == config.resolved()
    return config


def metadata(field_or_type):
    """Constraints of a field, or of what a type annotates."""
    found = list(field_or_type.metadata)
    annotation = getattr(field_or_type, "annotation", None)
    for inner in (annotation, *get_args(annotation)):
        found += getattr(inner, "__metadata__", ())
    return [part for item in found for part in getattr(item, "metadata", [item])]


def bounds(constraints):
    """{"ge": …, "gt": …, "le": …, "lt": …}, without those that are missing."""
    return {
        kind: getattr(part, kind)
        for part in constraints
        for kind in ("ge", "gt", "le", "lt")
        if getattr(part, kind, None) is not None
    }


def plain(annotation):
    """The type without None, annotations."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Annotated or type(None) in get_args(annotation):
        return plain(inner[0])
    return annotation


SHORTCUTS = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("square"),
            "position": st.sampled_from(["left_top", "left_bottom", "right_top", "right_bottom"]),
            "size": st.integers(1, 28),
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("lines"),
            "orientation": st.sampled_from(["horizontal", "vertical"]),
            "distance": st.integers(1, 28),
        }
    ),
    st.just({"kind": "none"}),
)
FEATURES = st.fixed_dictionaries(
    {"main": SHORTCUTS},
    optional={"minority": st.none() | SHORTCUTS, "probability": st.floats(0, 1)},
)


def right(name):
    """Values that a key takes, most of them together with the defaults of the others."""
    field = FIELDS[name]
    kind = plain(field.annotation)
    limits = bounds(metadata(field))
    low = limits.get("ge", limits.get("gt"))
    high = limits.get("le", limits.get("lt"))
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(low, high) | st.sampled_from([low, high])
    if kind is float:
        open_ends = {"exclude_min": "gt" in limits, "exclude_max": "lt" in limits}
        return st.floats(low, high, **open_ends)
    if name == "dfr_c_options":
        return st.lists(st.floats(1e-3, 10), min_size=1, max_size=4)
    if name.endswith("analysis_epochs"):
        return st.none() | st.lists(st.integers(0, 5), max_size=4)
    if name.endswith("group_pairs"):
        cell = st.lists(st.sampled_from([-1, 1]), min_size=2, max_size=2)
        return st.lists(st.lists(cell, min_size=2, max_size=2), max_size=4)
    if name == "labels":
        return st.lists(st.integers(0, 9), min_size=2, max_size=10, unique=True)
    if name.endswith("spurious_features"):
        return st.none() | st.dictionaries(st.sampled_from("0123456789"), FEATURES, max_size=10)
    return st.sampled_from(
        ["a", "1e5", "1.5e5", "null", "12:30", "0o17", "2001-01-01", "=", "last_hidden"]
    )


def in_yaml(value):
    """A value as it may stand in a file."""
    return (
        strict_yaml.dump([value]).removeprefix("- ")
        if isinstance(value, float)
        else json.dumps(value)
    )


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
wrong_text = st.sampled_from(VALUES) | nested.map(lambda v: json.dumps(v, ensure_ascii=False))
names = st.sampled_from(sorted(FIELDS))
any_name = names | st.sampled_from([
    "", ".", "wandb", "wandb.", ".wandb", "a.b.c", "gap_dynamics_factors", "Epochs", "epoch", "🙂",
    "a" * 300, "a." * 2000 + "a", "epochs.x", "wandb.mode.x", "\x1b[2J", "a\nb", "__class__",
    "\udcff",
])  # fmt: skip
right_settings = names.flatmap(lambda name: st.tuples(st.just(name), right(name).map(in_yaml)))
wrong_settings = st.tuples(any_name, wrong_text)


def in_file(settings):
    """Settings as the text of a file."""
    lines = []
    for name, value in settings:
        section, dot, key = name.partition(".")
        lines.append(f"{section}: {{{key}: {value}}}" if dot else f"{name}: {value}")
    return "\n".join(lines)


def few(settings, most=5):
    return st.lists(settings, max_size=most, unique_by=lambda setting: setting[0].partition(".")[0])


@st.composite
def damaged_files(draw):
    """The bytes of a file with settings, damaged in a few places."""
    text = draw(few(right_settings).map(in_file) | st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        to = min(len(text), at + draw(st.sampled_from([0, 0, 1, 5, 80])))
        what = draw(st.sampled_from(PIECES) | st.sampled_from(VALUES) | st.text(max_size=4))
        text = text[:at] + what * draw(st.sampled_from([1, 1, 2, 50])) + text[to:]
    encoding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-32", "latin-1"]))
    data = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    if draw(st.integers(0, 9)) == 9:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(RAW) | st.binary(max_size=20)) + data[at:]
    return data


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "mutant.yaml"


def event(found):
    hypothesis.event("read" if isinstance(found, Config) else "refused")


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(damaged_files())
def test_damaged_files(path, data):
    path.write_bytes(data)
    event(outcome(path))


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(few(right_settings | wrong_settings), few(right_settings, 2).map(dict))
def test_mutated_settings(path, settings, overrides):
    path.write_text(in_file(settings), encoding="utf-8", errors="surrogatepass")
    event(outcome(path, [f"{name}={value}" for name, value in overrides.items()]))


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(
    few(right_settings, 2),
    st.lists((right_settings | wrong_settings).map("=".join) | any_name | wrong_text, max_size=4),
)
def test_mutated_overrides(path, settings, overrides):
    path.write_text(in_file(settings), encoding="utf-8")
    event(outcome(path, overrides))


FULL = strict_yaml.MAX_BYTES


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 1 # " + "x" * 10_000_000,
        "dfr_c_options: [" + "1," * (FULL // 2 - 10) + "1]",
        "\n".join(f"k{i}: 1" for i in range(FULL // 10)),
        "gap_dynamics_factors: {group_pairs: [" + "[[1,1],[1,0]]," * (FULL // 14 - 10) + "]}",
        "epochs: " + "9" * (FULL - 10),
        "epochs: " + "1:" * (FULL // 2 - 10) + "1",
        "dataset_name: " + "Colored" * (FULL // 7 - 10),
        "[" * FULL,
        "'" * FULL,
        "%TAG ! x\n" * (FULL // 9),
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_files_as_large_as_they_may_be(path, text):
    path.write_text(text, encoding="utf-8")
    outcome(path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["epochs=[" + "1," * loading.OVERRIDES],
        ["hidden_dim=[" + "1," * (loading.OVERRIDES // 2 - 10) + "1]"],
        [f"k{i}={'[]' * 2}" for i in range(3000)],
        ["a." * (loading.OVERRIDES // 2 - 5) + "a=1"],
        [f"{name}.{'a.' * 5000}a=1" for name in ("wandb", "epochs", "gap_dynamics_factors")],
        ["epochs=1"] * 4000,
    ],
    ids=["too large", "dense", "unknown", "deep", "deep sections", "repeated"],
)  # fmt: skip
def test_overrides_as_large_as_they_may_be(path, overrides):
    path.write_text("")
    assert not isinstance(outcome(path, overrides), Config)


def test_the_longest_configuration_reads_back():
    paths = ("results_dir", "data_dir", "features_cache_dir", "feature_extractor_weights")
    longest = dict.fromkeys(paths, "😀" * 1000)
    longest["wandb"] = {"project": "'\"\\\u200d" * 250, "entity": "\u200d" * 1000}
    longest["dfr_c_options"] = [math.nextafter(1e-300, 1)] * 1000
    longest["epochs"] = 1_000_000
    for name in BUILT_IN.of(Analysis):
        longest[f"{name}_analysis_epochs"] = [1_000_000] * 1000
    for section in ("gap_dynamics_factors", "static_dynamic_decomposition"):
        longest[section] = {"group_pairs": [[[-1, -1], [-1, 1]]] * 12}
    config = validate(longest)
    text = strict_yaml.dump(config.resolved())
    assert len(text.encode()) < FULL
    with limited():
        assert validate(strict_yaml.parse(text, "again")).resolved() == config.resolved()


NUMBERS = [
    (name, kind, limit)
    for name, field in FIELDS.items()
    if plain(field.annotation) in (int, float)
    for kind, limit in bounds(metadata(field)).items()
]


def beyond(value, kind, step):
    """The next value of the type beyond a bound (step 1) or within it (-1)."""
    up = step if kind in ("le", "lt") else -step
    return value + up if isinstance(value, int) else math.nextafter(value, up * math.inf)


def alone(name, value):
    """What a key's value becomes when it is the only one that is given, and checked on its own."""
    section, dot, key = name.partition(".")
    document = {section: {key: value}} if dot else {name: value}
    found = schema.schema(BUILT_IN).model_validate(document)
    return getattr(getattr(found, section), key) if dot else getattr(found, name)


def test_every_number_has_both_bounds():
    named = {name for name, _, _ in NUMBERS}
    assert {n for n, f in FIELDS.items() if plain(f.annotation) in (int, float)} == named
    for name in named:
        kinds = {kind[0] for other, kind, _ in NUMBERS if other == name}
        assert kinds == {"g", "l"}, name


def test_bounds(path):
    for name, kind, limit in NUMBERS:
        number = plain(FIELDS[name].annotation)
        limit = number(limit)
        inside, outside = [beyond(limit, kind, -1)], [beyond(limit, kind, 1)]
        (inside if kind in ("ge", "le") else outside).append(limit)
        assert [alone(name, value) for value in inside] == inside, name
        for value in (number(value) for value in outside):
            path.write_text(f"{name}: {in_yaml(value)}")
            (line,) = outcome(path)
            assert line.startswith(f"{name}: given {value!r}; allowed: ")


def test_types(path):
    for name, field in FIELDS.items():
        kind = plain(field.annotation)
        wrong = {
            bool: ["1", "'true'", "null"],
            int: ["true", "1.0", "'1'", ".nan"],
            float: ["true", "'1.0'", ".nan", ".inf", "1e999"],
            str: ["true", "1", "''", "x" * 1001, r'"a\x1b"'],
            list: ["true", "a", "{a: 1}", "[[]]", "[null]", "[1.5, .nan]"],
            dict: ["true", "a", "[{}]"],
        }
        if get_origin(kind) is Literal:
            texts = ["1.5", "''", "[]", "x", "true"]
            choices = list(get_args(kind))
            assert [alone(name, choice) for choice in choices] == choices
        elif name == "analyses":  # a word or a list of words
            texts = ["1", "''", "true", "{a: 1}", "[1]", "['a b']", "x"]
        else:
            texts = wrong[get_origin(kind) or kind]
        if field.default is None:
            texts = [text for text in texts if text != "null"]
        section, dot, key = name.partition(".")
        for text in texts:
            path.write_text(f"{section}: {{{key}: {text}}}" if dot else f"{name}: {text}")
            lines = outcome(path)
            assert not isinstance(lines, Config) and len(lines) == 1, (name, text)
            assert lines[0].startswith(f"{name}: given "), (name, text)


def test_lists_have_an_end(path):
    for name, field in FIELDS.items():
        most = [c.max_length for c in metadata(field) if getattr(c, "max_length", None)]
        if get_origin(plain(field.annotation)) is list:
            value = [[-1, -1], [1, 1]] if name.endswith("pairs") else 1
            value = {"groupings": "A:B", "plugins": "/nowhere.py"}.get(name, value)
            assert alone(name, [value] * most[0]) == [value] * most[0]
            with pytest.raises(ValidationError):
                alone(name, [value] * (most[0] + 1))


# What keeps a run tiny, or away from the network, is left as it is.
FIXED = {
    "num_train_samples": "60", "num_test_samples": "30", "hidden_dim": "4", "dfr_num_retrains": "2",
    "dfr_num_workers": "1", "wandb.enable": "false", "mnist_source": "embedded", "num_workers": "0",
    "use_feature_extractor": "false",
}  # fmt: skip
SMALL = {
    "epochs": st.integers(0, 3),
    "num_hidden_layers": st.integers(1, 3),
    "num_val_samples": st.integers(0, 20),
}
PLACES = ("results_dir", "data_dir", "features_cache_dir")
free = st.sampled_from(sorted(set(FIELDS) - set(FIXED) - set(PLACES)))
tiny = free.flatmap(
    lambda name: st.tuples(st.just(name), SMALL.get(name, right(name)).map(in_yaml))
)


@hypothesis.settings(
    max_examples=RUNS,
    suppress_health_check=[
        hypothesis.HealthCheck.filter_too_much,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
@hypothesis.given(few(tiny, 8).map(dict), st.integers(0, 19))
def test_valid_mutants_run(path, tmp_path, data_dir, capsys, monkeypatch, changes, figures):
    places = {
        "results_dir": tmp_path / "results",
        "data_dir": data_dir,
        "features_cache_dir": tmp_path,
    }
    arguments = [f"{name}={value}" for name, value in (FIXED | places | changes).items()]
    path.write_text("epochs: 2")
    hypothesis.assume(isinstance(outcome(path, arguments), Config))
    with monkeypatch.context() as patch:
        if figures != 13:  # they take seconds, and have tests of their own
            patch.setattr(plotting, "draw", lambda folder, **_: [])
        code = main.main(["--config", str(path), *arguments])
    captured = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        line = captured.err.splitlines()[-1]
        assert re.match(r"[a-z_.]+: ", line) and line.isprintable()
    hypothesis.event(f"exit code {code}")
