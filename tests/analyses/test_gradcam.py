"""Grad-CAM against plain loops and a network of which one knows where it looks."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import make_split, make_splits, many_groups
from torch import nn

import main
import plotting
from lab.analyses import gradcam
from lab.figures import drawing
from lab.figures import pictures as picture_figures
from lab.folders import reading
from lab.networks import building
from lab.retraining.head import Head
from lab.runs import explaining, resuming


def network(settings, num_outputs=1, **keys):
    config = settings(latent_size=5, **{"analyses": "none"} | keys)
    return building.build(config, (1, 8, 8), num_outputs).double(), config


def pictures(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def enlarged(heat, size):
    """Bilinear interpolation between pixel centres, written out."""
    scale, small = len(heat) / size, heat
    out = torch.zeros(size, size, dtype=heat.dtype)
    for i in range(size):
        for j in range(size):
            at = [min(max((k + 0.5) * scale - 0.5, 0), len(heat) - 1) for k in (i, j)]
            low = [int(k) for k in at]
            high = [min(k + 1, len(heat) - 1) for k in low]
            (u, v), (a, b), (c, d) = (k - int(k) for k in at), low, high
            out[i, j] = (
                (1 - u) * (1 - v) * small[a, b] + (1 - u) * v * small[a, d]
                + u * (1 - v) * small[c, b] + u * v * small[c, d]
            )  # fmt: skip
    return out


def twin(front, back, x, c, by_pixel):
    """Grad-CAM of one picture by its definition: one derivative for every pixel of every map."""
    maps = front(x[None]).detach()[0]
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype)
    for k, a in enumerate(maps):
        alpha = torch.zeros_like(a)
        for i in range(a.shape[0]):
            for j in range(a.shape[1]):
                pixel = maps[k, i, j].clone().requires_grad_()
                changed = maps.clone()
                changed[k, i, j] = pixel
                f = back(changed[None]).reshape(-1)
                alpha[i, j] = torch.autograd.grad(f[c], pixel)[0].item()
        heat += (alpha if by_pixel else alpha.mean()) * a
    heat = enlarged(heat.clamp_min(0), x.shape[-1])
    return heat / heat.sum() if heat.sum() else heat


@pytest.mark.parametrize("num_outputs, by_pixel", [(1, False), (3, False), (3, True)])
def test_against_the_definition(settings, num_outputs, by_pixel):
    net, _ = network(settings, num_outputs, model_name="ConvNet")
    x = pictures(3)
    front, rest = net.body[:5], nn.Sequential(*net.body[5:], net.classifier)
    y = torch.tensor([1.0, -1, 1]) if num_outputs == 1 else torch.tensor([0, 2, 1])
    found = gradcam.heat_maps(net, gradcam.last_convolutions(net), x, y, by_pixel)
    assert found.shape == (3, 8, 8) and not found.requires_grad
    for i in range(3):
        if num_outputs == 1:
            expected = twin(front, lambda a, i=i: y[i] * rest(a), x[i], 0, by_pixel)
        else:
            expected = twin(front, rest, x[i], y[i], by_pixel)
        torch.testing.assert_close(found[i], expected)
    assert not net.body[4]._forward_hooks


def test_a_resnet_is_looked_at_behind_its_last_block(settings):
    net, _ = network(settings, 2, model_name="ResNet18")
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = pictures(3), torch.tensor([-1.0, 1, 1])
    layer = gradcam.last_convolutions(net)
    resnet = net.body[1]
    assert layer is resnet.layer4
    found = gradcam.heat_maps(net, layer, x, y)
    torch.testing.assert_close(found, gradcam.heat_maps(net, layer, x, y, by_pixel=True))
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # Each picture by itself, behind global average pooling: ∂f/∂A is the weight over the pixels.
    for i, c in enumerate((0, 1, 1)):
        maps = {}
        hook = layer.register_forward_hook(lambda m, x, out, maps=maps: maps.update(a=out))
        net(x[i : i + 1])
        hook.remove()
        a = maps["a"].detach()
        alpha = net.classifier.weight[c].detach() / a[0, 0].numel()
        heat = F.relu((alpha[:, None, None] * a[0]).sum(0))
        heat = enlarged(heat, 8)
        torch.testing.assert_close(found[i], heat / heat.sum() if heat.sum() else heat)


class LeftHalf(nn.Module):
    """Sums the left half of its picture, through maps as a ConvNet has them."""

    def __init__(self):
        super().__init__()
        self.gradcam_layer = "4"
        self.body = nn.Sequential(*[nn.Identity()] * 4, nn.AvgPool2d(2))
        self.body[0] = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.body[0].weight.copy_(torch.tensor([1.0, -1]).view(2, 1, 1, 1))

    def forward(self, x):
        maps = self.body(x)
        width = maps.shape[-1] // 2
        return maps[..., 0, :, :width].sum((1, 2)) + 0 * maps.sum((1, 2, 3))


def test_a_network_that_looks_at_the_left_half_has_its_heat_there(settings):
    """The maps it reads are where its heat is, whatever there is on the other side."""
    net = LeftHalf()
    x = torch.zeros(3, 1, 8, 8)
    x[0, :, 2:6, 0:4] = 1
    x[1] = x[0]
    y = torch.tensor([1.0, -1, 1])
    left = torch.zeros(1, 8, 8, dtype=torch.bool)
    left[:, :, :4] = True
    layer = gradcam.last_convolutions(net)
    heat = gradcam.heat_maps(net, layer, x, y)
    # Bilinear interpolation reaches half a pixel of the maps beyond.
    assert heat[0, :, :4].sum() > 0.85 and heat[0].sum() == pytest.approx(1)
    assert heat[1].sum() == 0  # nothing speaks for -1
    x[0, :, 2:6] = 1  # the same on the right, which it does not look at
    both = [gradcam.heat_maps(net, layer, x[:1], y[:1], by_pixel) for by_pixel in (False, True)]
    assert both[0][0, :, :4].sum() == pytest.approx(0.5)  # the mean does not know where
    assert both[1][0, :, :4].sum() > 0.85
    x[0] = x[1]
    split = make_split((0, 0, 0, 3), shape=(1, 8, 8), dtype=torch.float32)
    split.inputs, split.y = x, y
    shares = gradcam.shortcut_shares(net, layer, split, left.expand(4, 8, 8), settings())
    assert shares[0] == pytest.approx(heat[0, :, :4].sum().item())
    assert math.isnan(shares[1]) and math.isnan(shares[2])  # no heat, no share


def test_shares_of_groups(settings):
    net, config = network(settings, 2, model_name="ConvNet", loss_function="cross_entropy")
    config = config.model_copy(update={"eval_batch_size": 2})
    splits = make_splits(test=(3, 0, 4, 2), shape=(1, 8, 8))
    splits.masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    splits.masks[0, :2], splits.masks[2, :, 5:] = True, True
    rows = gradcam.rows(net, splits.test, splits, config)
    assert [(row["group"], row["count"]) for row in rows] == [(0, 3), (2, 4), (3, 2)]
    assert [row["area_share"] for row in rows] == [0.25, 0.375, 0]
    layer = gradcam.last_convolutions(net)
    heat = gradcam.heat_maps(net, layer, splits.test.inputs, splits.test.y)
    there = heat.sum((1, 2)) > 0
    assert rows[0]["without_heat"] == (~there[:3]).sum() and there[3:7].any()
    top = heat[:3, :2].sum((1, 2))[there[:3]]
    assert rows[0]["shortcut_share"] == pytest.approx(top.mean().item(), nan_ok=True)
    by_pixel = gradcam.heat_maps(net, layer, splits.test.inputs, splits.test.y, by_pixel=True)
    assert rows[2]["by_pixel_share"] == pytest.approx(0)
    assert rows[0]["by_pixel_share"] == pytest.approx(by_pixel[:3, :2].sum((1, 2)).mean().item())
    assert rows[1]["shortcut_share"] == pytest.approx(
        heat[3:7, :, 5:].sum((1, 2))[there[3:7]].mean().item()
    )
    splits.masks = None
    rows = gradcam.rows(net, splits.test, splits, config)
    assert all(math.isnan(row["shortcut_share"]) for row in rows)
    assert all(math.isnan(row["area_share"]) for row in rows)


def test_the_head_of_dfr_takes_the_place_of_the_last_layer(settings, tmp_path):
    for loss, C in (("logistic", 1), ("cross_entropy", 3)):
        net, config = network(settings, C, model_name="ConvNet", loss_function=loss)
        rng = np.random.default_rng(0)
        shape = (5,) if C == 1 else (3, 5)
        intercept = 0.3 if C == 1 else rng.normal(size=3)
        mean, scale = rng.normal(size=5), rng.uniform(0.5, 2, size=5)
        head = Head(mean, scale, rng.normal(size=shape), intercept)
        np.savez(tmp_path / "dfr_model.npz", **vars(head))
        retrained = explaining._retrained(net, tmp_path, config).double()
        x = pictures(4)
        with torch.no_grad():
            expected = head.outputs(net.hidden(x).numpy())
            torch.testing.assert_close(retrained(x), expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(retrained(x), net(x))


SHORTCUTS = """
{3: {main: {kind: square, position: left_top, size: 5},
     minority: {kind: lines, orientation: vertical, distance: 7}, probability: 0.8},
 8: {main: {kind: lines, orientation: vertical, distance: 7},
     minority: {kind: square, position: left_top, size: 5}, probability: 0.8}}
