"""CelebA: the lists and pictures, groups of tasks, drawn splits; a stand-in end to end."""

import io
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.v2.functional as functional
from material import FACE_ATTRIBUTES, FACES, NO_ANALYSES, PLANTED, REBALANCING, celeba_keys
from PIL import Image

import data_loader
import main
from benchmarks import celeba_standin
from lab.config import loading
from lab.config.records import BUILT_IN
from lab.config.registry import Analysis
from lab.data_sets.sources import celeba
from lab.splits import groups
from lab.splits.pixels import IMAGENET_MEAN, IMAGENET_STD
from lab.system import picture_files
from lab.system.errors import ConfigError, DataError


def load(folder, **changes):
    return data_loader.load(loading.validate(celeba_keys(folder, **changes)))


@pytest.fixture
def changed(faces, tmp_path):
    """A copy of the stand-in that a test may damage: its folder `celeba`."""
    shutil.copytree(faces[0], tmp_path / "data")
    return tmp_path / "data" / celeba.HOME


PARTS = {"train": slice(0, 216), "val": slice(216, 288), "test": slice(288, 360)}


def test_official_splits_and_groups_by_hand(faces):
    folder, values = faces
    splits = load(folder)
    for name, part in PARTS.items():
        split = splits.named()[name]
        y, a = values[part, 0], values[part, 1]
        expected = [int(((y == gy) & (a == ga)).sum()) for gy, ga in groups.GROUPS]
        assert split.counts == expected
        rows = split.inputs.rows
        assert sorted(rows) == list(range(part.start, part.stop))
        assert (values[rows, 0] == split.y.numpy()).all()
        assert (values[rows, 1] == split.a.numpy()).all()
    assert splits.dfr.counts == splits.val.counts
    assert splits.group_names == [
        "not Blond_Hair, not Male", "not Blond_Hair, Male", "Blond_Hair, not Male",
        "Blond_Hair, Male",
    ]  # fmt: skip
    # The pair goes against each other, so the rare groups are those with y = a.
    assert splits.train.minority == (True, False, False, True)
    assert torch.equal(splits.test.in_minority, splits.test.y == splits.test.a)


def test_caps_and_left_out_minority(faces):
    splits = load(faces[0], num_train_samples=50, num_test_samples=20, num_val_samples=0)
    assert (len(splits.train), len(splits.test), splits.val) == (50, 20, None)
    assert len(splits.dfr) == 72
    without = load(faces[0], remove_minority_groups_train=True)
    assert without.train.counts[0] == without.train.counts[3] == 0
    assert without.train.counts[1:3] == load(faces[0]).train.counts[1:3]


def test_groups_of_several_shortcuts_by_hand(faces):
    folder, values = faces
    splits = load(folder, groupings=["Smiling:Male,Young"], **NO_ANALYSES)
    assert splits.cells == tuple((y, a) for y in (-1, 1) for a in range(4))
    assert splits.group_names[1] == "not Smiling, not Male, Young"
    assert splits.group_names[6] == "Smiling, Male, not Young"
    rows = splits.train.inputs.rows
    smiling, male, young = (
        values[rows, FACE_ATTRIBUTES.index(n)] for n in ("Smiling", "Male", "Young")
    )
    expected = 4 * (smiling > 0) + 2 * (male > 0) + (young > 0)
    assert (expected == splits.train.group.numpy()).all()
    assert splits.train.y.tolist() == smiling.tolist()
    assert splits.train.a.tolist() == (expected % 4).tolist()


def test_minority_groups_by_hand():
    """Less than the product of the margins: 30 of 100 × 0.5, …"""
    assert groups.under_represented([40, 10, 10, 40], 2) == (False, True, True, False)
    assert groups.under_represented([10, 40, 40, 10], 2) == (True, False, False, True)
    assert groups.under_represented([1, 1, 1, 1], 2) == (False,) * 4  # independent
    # Labels 60 : 40, attributes 30, 30, 40.
    counts = [20, 20, 20, 10, 10, 20]
    assert groups.under_represented(counts, 2) == (False, False, True, True, True, False)


