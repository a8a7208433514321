"""Composites as inputs: a digit above a picture, put together when they are used.

Only the bytes of the digits and of the pictures are kept. Both layouts are computed in whole
numbers, so that they depend neither on the batch nor (unless TF32 is switched on) on the device.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from lab.splits.pixels import LUMA, luminance, max_batch, scale_
from lab.system.picture_files import SIDE

DIGIT, PICTURE = 28, 32  # sides of the two parts
ENLARGED_DIGIT = 48
# Mean and standard deviation of the channels over CIFAR-10's training pictures in [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# The mean over pictures of each picture's deviation, which published codes divide by.
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)


class Composites:
    """Takes the place of a tensor of inputs (N, C, H, W): composes the samples that are indexed.

    `composites[index]` for a slice or an index tensor is a float32 tensor (B, C, H, W) on the
    device of the parts, C = 1 (luminance) if `grayscale` else 3 (RGB).

    digits: (N, 28, 28) uint8; pictures: (N, 3, 32, 32) uint8; image_size: 32, the digit with a
    border of 2 above the picture, 64 × 32 pixels, or 224, the digit enlarged to 48 × 48 in the
    middle of the upper 48 rows and the picture stretched to the other 176, 224 × 224 pixels;
    scaling: None, values in [0, 1], "norm", every input scaled to unit L2 norm, or "channels",
    CIFAR-10's mean subtracted and divided by deviation, (3,), of the channels.
    """

    def __init__(
        self, digits, pictures, *, image_size: int = 32, grayscale: bool = False,
        scaling: str | None = None, deviation: tuple[float, ...] = CIFAR10_STD,
    ):  # fmt: skip
        self.deviation = deviation
        self.digits, self.pictures = torch.as_tensor(digits), torch.as_tensor(pictures)
        self.image_size, self.grayscale, self.scaling = image_size, grayscale, scaling
        self.shifts: torch.Tensor | None = None  # (N, 3): rows, columns, 1 = mirrored

    def __len__(self) -> int:
        return len(self.digits)

    @property
    def shape(self) -> torch.Size:
        height = SIDE if self.image_size == SIDE else 2 * PICTURE
        return torch.Size((len(self), 1 if self.grayscale else 3, height, self.image_size))

    @property
    def max_batch(self) -> int:
        """The largest batch for evaluation and analyses."""
        return max_batch(self.shape)

    @property
    def padding(self) -> int:
        """Reflected pixels on each side for random crops: 4 of 32, as many in proportion of 224."""
        return self.image_size // 8

    def to(self, device) -> "Composites":
        """The same with its parts, and so its batches, on `device`."""
        return self._with(lambda part: part.to(device))

    def subset(self, index) -> "Composites":
        """The composites at these indices."""
        return self._with(lambda part: part[index])

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Composites":
        changed = copy.copy(self)
        changed.digits, changed.pictures = change(self.digits), change(self.pictures)
        changed.shifts = None if self.shifts is None else change(self.shifts)
        return changed

    def augmented(self, seed: int) -> "Composites":
        """The same, each padded by reflection, cropped at random and mirrored or not.

        What happens to sample i depends on (seed, i) only, not on batches or their order.
        """
        high = (2 * self.padding + 1, 2 * self.padding + 1, 2)
        shifts = np.random.default_rng(seed).integers(high, size=(len(self), 3))
        changed = copy.copy(self)
        changed.shifts = torch.from_numpy(shifts).to(self.digits.device)
        return changed

    def __getitem__(self, index) -> torch.Tensor:
        pixels = self._pixels(index)
        # Twice as fast as a division of bytes.
        inputs = luminance(pixels) if self.grayscale else pixels.float().div_(255)
        return scale_(inputs, self.scaling, CIFAR10_MEAN, self.deviation)

    def batches(self, indices: Iterable) -> Iterator[torch.Tensor]:
        """Yields `self[index]` for every index, in order."""
        return map(self.__getitem__, indices)

    def decode_uint8(self, i: int) -> torch.Tensor:
        """Input i as a backbone takes it, (3, H, W) uint8; grey inputs: equal channels."""
        pixels = self._pixels(slice(i, i + 1))[0]
        if self.grayscale:
            red, green, blue = (w * pixels[c].double() for c, w in enumerate(LUMA))
            pixels = (red + green + blue).round().byte().expand(3, -1, -1)
        return pixels

    @property
    def identity(self) -> str:
        """A text that changes with what `decode_uint8` returns, for the keys of caches."""
        facts = {
            "source": "composites",
            "digits_sha256": _sha256(self.digits),
            "pictures_sha256": _sha256(self.pictures),
            "grayscale": self.grayscale,
            "image_size": self.image_size,
        }
        if self.shifts is not None:
            facts["shifts_sha256"] = _sha256(self.shifts)
        return json.dumps(facts, sort_keys=True)

    def _pixels(self, index) -> torch.Tensor:
        """Composed and augmented, RGB, (B, 3, H, W) uint8."""
        digits, pictures = self.digits[index], self.pictures[index]
        compose = _enlarged if self.image_size == SIDE else _stacked
        pixels = compose(digits, pictures)
        if self.shifts is not None:
            pixels = _cropped(pixels, self.shifts[index], self.padding)
        return pixels


def _sha256(part: torch.Tensor) -> str:
    return hashlib.sha256(part.cpu().flatten().numpy().data).hexdigest()


def _stacked(digits: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 32): the digits, padded to 32 × 32, above the pictures."""
    border = (PICTURE - DIGIT) // 2
    upper = F.pad(digits, (border,) * 4)[:, None].expand(-1, 3, -1, -1)
    return torch.cat([upper, pictures], dim=2)


