"""Reading and checking the configuration: every message, all problems at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lab.config import document, messages, schema, strict_yaml
from lab.config.loading import load_config, validate
from lab.config.seeds import derive_seed
from lab.system.errors import ConfigError

ROOT = Path(__file__).parents[2]


def problems(document=None, overrides=(), tmp_path=None, text=None):
    """The lines of the ConfigError for a document, or [] when it is valid."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(document or {}) if text is None else text)
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


def only(lines):
    assert len(lines) == 1, lines
    return lines[0]


def test_the_shipped_file_has_every_key_at_its_default_in_order():
    shipped = strict_yaml.read(ROOT / "config.yaml")
    assert validate(shipped).resolved() == validate({}).resolved()

    def flat(document, prefix=""):
        for name, value in document.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert list(flat(shipped)) == [name for name, _, _ in schema.fields()]


def test_the_default_has_no_surprises():
    assert validate({}).debias_method == "None"
    assert validate({}).weight_decay == 0.0


@pytest.mark.parametrize("text", ["None", '"None"', "null", "~", ""])
def test_all_ways_to_write_erm(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"debias_method: {text}\n")
    assert load_config(path).debias_method == "None"
    assert load_config(path, [f"debias_method={text}"]).debias_method == "None"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1000.0), ("1_0.5", 10.5), (".5", 0.5), ("3", 3.0), ("+2.e1", 20.0)],
)
def test_numbers(tmp_path, text, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"learning_rate: {text}\n")
    found = load_config(path).learning_rate
    assert found == value
    assert isinstance(found, float)