def test_data_of_several_tasks(faces):
    folder, values = faces
    two = ["Blond_Hair:Male", "Smiling:Male,Young"]
    splits = load(folder, groupings=two, use_dfr=False, **NO_ANALYSES)
    assert [task.name for task in splits.tasks] == ["Blond_Hair", "Smiling"]
    assert [len(task.cells) for task in splits.tasks] == [4, 8]
    for split in splits.named().values():
        rows = split.inputs.rows
        blond, male, smiling, young = values[rows].T
        assert split.y.tolist() == np.stack([blond, smiling], 1).tolist()
        both = 2 * (male > 0) + (young > 0)
        assert split.a.tolist() == np.stack([male, both], 1).tolist()
        first = 2 * (blond > 0) + (male > 0)
        second = 4 * (smiling > 0) + both
        assert split.task_groups.tolist() == np.stack([first, second], 1).tolist()
        assert split.group.tolist() == first.tolist()


@pytest.mark.parametrize("layout", ["folder", "kaggle", "zip", "nested", "csv"])
def test_layouts(faces, changed, tmp_path, layout):
    expected = celeba.load(faces[0], 16)
    if layout == "kaggle":
        shutil.rmtree(changed)
        celeba_standin.write(changed.parent, FACES, FACE_ATTRIBUTES, PLANTED, kaggle=True)
    elif layout == "zip":
        shutil.make_archive(str(changed / "img_align_celeba"), "zip", changed, "img_align_celeba")
        shutil.rmtree(changed / "img_align_celeba")
    elif layout == "nested":
        inner = changed / "img_align_celeba"
        inner.rename(changed / "inner")
        inner.mkdir()
        (changed / "inner").rename(inner / "img_align_celeba")
    elif layout == "csv":
        celeba_standin.write(tmp_path / "k", FACES, FACE_ATTRIBUTES, PLANTED, kaggle=True)
        shutil.unpack_archive(tmp_path / "k" / "celeba" / "archive.zip", tmp_path / "k")
        for name in ("list_attr_celeba", "list_eval_partition"):
            (changed / f"{name}.txt").unlink()
            shutil.copy(tmp_path / "k" / f"{name}.csv", changed)
    found = celeba.load(changed.parent, 16)
    assert found.attribute_names == FACE_ATTRIBUTES
    assert (found.attributes == faces[1]).all()
    assert (found.partition == expected.partition).all()
    assert (found.decode(7) == expected.decode(7)).all()


def test_a_face_is_its_middle_resized_as_torchvision_does_it(faces):
    """Centre crop 178, resize, ImageNet's mean and deviation."""
    for side in (224, 64):
        inputs = load(faces[0], target_resolution=side).train.inputs
        name = inputs.source.names[inputs.rows[3]]
        picture = Image.open(faces[0] / "celeba" / name)
        middle = functional.center_crop(picture, 178)
        resized = functional.resize(middle, [side, side], interpolation=2)
        pixels = functional.to_dtype(functional.pil_to_tensor(resized), scale=True)
        expected = functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
        assert torch.allclose(inputs[3:4][0], expected, atol=1e-5)
        assert inputs.shape[1:] == (3, side, side)
    unit = load(faces[0], normalize_inputs=True).train.inputs[:5]
    assert torch.allclose(unit.flatten(1).norm(dim=1), torch.ones(5))
    grey = load(faces[0], use_grayscale=True).train.inputs
    luma = grey.decode_uint8(0)[0].astype(np.float32) / 255
    weights = torch.tensor([0.299, 0.587, 0.114])
    mean, std = weights @ torch.tensor(IMAGENET_MEAN), weights @ torch.tensor(IMAGENET_STD)
    assert grey.shape[1] == 1
    assert torch.allclose(grey[:1][0, 0], (torch.from_numpy(luma) - mean) / std, atol=0.02)


