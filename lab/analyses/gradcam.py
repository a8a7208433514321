"""Grad-CAM: where a network looks, and how much of that is the shortcut.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", 2017. With A_k (H', W') the maps of the last convolution block and f_c the output of
the label's class (of a scalar output f: y·f), α_k is the mean of ∂f_c/∂A_k over the pixels and the
heat ReLU(Σ_k α_k A_k), enlarged to the picture.

The mean is exact where the maps are averaged before the last layer, as in a ResNet. A ConvNet reads
them pixel by pixel, so that a map that speaks for the class in one corner has heat wherever it is
active. The table also has shares of ReLU(Σ_k ∂f_c/∂A_k · A_k), without the mean (HiResCAM;
Draelos & Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations", 2020).

A run's folder is explained by `lab.runs.explaining`.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lab.evaluation import predictions
from lab.evaluation.losses import class_index

DIGITS_PER_GROUP = 3  # examples in the figure
LARGE = 128  # pixels; examples of larger pictures are halved


def last_convolutions(network) -> torch.nn.Module:
    """The layer whose outputs are the last block's maps (B, K, H', W')."""
    return network.body.get_submodule(network.gradcam_layer)


def heat_maps(network, layer, x, y, by_pixel: bool = False) -> torch.Tensor:
    """Heat (B, H, W) of pictures x (B, C, H, W) with labels y (B,), each map with the sum 1.

    A map that is 0 everywhere stays so. by_pixel: without averaging the gradient over the pixels.
    """
    network.eval()
    maps = []
    hook = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        f = network(x)
    finally:
        hook.remove()
    label = class_index(y)[:, None]
    chosen = f * y if f.dim() == 1 else f.gather(1, label)
    (gradient,) = torch.autograd.grad(chosen.sum(), maps)
    alpha = gradient if by_pixel else gradient.mean((2, 3), keepdim=True)
    heat = F.relu((alpha * maps[0]).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, x.shape[2:], mode="bilinear")[:, 0]
    total = heat.sum((1, 2), keepdim=True)
    return heat / torch.where(total > 0, total, 1)


def shortcut_shares(network, layer, split, masks, config, by_pixel: bool = False) -> torch.Tensor:
    """Share (N,) of each sample's heat on the pixels of its group's mask (G, H, W); NaN of none."""
    shares, group = [], split.group
    plan = predictions.evaluation_plan(split, config.eval_batch_size, network)
    for _, index, x in predictions.batches(split, plan):
        heat = heat_maps(network, layer, x, split.y[index], by_pixel)
        share = (heat * masks[group[index]]).sum((1, 2))
        shares.append(torch.where(heat.sum((1, 2)) > 0, share, torch.nan))
    return torch.cat(shares)


def rows(network, split, splits, config) -> list[dict]:
    """Rows of `gradcam.csv` for the non-empty groups of a split.

    shortcut_share: mean over the samples that have any heat (without_heat: how many have none);
    by_pixel_share: the same of heat without averaged gradients; area_share: the shortcut's share of
    the pixels, which is what heat spread evenly would give.
    """
    shares = by_pixel = torch.full((len(split),), torch.nan)
    areas = [torch.nan] * len(split.counts)
    if splits.masks is not None:
        layer, masks = last_convolutions(network), splits.masks
        shares = shortcut_shares(network, layer, split, masks, config).cpu()
        by_pixel = shortcut_shares(network, layer, split, masks, config, by_pixel=True).cpu()
        areas = masks.float().mean((1, 2)).tolist()
    return [
        {
            "group": g,
            "name": splits.group_names[g],
            "count": split.counts[g],
            "without_heat": int(shares[part].isnan().sum()),
            "shortcut_share": shares[part].nanmean().item(),
            "by_pixel_share": by_pixel[part].nanmean().item(),
            "area_share": areas[g],
        }
        for g, part in enumerate(split.slices)
        if split.counts[g]
    ]


def examples(networks: dict, split) -> dict[str, np.ndarray]:
    """`pictures` (M, H, W, C) in [0, 1], `group` (M,), and `before_dfr`, … (M, H, W) in [0, 1].

    The first samples of each non-empty group; pictures and heat maps have 1 as their maximum.
    """
    first = [range(s.start, min(s.stop, s.start + DIGITS_PER_GROUP)) for s in split.slices]
    rows = torch.tensor([i for part in first for i in part], device=split.y.device)
    (x,) = (x for _, _, x in predictions.batches(split, [(None, rows)]))
    arrays = {"pictures": x - x.amin((1, 2, 3), keepdim=True)}
    for when, network in networks.items():
        parts = zip(x.split(DIGITS_PER_GROUP), split.y[rows].split(DIGITS_PER_GROUP))
        layer = last_convolutions(network)
        arrays[when] = torch.cat([heat_maps(network, layer, *part) for part in parts])[:, None]
    for name, values in arrays.items():
        if values.shape[-1] > LARGE:
            values = F.avg_pool2d(values, 2)
        values = values / values.amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
        arrays[name] = values.cpu().half().numpy()
    pictures = arrays["pictures"].transpose(0, 2, 3, 1)
    heat = {when: arrays[when][:, 0] for when in networks}
    return {"pictures": pictures, "group": split.group[rows].cpu().numpy(), **heat}
