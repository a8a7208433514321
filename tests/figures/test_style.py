"""The look of the figures: groups that can be distinguished, axes that say how they are scaled."""

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import to_rgb

from lab.figures import style


def test_groups_are_distinguished_by_colour_line_and_marker():
    styles = [style.group_style(g) for g in range(4)]
    for key in ("color", "linestyle", "marker"):
        assert len({one[key] for one in styles}) == 4
    many = [tuple(style.group_style(g).values()) for g in range(20)]
    assert len(set(many)) == 20
    others = {to_rgb(one["color"]) for one in (*style.STYLES, *style.PAIR_STYLES)}
    assert not others & {to_rgb(one["color"]) for one in styles}


def test_axes_say_when_they_are_not_linear():
    with rc_context(style.RC):
        _, axes = style.new_figure(2, ["train", "test"])
        look = style.STYLES[0]
        style.curve(axes[0, 0], range(4), [-1, 1e-3, 0, 5], look, "wide")
        style.curve(axes[1, 0], range(4), [1, 2, np.nan, 3], look, "narrow")
        style.rescale(axes[0], "term", signed=True)
        style.rescale(axes[1], "loss", signed=False)
    assert axes[0, 0].get_ylabel() == "term (symlog)"
    assert axes[0, 1].get_yscale() == "symlog"
    assert axes[1, 0].get_ylabel() == "loss" and axes[1, 0].get_yscale() == "linear"