def test_random_boxes():
    """Area and side ratio are uniform in what is asked for, and the box is inside."""
    boxes = np.array([celeba.random_box(np.random.default_rng([0, i])) for i in range(4000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 178).all() and (bottom <= 218).all()
    width, height = right - left, bottom - top
    share, ratio = width * height / (178 * 218), width / height
    assert 0.69 < share.min() < 0.72
    assert 0.99 < ratio.min() < 1.01 and ratio.max() < 1.34
    # Not all that are drawn fit: rejection keeps the distribution of those that do.
    rng, fitting = np.random.default_rng(1), []
    while len(fitting) < 4000:
        area, r = 178 * 218 * rng.uniform(0.7, 1), math.exp(rng.uniform(0, math.log(4 / 3)))
        if round(math.sqrt(area * r)) <= 178 and round(math.sqrt(area / r)) <= 218:
            fitting.append((area / (178 * 218), r))
    middle = (left, top, right, bottom) == np.array(celeba.CENTRE)[:, None]
    drawn = ~middle.all(0)  # the fall-back of ten draws that do not fit
    for ours, expected in zip((share[drawn], ratio[drawn]), np.array(fitting).T):
        assert abs(ours.mean() - expected.mean()) < 5 * expected.std() / math.sqrt(drawn.sum() / 2)


def test_augmented_faces_depend_on_seed_and_place_only(faces):
    split = load(faces[0], data_augmentation=True).train
    plain, one, two = split, split.augmented(1), split.augmented(2)
    x = one.inputs[:40]
    assert torch.equal(x, one.inputs[:40])
    assert torch.equal(x[torch.tensor([5, 3])], one.inputs[torch.tensor([5, 3])])
    chosen = one.subset(torch.tensor([5, 3]), [2, 0, 0, 0])
    assert torch.equal(chosen.inputs[:2], x[[5, 3]])
    assert not torch.equal(x, two.inputs[:40]) and not torch.equal(x, plain.inputs[:40])
    # Twin: the crop and the mirror of sample 3 by PIL.
    rng = np.random.default_rng([1, 3])
    box, mirrored = celeba.random_box(rng), rng.integers(2)
    source = one.inputs.source
    picture = Image.open(faces[0] / "celeba" / source.names[one.inputs.rows[3]]).crop(box)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR))
    ours = source.decode(one.inputs.rows[3], np.random.default_rng([1, 3])).transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - pixels).max() <= 1


def test_drawn_splits_have_the_published_counts(faces):
    """Majority n, minority n·(1-s)/s, target and evaluation with four equal groups."""
    folder, values = faces
    drawn = {
        "groupings": ["Male:Blond_Hair"], "celeba_majority_samples": 16, "spurious_strength": 0.8,
        "val_target_size": 8, "debias_method": "ERM_target",
    }  # fmt: skip
    splits = load(folder, **drawn)
    assert splits.train.counts == [16, 4, 4, 16]
    assert splits.target.counts == [1] * 4
    # a = +1 is "not blond", so that the minority is y ≠ a.
    assert splits.group_names[3] == "Male, not Blond_Hair"
    assert splits.group_names[0] == "not Male, Blond_Hair"
    assert torch.equal(splits.train.in_minority, splits.train.y != splits.train.a)
    for name in ("train", "target", "val", "test"):
        split = splits.named()[name]
        rows = split.inputs.rows
        assert (split.y.numpy() == values[rows, 1]).all()
        assert (split.a.numpy() == -values[rows, 0]).all()
        part = PARTS[{"target": "train"}.get(name, name)]
        assert ((rows >= part.start) & (rows < part.stop)).all()
    for name in ("val", "test"):
        y, a = values[PARTS[name], 1], -values[PARTS[name], 0]
        smallest = min(int(((y == gy) & (a == ga)).sum()) for gy, ga in groups.GROUPS)
        assert splits.named()[name].counts == [smallest] * 4
    assert not set(splits.train.inputs.rows) & set(splits.target.inputs.rows)
    same, other = load(folder, **drawn), load(folder, seed=1, **drawn)
    assert (same.train.inputs.rows == splits.train.inputs.rows).all()
    assert (other.train.inputs.rows != splits.train.inputs.rows).any()
    asked = load(folder, num_test_samples=8, num_val_samples=0, **drawn)
    assert asked.test.counts == [2] * 4 and asked.val is None
    # SCALE's published numbers: 10,000 and 10,000·0.05/0.95 = 526.
    with pytest.raises(DataError) as error:
        load(folder, **drawn | {"celeba_majority_samples": 10_000, "spurious_strength": 0.95})
    text = str(error.value)
    assert "10000 faces of (Male, not Blond_Hair) are needed for train" in text
    assert "526 faces of (Male, Blond_Hair) are needed for train" in text
    y, a = values[PARTS["train"], 1], -values[PARTS["train"], 0]
    there = int(((y == 1) & (a == 1)).sum()) - 1
    assert f"but {there} are left in their official split" in text


