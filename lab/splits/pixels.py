"""From the bytes of pictures to a network's inputs: luminance, scaling, memory of a batch."""

from collections.abc import Sequence

import torch

# As PIL and torchvision convert to grey: ITU-R 601-2 luma.
LUMA = (0.299, 0.587, 0.114)
# Mean and standard deviation of the channels over ImageNet's pictures in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_BYTES = 2**27  # of a batch in evaluation and analyses; larger ones are slower, too


def max_batch(shape: torch.Size) -> int:
    """How many inputs of a shape (N, C, H, W) `BATCH_BYTES` hold as float32."""
    return BATCH_BYTES // (4 * shape[1:].numel())


def luminance(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) float32 in [0, 1] of RGB pictures (B, 3, H, W) uint8."""
    red, green, blue = (w / 255 * pixels[:, c : c + 1] for c, w in enumerate(LUMA))
    return red + green + blue


def scale_(
    pictures: torch.Tensor, scaling: str | None, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Pictures (B, C, H, W), C = 3 or 1 (luminance), scaled in place.

    scaling: None; "norm", to unit L2 norm; "channels", by the mean and standard deviation of the
    three channels, of luminance by their averages weighted with `LUMA`.
    """
    if scaling == "norm":
        return unit_norm_(pictures)
    if scaling == "channels":
        means, stds = pictures.new_tensor(mean), pictures.new_tensor(std)
        if pictures.shape[1] == 1:
            weights = pictures.new_tensor(LUMA)
            means, stds = (means @ weights).view(1), (stds @ weights).view(1)
        pictures.sub_(means.view(-1, 1, 1)).div_(stds.view(-1, 1, 1))
    return pictures


def unit_norm_(pictures: torch.Tensor) -> torch.Tensor:
    """Scales every picture of (B, C, H, W) to unit L2 norm, in place."""
    # In two stages: one float32 sum over 150,528 squares is wrong in the fourth digit.
    norms = pictures.norm(dim=3).flatten(1).norm(dim=1)
    # An all-zero picture has no direction; it stays zero.
    pictures /= norms.clamp_min(torch.finfo(pictures.dtype).tiny).view(-1, 1, 1, 1)
    return pictures
