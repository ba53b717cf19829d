"""The frontier as a picture."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_frontier(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: str | os.PathLike, title: str = "Frontier"
) -> None:
    """Draw loss against parameters.

    Args:
        curves: Label -> points `(parameters, loss in nats per token)`; a single point is drawn as a star.
        path: PNG file to write.
        title: Above the plot.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in curves.items():
        sizes, losses = zip(*sorted(points), strict=True)
        single = len(points) == 1
        axes.plot(
            [size / 1e6 for size in sizes], losses, "*" if single else "o-", markersize=14 if single else 6, label=label
        )
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