def test_groups_that_are_missing_in_drawn_splits_are_named(tmp_path):
    celeba_standin.write(tmp_path, 40, FACE_ATTRIBUTES, PLANTED)
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[2:] = [
        f"{line[:10]} {'1 -1' if i % 2 else '-1 1'} 1 1" for i, line in enumerate(lines[2:])
    ]
    path.write_text("\n".join(lines) + "\n")
    drawn = {"celeba_splits": "drawn", "val_target_size": 0, "celeba_majority_samples": 1}
    with pytest.raises(DataError) as error:
        load(tmp_path, **drawn, spurious_strength=1.0)
    text = str(error.value)
    assert "num_test_samples: 1 faces of (Blond_Hair, Male) are needed for test, but 0 are" in text
    assert "num_val_samples: 1 faces of (not Blond_Hair, not Male) are needed for val" in text
    with pytest.raises(DataError, match="or raise spurious_strength"):
        load(tmp_path, **drawn, spurious_strength=1e-320)


def test_a_drawn_minority_against_an_independent_shortcut(tmp_path):
    celeba_standin.write(tmp_path, 40, FACE_ATTRIBUTES, PLANTED)
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    cells = ["-1 -1", "-1 1", "1 -1", "1 1"]
    lines[2:] = [f"{line[:10]} {cells[i % 4]} 1 1" for i, line in enumerate(lines[2:])]
    path.write_text("\n".join(lines) + "\n")
    keys = {"celeba_splits": "drawn", "celeba_majority_samples": 4, "val_target_size": 0}
    train = load(tmp_path, spurious_strength=0.8, **keys).train
    assert train.counts == [4, 1, 1, 4]
    assert train.in_minority.tolist() == [False] * 4 + [True] * 2 + [False] * 4


def test_keys_of_other_data_sets_have_no_effect(faces):
    given = {"mnist_source": "full", "train_correlation": 0.5, "num_val_samples": 0}
    config = loading.validate(celeba_keys(faces[0], best_epoch_by="avg_acc") | given)
    assert [line for line in config.ignored if "dfr" not in line] == [
        "mnist_source (only for ColoredMNIST, Dominoes, SpuriousMNIST)",
        "train_correlation (only for ColoredMNIST, Dominoes)",
        "best_epoch_by (without validation data)",
    ]