NUMBER = "allowed: a number above 0 to 1000000, or null"
WHOLE = "allowed: a whole number from 0 to 1000000"
EPOCHS = "allowed: null (every epoch) or a list of up to 1000 epochs, such as [0, 1, 5]; [] = never"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: true", f"learning_rate: given true; {NUMBER}"),
        ("learning_rate: '1e-4'", f"learning_rate: given '1e-4' (text); {NUMBER}"),
        ("learning_rate: .inf", f"learning_rate: given inf; {NUMBER}"),
        ("learning_rate: -.inf", f"learning_rate: given -inf; {NUMBER}"),
        ("learning_rate: .nan", f"learning_rate: given nan; {NUMBER}"),
        ("learning_rate: 1e999", f"learning_rate: given inf; {NUMBER}"),
        ("learning_rate: 0", f"learning_rate: given 0; {NUMBER}"),
        ("epochs: true", f"epochs: given true; {WHOLE}"),
        ("epochs: 2.0", f"epochs: given 2.0; {WHOLE}"),
        ("epochs: '5'", f"epochs: given '5' (text); {WHOLE}"),
        ("epochs: -1", f"epochs: given -1; {WHOLE}"),
        ("epochs: null", f"epochs: given null; {WHOLE}"),
        ("use_bias: 1", "use_bias: given 1; allowed: true, false"),
        ("use_bias: 'true'", "use_bias: given 'true' (text); allowed: true, false"),
        ("optimizer: sgd", "optimizer: given 'sgd' (text); allowed: SGD, Adam; did you mean SGD?"),
        ("optimizer: null", "optimizer: given null; allowed: SGD, Adam"),
        ("debias_method: DRO", "debias_method: given 'DRO' (text); allowed: None, IW_uniform, GroupDRO, RWY, RWG, SUBY, SUBG, JTT, ERM_target, SCALE"),
        ("lr: 3", "lr: given 3, but there is no such key; did you mean learning_rate?"),
        ("hidden_size: 3", "hidden_size: given 3, but there is no such key; did you mean hidden_dim?"),
        ("tsne_learning_rate: 3", "tsne_learning_rate: given 3, but there is no such key; did you mean learning_rate?"),
        ("hiden_dim: 3", "hiden_dim: given 3, but there is no such key; did you mean hidden_dim?"),
        ("xyzzy: 3", "xyzzy: given 3, but there is no such key"),
        ("wandb: {enabel: true}", "wandb.enabel: given true, but there is no such key; did you mean wandb.enable?"),
        ("wandb: true", "wandb: given true; allowed: a mapping with enable, project, entity, mode, group"),
        ("wandb: {mode: live}", "wandb.mode: given 'live' (text); allowed: auto, online, offline"),
        ("hidden_dim: 100000000", "hidden_dim: given 100000000; allowed: a whole number from 1 to 65536"),
        ("train_correlation: 2", "train_correlation: given 2; allowed: a number from -1 to 1"),
        ("momentum: 1", "momentum: given 1; allowed: a number from 0 below 1"),
        ("experiment_name: a/b", "experiment_name: given 'a/b' (text); allowed: up to 100 letters, digits and _ . + = -, the first no . + = -, or null"),
        ("experiment_name: ..", "experiment_name: given '..' (text); allowed: up to 100 letters, digits and _ . + = -, the first no . + = -, or null"),
        ("gradient_basis_analysis_epochs: 3", f"gradient_basis_analysis_epochs: given 3; {EPOCHS}"),
        ("gradient_basis_analysis_epochs: [1, a]", f"gradient_basis_analysis_epochs: given [1, 'a']; {EPOCHS}"),
        ("dfr_c_options: []", "dfr_c_options: given []; allowed: a list, each entry a number above 0 to 1e+12"),
        ("dfr_target_layer: layer_9", "dfr_target_layer: given layer_9, but the network has 1 hidden layer(s); allowed: last_hidden, layer_0 to layer_1"),
        ("dfr_target_layer: head", "dfr_target_layer: given 'head' (text); allowed: last_hidden, layer_0, layer_1, …"),
        ("dfr_val_split_strategy: original", "dfr_val_split_strategy: given original, but ColoredMNIST has no official validation set; allowed: split_from_train"),
        ("dfr_val_ratio: 0", "dfr_val_ratio: given 0, which leaves DFR no data; allowed: above 0, below 1"),
        ("num_train_samples: 0", "num_train_samples: given 0; allowed: a whole number from 1 to 10000000, auto, or null"),
        ("train_correlation: 0.9\ntrain_label_marginal: 0.5", "train_correlation: given 0.9, which makes the probability of group G(-1,+1) negative (-0.1); allowed with label marginal 0.5 and attribute marginal 0: -0.5 to 0.5"),
        ("test_correlation: -0.5\ntest_label_marginal: 0.5\ntest_attribute_marginal: 0.5", "test_correlation: given -0.5, which makes the probability of group G(-1,-1) negative (-0.0625); allowed with label marginal 0.5 and attribute marginal 0.5: -0.25 to 0.75"),
        ("gap_dynamics_factors: {group_pairs: [[[1, 1], [1, 1]]]}", "gap_dynamics_factors.group_pairs: given [[1, 1], [1, 1]]; allowed: a list of pairs of different groups, each [[y, a], [y, a]] with -1 or 1"),
        ("static_dynamic_decomposition: {group_pairs: [[[1, true], [1, -1]]]}", "static_dynamic_decomposition.group_pairs: given [[[1, True], [1, -1]]]; allowed: a list of pairs of different groups, each [[y, a], [y, a]] with -1 or 1"),
        ("gap_dynamics_factors: {group_pairs: [[[1, 0], [1, -1]]]}", "gap_dynamics_factors.group_pairs: given [[1, 0], [1, -1]]; allowed: a list of pairs of different groups, each [[y, a], [y, a]] with -1 or 1"),
        ("wandb.mode: online", "wandb.mode: given 'online' (text), but there is no such key; in a file it is written wandb: {mode: …}"),
        ("wandbb: 1", "wandbb: given 1, but there is no such key; did you mean wandb?"),
        ("'': 1", "'': given 1, but there is no such key"),
        ("k" * 1000 + ": 1", "k" * 57 + "...: given 1, but there is no such key"),
        (r'data_dir: "a\0b"', r"data_dir: given 'a\x00b' (text); allowed: text, up to 1000 characters, no control characters"),
        (r'wandb: {project: "\x1b[2J"}', r"wandb.project: given '\x1b[2J' (text); allowed: text, up to 1000 characters, no control characters"),
        (r'results_dir: "\ud800"', r"results_dir: given '\ud800' (text); allowed: text, up to 1000 characters, no control characters"),
        ("dfr_target_layer: layer_١", "dfr_target_layer: given 'layer_١' (text); allowed: last_hidden, layer_0, layer_1, …"),
        (f"seed: {'9' * 5000}", f"seed: given '{'9' * 57}...' (text); allowed: a whole number from 0 to 4294967295"),
        (f"seed: {'9' * 100}", f"seed: given {'9' * 57}...; allowed: a whole number from 0 to 4294967295"),
        (f"gradient_basis_analysis_epochs: [{'a,' * 5000}]", f"gradient_basis_analysis_epochs: given ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', '...; {EPOCHS}"),
        (f"gradient_basis_analysis_epochs: [{'1,' * 1001}]", f"gradient_basis_analysis_epochs: given [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,...; {EPOCHS}"),
        ("wandb: {3: 4}", "wandb.3: given 4, but there is no such key"),
        ("3: 4", "3: given 4, but there is no such key"),
    ],
)  # fmt: skip
def test_messages(tmp_path, text, expected):
    assert only(problems(text=text, tmp_path=tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 1\nepochs: 2", "line 2: the key 'epochs' is given twice"),
        ("wandb:\n  enable: true\n  enable: false", "line 3: the key 'enable' is given twice"),
        ("epochs: [1", "line 1: expected"),
        ("a: &x 1\nb: *x", "line 2: aliases (*name) are not read"),
        ("<<: {epochs: 1}", "line 1: a key must be a plain name"),
        ("? [1]\n: 2", "line 1: a key must be a plain name"),
        ("- 1\n- 2", "given [1, 2]; allowed: lines of `key: value`"),
        ("just text", "allowed: lines of `key: value`"),
        ("\tepochs: 1", "line 1:"),
        ("epochs: !!python/object:os.system x", "line 1: tags (!name) are not read"),
        ("epochs: 1\nseed: !!int 0x" + "f" * 5000, "line 2: tags (!name) are not read"),
        ("epochs: ! 5", "line 1: tags (!name) are not read"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 250 + "]" * 250, "given [[[[[[[...]]]]]]]; allowed: lines of `key: value`"),
        ("epochs: 1 # " + "x" * 300_000, "too large; allowed: up to 256000 bytes"),
        ("seed: [" + "1," * 10_000 + "]", "line 1: more than 10000 keys and values"),
        (r'"a\nb": 1', r"line 1: the key 'a\nb' has characters that cannot be shown"),
        (r'"\ud800": 1', r"line 1: the key '\ud800' has characters that cannot be shown"),
        (f"{'k' * 200}: 1\n{'k' * 200}: 2", f"line 2: the key '{'k' * 57}...' is given twice"),
        (r'seed: "\UFFFFFFFF"', "not readable as YAML ("),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    line = only(problems(text=text, tmp_path=tmp_path))
    assert str(tmp_path / "c.yaml") in line
    assert expected in line


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read.*--config FILE"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read, File name too long .give another one"):
        load_config("a" * 300)
    with pytest.raises(ConfigError, match=r"a\\x00b: cannot be read, embedded null byte"):
        load_config("a\0b")
    with pytest.raises(ConfigError, match="/dev/zero: too large"):
        load_config("/dev/zero")


def test_at_most_50_problems_are_reported(tmp_path):
    found = problems(text="\n".join(f"k{i}: 1" for i in range(4000)), tmp_path=tmp_path)
    assert found[0] == "k0: given 1, but there is no such key"
    assert len(found) == 51 and found[-1] == "… and 3950 more"


def test_what_dump_writes_reads_back():
    texts = ["1e5", "1.5e5", "1_0.5", "null", "~", "", "no", "12:30", "0o17", "017", "2001-01-01",
             "=", "<<", "a: b", "# a", " a", "é", "'", '"', "- a", "\u200d"]  # fmt: skip
    data = {"texts": texts, "numbers": [1e-5, 1e300, 1.0, 5e-324, -0.0, 3], "same": [texts, texts]}
    assert strict_yaml.parse(strict_yaml.dump(data), "again") == data


def test_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 3\nwandb: {enable: true}\n")
    config = load_config(
        path,
        [
            "epochs=5",
            "debias_method=GroupDRO",
            "wandb.enable=false",
            "gradient_basis_analysis_epochs=[0,1,5]",
            "gap_dynamics_factors.group_pairs=[[[1, 1], [-1, 1]]]",
            "wandb.project=a=b",
        ],
    )
    assert config.epochs == 5
    assert config.debias_method == "GroupDRO"
    assert config.wandb.enable is False
    assert config.wandb.project == "a=b"
    assert config.gradient_basis_analysis_epochs == [0, 1, 5]
    assert config.gap_dynamics_factors.group_pairs == [[[1, 1], [-1, 1]]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "epochs: not an override; allowed: key=value, such as epochs=5"),
        ("=3", "=3: not an override; allowed: key=value, such as epochs=5"),
        ("epochs=[1", "epochs: expected ',' or ']', but got '<stream end>'"),
        ("epochs.x=3", "epochs.x: epochs has no keys of its own"),
        ("epochs\x1b=3", r"epochs\x1b=3: not an override; allowed: key=value, such as epochs=5"),
        ("x\udcff", r"x\udcff: not an override; allowed: key=value, such as epochs=5"),
        ("x" * 200, "x" * 57 + "...: not an override; allowed: key=value, such as epochs=5"),
        (
            "a." * 5000 + "a=1",
            "a: given {'a': {'a': {'a': {'a': {'a': {'a': {...}}}}}}}, but there is no such key",
        ),
        (
            "seed=" + "1" * 32_000,
            "command line: overrides of 32005 characters; allowed: up to 32000 in all",
        ),
        ("wandb.x=3", "wandb.x: given 3, but there is no such key"),
    ],
)
def test_bad_overrides(tmp_path, override, expected):
    assert only(problems({"epochs": 3}, [override], tmp_path)) == expected


