"""Composed pictures against naive twins: layouts, scaling, augmentation."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lab.splits import composites
from lab.splits.composites import Composites


def parts(n=6, seed=0):
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return digits, rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def stacked_twin(digit, picture):
    pixels = np.zeros((3, 64, 32), dtype=np.uint8)
    for c in range(3):
        for row in range(28):
            for column in range(28):
                pixels[c, row + 2, column + 2] = digit[row, column]
        for row in range(32):
            for column in range(32):
                pixels[c, row + 32, column] = picture[c, row, column]
    return pixels


def bilinear(pictures, height, width):
    return F.interpolate(torch.from_numpy(pictures).double(), (height, width), mode="bilinear")


def enlarged_twin(digits, pictures):
    """Not rounded, (N, 3, 224, 224) float64."""
    exact = torch.zeros(len(digits), 3, 224, 224, dtype=torch.float64)
    exact[:, :, :48, 88:136] = bilinear(digits[:, None], 48, 48)
    exact[:, :, 48:] = bilinear(pictures, 176, 224)
    return exact


def test_64_rows_to_the_pixel():
    digits, pictures = parts()
    found = Composites(digits, pictures)
    assert found.shape == (6, 3, 64, 32)
    expected = np.stack([stacked_twin(*pair) for pair in zip(digits, pictures)])
    assert torch.equal(found[:], torch.from_numpy(expected).float() / 255)
    assert all((found.decode_uint8(i).numpy() == expected[i]).all() for i in range(6))


def test_224_rows_to_the_pixel():
    digits, pictures = parts()
    found = Composites(digits, pictures, image_size=224)
    assert found.shape == (6, 3, 224, 224)
    exact = enlarged_twin(digits, pictures)
    pixels = torch.stack([found.decode_uint8(i) for i in range(6)])
    assert pixels.dtype == torch.uint8
    assert (pixels.double() - exact).abs().max() <= 0.5 + 1e-9  # nothing but rounding
    assert torch.equal(found[:], pixels.float() / 255)
    halves = (exact % 1 - 0.5).abs() < 1e-9
    assert halves.any()
    assert torch.equal(pixels[halves].double(), (exact[halves] + 0.5).round())


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize(
    "scaling, grayscale",
    [(None, True), ("norm", False), ("norm", True), ("channels", False), ("channels", True)],
)
def test_scaling_and_grey(image_size, grayscale, scaling):
    options = {"image_size": image_size, "grayscale": grayscale}
    plain = Composites(*parts(), image_size=image_size)[:].double()
    mean, std = torch.tensor(composites.CIFAR10_MEAN), torch.tensor(composites.CIFAR10_STD)
    if grayscale:
        luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
        plain = torch.einsum("nchw,c->nhw", plain, luma)[:, None]
        mean, std = (mean.double() @ luma)[None], (std.double() @ luma)[None]
    expected = torch.empty_like(plain)
    for i, picture in enumerate(plain):
        if scaling == "norm":
            expected[i] = picture / (picture**2).sum().sqrt()
        elif scaling == "channels":
            for c in range(len(picture)):
                expected[i, c] = (picture[c] - mean[c]) / std[c]
        else:
            expected[i] = picture
    found = Composites(*parts(), scaling=scaling, **options)
    assert found.shape == expected.shape
    assert found[:].dtype == torch.float32
    assert torch.allclose(found[:].double(), expected, rtol=1e-5, atol=1e-6)


def test_grey_for_backbones_has_equal_channels():
    found = Composites(*parts(), image_size=224, grayscale=True)
    pixels = found.decode_uint8(2)
    assert pixels.shape == (3, 224, 224)
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()
    assert torch.allclose(pixels[0] / 255, found[2:3][0, 0], atol=0.5 / 255 + 1e-6)


def augmented_twin(pixels, rows, columns, mirrored, padding):
    """Crop at (rows, columns) of the reflection-padded picture (3, H, W), then perhaps mirror."""
    _, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    crop = padded[:, rows : rows + height, columns : columns + width]
    return crop[:, :, ::-1] if mirrored else crop


@pytest.mark.parametrize("image_size, padding", [(32, 4), (224, 28)])
def test_augmentation_against_padding_and_cropping(image_size, padding):
    plain = Composites(*parts(40), image_size=image_size)
    found = plain.augmented(7)
    assert found.shifts.amin(0).tolist() == [0, 0, 0]
    assert found.shifts[:, 2].unique().tolist() == [0, 1]
    assert found.shifts[:, :2].max() <= 2 * padding
    for i in range(40):
        twin = augmented_twin(plain.decode_uint8(i).numpy(), *found.shifts[i].tolist(), padding)
        assert (found.decode_uint8(i).numpy() == twin).all()
    assert plain.shifts is None


def test_every_shift_is_drawn_equally_often():
    shifts = Composites(*parts(1)).subset(torch.zeros(9000, dtype=torch.int64)).augmented(0).shifts
    for column in (0, 1):
        counts = shifts[:, column].bincount(minlength=9)
        assert len(counts) == 9 and (counts - 1000).abs().max() < 150
    assert abs(shifts[:, 2].sum() - 4500) < 200


def test_augmentation_depends_on_seed_and_sample_only():
    plain = Composites(*parts(30), scaling="channels")
    first, again, other = plain.augmented(1), plain.augmented(1), plain.augmented(2)
    assert torch.equal(first[:], again[:])
    assert not torch.equal(first[:], other[:])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    together = torch.cat(list(first.batches(order.split(7))))
    assert torch.equal(together, first[:][order])
    assert torch.equal(first.subset(order)[:], first[:][order])
    # Fewer samples, or batches taken before, change nothing for the others.
    assert torch.equal(plain.subset(slice(0, 11)).augmented(1).shifts, first.shifts[:11])


@pytest.mark.parametrize("image_size", [32, 224])
def test_indexing_batches_and_copies_agree(image_size):
    found = Composites(*parts(9), image_size=image_size, scaling="channels").augmented(3)
    whole = found[:]
    index = torch.tensor([5, 0, 5, 8])
    assert torch.equal(found[index], whole[index])
    assert torch.equal(found[2:4], whole[2:4])
    batches = list(found.batches([slice(0, 4), index, slice(8, 9)]))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert torch.equal(batches[1], whole[index])
    assert torch.equal(pickle.loads(pickle.dumps(found))[:], whole)
    assert torch.equal(found.to("cpu")[:], whole)
    assert found.max_batch == 2**27 // (4 * whole[0].numel())


def test_the_identity_changes_with_the_pictures_and_the_layout():
    digits, pictures = parts()
    first = Composites(digits, pictures)
    assert first.identity == Composites(digits.copy(), pictures.copy()).identity
    other_digits, other_pictures = digits.copy(), pictures.copy()
    other_digits[3, 4, 5] ^= 1
    other_pictures[5, 2, 31, 31] ^= 1
    others = [
        Composites(other_digits, pictures),
        Composites(digits, other_pictures),
        Composites(digits, pictures, image_size=224),
        Composites(digits, pictures, grayscale=True),
        first.augmented(0),
        first.subset(torch.tensor([1, 0, 2, 3, 4, 5])),
        first.subset(slice(0, 5)),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 8


def test_copies_do_not_change_the_original():
    found = Composites(*parts(), scaling="norm")
    before = found[:].clone()
    copied = copy.copy(found)
    copied.scaling = None
    found.augmented(0)
    found.subset([0, 1])
    assert torch.equal(found[:], before)


def test_the_published_deviation():
    """Colour planes by (value - mean) / (0.2023, 0.1994, 0.2010), as published codes have it."""
    plain, published = (
        Composites(*parts(4)),
        Composites(*parts(4), scaling="channels", deviation=composites.PUBLISHED_STD),
    )
    mean = torch.tensor(composites.CIFAR10_MEAN).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    torch.testing.assert_close(published[:], (plain[:] - mean) / std)