def test_misspelt_attributes_are_named_with_the_nearest(faces, capsys, tmp_path):
    code = main.main(
        [
            "dataset_name=CelebA", f"data_dir={faces[0]}", "groupings=[Blond_Hair:Mael]",
            "dfr_val_split_strategy=original", f"results_dir={tmp_path}", "wandb.enable=false",
        ]
    )  # fmt: skip
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("groupings: given Mael, but ")
    assert line.endswith("has no such attribute; did you mean Male?")
    with pytest.raises(DataError, match="allowed: Blond_Hair, Male, Smiling, Young"):
        load(faces[0], groupings=["Blond_Hair:Xyzzy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groupings": ["Male"]}, "groupings: given "),
        ({"groupings": []}, "groupings: given "),
        ({"groupings": ["Male:Male"]}, "in which an attribute occurs twice"),
        ({"groupings": ["A:B", "A:C"]}, "two tasks with the same label"),
        (
            {"groupings": ["A:B,C"], "analyze_jacobian_norm": True},
            "allowed with more than one shortcut attribute: false",
        ),
        ({"debias_method": "SCALE", "celeba_splits": "official"}, "official has none"),
        ({"debias_method": "SCALE", "val_target_size": 0}, "val_target_size is 0"),
        ({"celeba_splits": "drawn", "val_target_size": 12}, "multiples of 8 from 0"),
        ({"celeba_splits": "drawn", "spurious_strength": 0}, "spurious_strength: given 0"),
        ({"celeba_splits": "drawn", "groupings": ["A:B,C"]}, "one task with one shortcut"),
        (
            {"dfr_val_split_strategy": "target"},
            "CelebA with celeba_splits: official has no target set",
        ),
        ({"use_feature_extractor": True}, "target_resolution: given 16"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(faces, changes, message):
    with pytest.raises(ConfigError) as error:
        loading.validate(celeba_keys(faces[0], **changes))
    assert message in str(error.value)


def test_missing_data_say_where_to_get_them(tmp_path, changed):
    with pytest.raises(DataError, match=r"CelebA is not in .*list_attr_celeba.txt"):
        load(tmp_path / "nowhere")
    shutil.rmtree(changed / "img_align_celeba")
    with pytest.raises(DataError, match=r"is neither in .* nor in img_align_celeba.zip"):
        load(changed.parent)


def test_missing_and_broken_faces(changed):
    (changed / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(DataError, match=r"000002.jpg: no such file"):
        load(changed.parent)
    out = io.BytesIO()
    Image.new("RGB", (178, 217)).save(out, "JPEG")
    (changed / "img_align_celeba" / "000003.jpg").write_bytes(out.getvalue())
    splits = load(changed.parent, on_bad_image="skip")
    assert len(splits.train) == 214 and sum(splits.skipped["train"]) == 2
    (changed / "img_align_celeba" / "000002.jpg").write_bytes(b"")
    with pytest.raises(picture_files.BadPicture, match=r"000003.jpg: 178×217 pixels; allowed"):
        load(changed.parent).train.inputs.source.decode(2)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("list_attr_celeba.txt", "000005.jpg", "000004.jpg", "'000004.jpg' is in two rows"),
        ("list_attr_celeba.txt", "Male", "Smiling", "a column has the same name as another"),
        ("list_attr_celeba.txt", "000005.jpg", "../x.jpg", "leads out of the folder"),
        ("list_attr_celeba.txt", f"{FACES}\n", "", "not readable as a list of CelebA"),
        (
            "list_eval_partition.txt",
            "000005.jpg 0",
            "000005.jpg 3",
            "partition is '3'; allowed: 0, 1, 2",
        ),
        ("list_eval_partition.txt", "000005.jpg 0\n", "", "no row of 000005.jpg"),
        ("list_eval_partition.txt", " 0\n", " 0 1\n", "2 values a row instead of 1"),
        (
            "list_attr_celeba.txt",
            f"{FACES}\n",
            f"{FACES + 1}\n",
            f"{FACES} rows, {FACES + 1} by its first line",
        ),
        ("list_attr_celeba.txt", "Smiling Young", "Smiling", "5 values a row, 4 names of columns"),
    ],
    ids=str,
)
def test_damaged_lists_are_named(changed, file, old, new, message):
    text = (changed / file).read_text()
    assert old in text
    (changed / file).write_text(
        text.replace(old, new) if "0 1" in new else text.replace(old, new, 1)
    )
    with pytest.raises(DataError) as error:
        load(changed.parent)
    assert file in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("value", ["0", "x"])
def test_a_value_that_is_no_attribute_is_named(changed, value):
    path = changed / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[4] = f"000003.jpg  1  {value} -1  1"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        load(changed.parent)
    (line,) = error.value.problems
    assert line.endswith(f"txt, 000003.jpg: Male is '{value}'; allowed: -1, 1")