def test_an_override_given_twice(tmp_path):
    line = only(problems({}, ["epochs=1", "epochs=2"], tmp_path))
    assert line == "epochs: given twice on the command line"


def test_all_problems_at_once_the_combinations_too(tmp_path):
    document = {
        "epochs": "many",
        "hiden_dim": 3,
        "train_correlation": 0.9,
        "train_label_marginal": 0.5,
        "dfr_target_layer": "layer_9",
        "wandb": {"mode": 3},
    }
    found = problems(document, ["learning_rate=x", "nonsense"], tmp_path)
    assert [line.split(":")[0] for line in found] == [
        "nonsense", "epochs", "learning_rate", "wandb.mode", "hiden_dim", "train_correlation",
        "dfr_target_layer",
    ]  # fmt: skip


def test_a_combination_is_not_checked_with_a_value_that_is_wrong_itself(tmp_path):
    found = problems({"train_correlation": 0.9, "train_label_marginal": 7}, [], tmp_path)
    assert only(found).startswith("train_label_marginal: given 7")


def test_keys_without_effect_are_reported_once_and_never_refused():
    config = validate(
        {
            "debias_method": "IW_uniform",
            "dro_eta_q": 0.5,
            "train_batch_size": 32,
            "epochs": 5,
            "gradient_basis_analysis_epochs": [0, 5, 6, 90],
            "feature_extractor_model_name": "ResNet50",
        }
    )
    assert config.ignored == (
        "dro_eta_q (only for GroupDRO)",
        "train_batch_size (the method takes the full batch)",
        "feature_extractor_model_name (without use_feature_extractor)",
        "gradient_basis_analysis_epochs: 6, 90 (beyond epochs = 5)",
    )
    assert validate({"dro_eta_q": 0.5, "debias_method": "GroupDRO"}).ignored == ()
    assert load_config(ROOT / "config.yaml").ignored == ()