""".replace("\n", " ")


@pytest.fixture(scope="module")
def run_folder(data_dir, tmp_path_factory):
    """A run of a ConvNet on 200 digits with shortcuts."""
    results = tmp_path_factory.mktemp("results")
    keys = {
        "dataset_name": "SpuriousMNIST", "labels": [3, 8], "spurious_features": SHORTCUTS,
        "num_train_samples": 200, "num_test_samples": 40, "normalize_inputs": "false",
        "model_name": "ConvNet", "latent_size": 8, "loss_function": "cross_entropy",
        "optimizer": "Adam", "learning_rate": 0.001, "epochs": 1, "dfr_solver": "sgd",
        "dfr_sgd_epochs": 2, "data_dir": data_dir, "results_dir": results, "wandb.enable": "false",
        "analyses": "none",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "FIGURES", {"dfr": drawing.FIGURES["dfr"]})
        assert main.main([f"{key}={value}" for key, value in keys.items()]) == 0
    (folder,) = results.iterdir()
    return folder


def test_the_table_and_the_figure_of_a_run(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "FIGURES", {"gradcam": drawing.FIGURES["gradcam"]})
    assert plotting.main([str(run_folder)]) == 0
    assert not (run_folder / "plots" / "gradcam.png").exists()
    assert plotting.main([str(run_folder), "--gradcam"]) == 0
    assert capsys.readouterr().out.split() == [str(run_folder / "plots" / "gradcam.png")]
    assert (run_folder / "plots" / "gradcam.png").stat().st_size > 10_000
    table = pd.read_csv(run_folder / "gradcam.csv")
    assert list(table) == [
        "when", "split", "group", "name", "count", "without_heat", "shortcut_share",
        "by_pixel_share", "area_share",
    ]  # fmt: skip
    assert set(table.split) == {"test", "opposite", "all_main", "shortcut_only"}  # not clean
    assert list(table.when.unique()) == ["before_dfr", "after_dfr"]
    before, after = (table[table.when == when] for when in table.when.unique())
    assert before.iloc[:, 1:5].to_numpy().tolist() == after.iloc[:, 1:5].to_numpy().tolist()
    counts = pd.read_csv(run_folder / "group_counts.csv")
    cells = counts[counts.split.isin(set(table.split)) & (counts["count"] > 0)]
    expected = cells.set_index(["split", "group"])["count"].sort_index()
    pd.testing.assert_series_equal(
        before.set_index(["split", "group"])["count"].sort_index(), expected
    )
    squares = table.name.str.endswith("square left top")
    assert np.allclose(table.area_share[squares], 25 / 784)
    assert np.allclose(table.area_share[~squares], 4 / 28)
    assert table.shortcut_share.dropna().between(0, 1).all()
    with np.load(run_folder / "gradcam.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    assert set(arrays) == {"pictures", "group", "before_dfr", "after_dfr"}
    assert np.bincount(arrays["group"]).tolist() == [3, 3, 0, 3, 3]
    assert arrays["pictures"].shape == (12, 28, 28, 1)
    assert (arrays["pictures"][arrays["group"] == 0, :5, :5] == 1).all()  # the squares

    # Without the network: again from the tables, the same to the byte.
    drawn = (run_folder / "plots" / "gradcam.png").read_bytes()
    monkeypatch.setattr(explaining, "explain", None)
    assert plotting.main([str(run_folder)]) == 0
    assert (run_folder / "plots" / "gradcam.png").read_bytes() == drawn


def test_resumed_training_forgets_the_heat_of_another_network(run_folder, tmp_path):
    made = ["gradcam.csv", "gradcam.npz", "plots/gradcam.png", "plots/gradcam_2.png"]
    (tmp_path / "plots").mkdir()
    for name in (*made, "plots/samples.png"):
        (tmp_path / name).touch()
    resuming.remove_results(tmp_path)
    assert [p.name for p in tmp_path.rglob("*.*")] == ["samples.png"]


def test_what_cannot_be_explained(settings, run_folder, tmp_path, capsys):
    assert plotting.main([str(tmp_path), "--gradcam"]) == 2
    assert "config_used.yaml" in capsys.readouterr().err
    text = (run_folder / "config_used.yaml").read_text()
    (tmp_path / "config_used.yaml").write_text(text.replace("ConvNet", "MLP"))
    assert plotting.main([str(tmp_path), "--gradcam"]) == 2
    assert "is an MLP, which has no convolutions" in capsys.readouterr().err
    (tmp_path / "config_used.yaml").write_text(text)
    assert plotting.main([str(tmp_path), "--gradcam"]) == 2
    assert "no last checkpoint" in capsys.readouterr().err
    changed = text.replace("seed: 0", "seed: 1")
    assert changed != text
    (tmp_path / "config_used.yaml").write_text(changed)
    (tmp_path / "checkpoints").symlink_to(run_folder / "checkpoints")
    assert plotting.main([str(tmp_path), "--gradcam"]) == 2
    assert "the data are not those of this run any more" in capsys.readouterr().err
    (tmp_path / "config_used.yaml").write_text(text)
    assert plotting.main([str(tmp_path), "--gradcam"]) == 2
    assert "dfr_model.npz: not readable" in capsys.readouterr().err
    for width, C, reported in (
        (8, 3, "another network"),
        (9, 2, "another network"),
        (8, 0, "not fit"),
    ):
        arrays = {"mean": np.zeros(width), "scale": np.ones(width), "intercept": np.zeros(C or 2)}
        np.savez(tmp_path / "dfr_model.npz", coefficients=np.zeros((C or 3, width)), **arrays)
        assert plotting.main([str(tmp_path), "--gradcam"]) == 2
        assert reported in capsys.readouterr().err


def test_many_groups_take_several_pages(tmp_path):
    split = many_groups([4, 0, 2, *[3] * 15], num_attributes=6)
    split.inputs = pictures(len(split)).float()
    torch.manual_seed(0)
    body = nn.Sequential(*[nn.Identity()] * 3, nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten())
    net = nn.Sequential()
    net.gradcam_layer = "4"
    net.body, net.classifier = body, nn.Linear(128, 3)
    arrays = gradcam.examples({"before_dfr": net}, split)
    np.savez(tmp_path / "gradcam.npz", **arrays)
    assert np.bincount(arrays["group"]).tolist() == [3, 0, 2, *[3] * 15]
    assert arrays["before_dfr"].max((1, 2)).max() == 1
    names = {g: f"group {g}" for g in range(18)}
    run = reading.RunTables(tmp_path, {}, pd.DataFrame(), None, None, names, {})
    pages = picture_figures.gradcam(run)
    assert [len(page.subfigs) for page in pages] == [8, 8, 1]
    titles = [part.get_suptitle() for page in pages for part in page.subfigs]
    assert [t for t in titles if t] == [f"group {g}" for g in range(18) if g != 1]
    # Input and heat of two samples in a group that has no third.
    assert sum(bool(ax.images) for ax in pages[0].subfigs[1].axes) == 4