def test_a_list_without_its_last_lines_is_not_taken_for_all_of_them(tmp_path):
    celeba_standin.write(tmp_path, 20, FACE_ATTRIBUTES, PLANTED, kaggle=True)
    home = tmp_path / "celeba"
    shutil.unpack_archive(home / "archive.zip", home)
    path = home / "list_attr_celeba.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"list_attr_celeba.csv: no row of 000020.jpg$"):
        load(tmp_path)


@pytest.mark.parametrize("method", REBALANCING)
def test_every_method_on_pictures(celeba_run, method):
    code, folder = celeba_run(method, debias_method=method, data_augmentation=True)
    assert code == 0
    history = pd.read_csv(folder / "training_history.csv")
    assert len(history) == 2 and history["test_worst_acc"].notna().all()


@pytest.mark.parametrize("method", ["SCALE", "ERM_target"])
def test_target_methods_on_drawn_splits(celeba_run, method):
    code, folder = celeba_run(
        method, debias_method=method, groupings=["Male:Blond_Hair"], celeba_majority_samples=16,
        spurious_strength=0.8, val_target_size=16, train_batch_size=8, use_dfr=True,
        dfr_val_split_strategy="target", dfr_num_workers=1, dfr_c_options=[1.0],
    )  # fmt: skip
    assert code == 0
    counts = pd.read_csv(folder / "group_counts.csv")
    assert counts[counts["split"] == "train"]["count"].tolist() == [16, 4, 4, 16]
    assert counts[counts["split"] == "target"]["count"].tolist() == [2] * 4


def test_networks_and_features_end_to_end(celeba_run, tmp_path):
    """A ResNet on the pixels, an MLP with all analyses on cached features, three attributes."""
    code, _ = celeba_run(
        "resnet", model_name="ResNet18", target_resolution=32, num_train_samples=20
    )
    assert code == 0
    features = {
        "model_name": "MLP", "use_feature_extractor": True, "target_resolution": 224,
        "feature_extractor_weights": "random", "features_cache_dir": str(tmp_path / "cache"),
        "num_train_samples": 24, "num_val_samples": 8, "num_test_samples": 8, "hidden_dim": 8,
    }  # fmt: skip
    on = {f"analyze_{name}": True for name in BUILT_IN.of(Analysis)}
    code, folder = celeba_run("features", **features, **on)
    assert code == 0
    assert (folder / "analysis.csv").exists()
    code, folder = celeba_run("three", groupings=["Smiling:Male,Young"], target_resolution=16)
    assert code == 0
    assert "test_group_7_acc" in pd.read_csv(folder / "training_history.csv").columns


def test_rebalancing_helps_the_worst_group_of_the_planted_pair(
    celeba_run, tmp_path_factory, monkeypatch
):
    """One seed of the table in the README, smaller; every face is decoded once only."""
    data = tmp_path_factory.mktemp("more")
    decode, kept = celeba.CelebA.decode, {}

    def once(source, i, rng=None):
        if i not in kept:
            kept[i] = decode(source, i, rng)
        return kept[i]

    monkeypatch.setattr(celeba.CelebA, "decode", once)
    celeba_standin.write(data, 2400, FACE_ATTRIBUTES[:2], PLANTED)
    worst = {}
    epochs = {"None": 6, "RWG": 4, "SUBG": 15, "JTT": 6}
    for method, number in epochs.items():
        code, folder = celeba_run(
            method, data, debias_method=method, epochs=number, target_resolution=8,
            jtt_lambda_up=6, jtt_learning_rate=0.005, num_val_samples=0, latent_size=64,
        )  # fmt: skip
        assert code == 0
        worst[method] = pd.read_csv(folder / "training_history.csv")["test_worst_acc"].iloc[-1]
    assert all(worst[method] > worst["None"] + 0.1 for method in epochs if method != "None"), worst


def test_lists_may_begin_with_a_byte_order_mark(tmp_path):
    celeba_standin.write(tmp_path, 20, FACE_ATTRIBUTES, PLANTED)
    plain = celeba.load(tmp_path, 16)
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        path = tmp_path / "celeba" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = celeba.load(tmp_path, 16)
    assert np.array_equal(marked.attributes, plain.attributes)
    assert np.array_equal(marked.partition, plain.partition)