def test_resolved_configuration_reads_back():
    config = validate({"optimizer": "Adam", "debias_method": None, "wandb": {"enable": False}})
    again = validate(config.resolved())
    assert again.resolved() == config.resolved()
    assert config.resolved()["weight_decay"] == 0.01
    assert config.resolved()["wandb"]["mode"] == "auto"


def test_seeds_for_different_purposes_differ():
    seeds = [derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b"), derive_seed(0, "a", 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_config_and_groups_import_neither_torch_nor_registries():
    code = (
        "import sys; from lab.config import document; from lab.splits import groups; "
        "document.help_text(); "
        "heavy = ('torch', 'numpy', 'lab.data_sets.celeba', 'lab.methods'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_help_fits_80_columns_and_names_every_key():
    text = document.help_text()
    assert max(map(len, text.splitlines())) <= 80
    for name, field, _ in schema.fields():
        assert f"  {name} =" in text
        assert field.description


def test_a_number_for_a_text_key_is_reported_to_be_quoted(tmp_path):
    line = only(problems({"experiment_name": 5}, tmp_path=tmp_path))
    assert line.endswith("(this is no text for YAML: put it in quotes, '5')")


def test_every_meaning_names_a_key():
    names = {name for name, _, _ in schema.fields()}
    assert set(messages.MEANINGS.values()) <= names and not set(messages.MEANINGS) & names