def _enlarged(digits: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 224, 224): the digits at 48 × 48 in the middle above, the pictures stretched below."""
    pixels = pictures.new_zeros(len(pictures), 3, SIDE, SIDE)
    left = (SIDE - ENLARGED_DIGIT) // 2
    upper = _resized(digits, ENLARGED_DIGIT, ENLARGED_DIGIT)
    pixels[:, :, :ENLARGED_DIGIT, left : left + ENLARGED_DIGIT] = upper[:, None]
    pixels[:, :, ENLARGED_DIGIT:] = _resized(pictures, SIDE - ENLARGED_DIGIT, SIDE)
    return pixels


def _resized(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pictures (..., H, W) uint8 enlarged bilinearly to whole values, halves rounded up."""
    rows, row_unit = _weights(pictures.shape[-2], height)
    columns, column_unit = _weights(pictures.shape[-1], width)
    # float32 is exact here: all numbers are whole and below 255·24·24 < 2^24.
    values = pictures.float()
    values = rows.to(values) @ values @ columns.to(values).T
    unit = row_unit * column_unit
    return values.add_(unit / 2).div_(unit).byte()


@functools.cache
def _weights(old: int, new: int) -> tuple[torch.Tensor, int]:
    """Bilinear interpolation from old to new pixels of one side, in whole numbers.

    Returns weights (new, old) and the sum of each of their rows. New pixel d has its middle at
    (d + ½)·old/new - ½ of the old pixels; beyond their outermost middles the value stays.
    """
    place = np.clip((2 * np.arange(new) + 1) * old - new, 0, 2 * new * (old - 1))  # in 1/(2·new)
    common = np.gcd.reduce([*place, 2 * new])
    unit, place = 2 * new // common, place // common
    lower = np.minimum(place // unit, old - 2)
    weights = np.zeros((new, old), dtype=np.float32)
    weights[np.arange(new), lower] = unit - (place - lower * unit)
    weights[np.arange(new), lower + 1] = place - lower * unit
    return torch.from_numpy(weights), int(unit)


def _cropped(pixels: torch.Tensor, shifts: torch.Tensor, padding: int) -> torch.Tensor:
    """Pictures (B, 3, H, W) moved by shifts - padding, reflected at the edges, and mirrored."""
    height, width = pixels.shape[2:]
    rows = torch.arange(height, device=pixels.device) + shifts[:, :1] - padding
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(shifts[:, 2:] > 0, width - 1 - columns, columns)
    rows = _reflected(rows, height)
    columns = _reflected(columns + shifts[:, 1:2] - padding, width)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return pixels.flatten(2).gather(2, places[:, None].expand(-1, 3, -1)).view_as(pixels)


def _reflected(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places outside 0 … size - 1 mirrored at the outermost pixels, which are not repeated."""
    return size - 1 - (size - 1 - places.abs()).abs()
