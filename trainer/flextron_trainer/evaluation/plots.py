"""Draws the sizes that tokens chose."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_routing(
    tokens: Sequence[str], widths: Mapping[str, Sequence[Sequence[float]]], path: str | os.PathLike, title: str
) -> None:
    """Draw which tokens get more compute: the width in every layer, and the mean behind the text itself.

    Args:
        tokens: The text.
        widths: `mlp` and `heads` -> layers of widths of every token, as fractions of the full ones.
        path: PNG file to write.
        title: Above the picture.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    text, *maps = figure.subplots(1 + len(widths), 1, height_ratios=[2] + [1] * len(widths))
    mlp = widths["mlp"]
    mean = [sum(layer[i] for layer in mlp) / len(mlp) for i in range(len(tokens))]
    low, high = min(mean), max(mean)
    per_line = 24
    for i, (token, width) in enumerate(zip(tokens, mean, strict=True)):
        shade = 0.9 * (width - low) / (high - low or 1)
        text.text(
            i % per_line, -(i // per_line), token.replace("\n", "\\n")[:9], fontsize=8,
            family="monospace", ha="center", va="center", parse_math=False,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": (1, 1 - shade, 1 - shade), "linewidth": 0},
        )  # fmt: skip
    text.set_xlim(-1, per_line)
    text.set_ylim(-(len(tokens) - 1) // per_line - 0.7, 0.7)
    text.set_title(f"mean MLP width by token, from {low:.2f} (white) to {high:.2f} (red)")
    text.axis("off")
    for axes, (axis, rows) in zip(maps, widths.items(), strict=True):
        image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_ylabel(f"layer ({axis})")
        figure.colorbar(image, ax=axes, label="fraction of the full width")
    maps[-1].set_xlabel("token")
    figure.savefig(path, dpi=110)
