"""Chooses the sub-networks that a training step trains, by the seed and the step alone.

Every process draws the same ones, and a resumed run continues the sequence of the uninterrupted one.
"""

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from modeling_flextron import FlextronConfig, SubNetwork
from modeling_flextron.errors import invalid
from modeling_flextron.families import layer_of
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import random_subnetwork
from modeling_flextron.token_routing import Routing

SAMPLERS = ("sandwich", "uniform", "weighted", "random")


@dataclass(frozen=True)
class Draw:
    """A sub-network of one step, and the name under which its loss is logged.

    While routers learn through the model, `routing` runs its layers, and `gap` is then |cost - budget|.
    """

    name: str
    subnetwork: SubNetwork
    routing: Routing | None = None
    gap: Callable[[], torch.Tensor] | None = None


def draw(
    config: FlextronConfig, sampler: str, count: int, *, seed: int, step: int, weights: list[float] | None = None
) -> list[Draw]:
    """The sub-networks of one optimizer step, largest first.

    Args:
        sampler: `"sandwich"`: the largest and the smallest row of the frontier and random rows between them, or
            random sizes where there are none (slimmable networks, arXiv 1903.05134); `"uniform"` and `"weighted"`:
            rows of the frontier with equal or given shares; `"random"`: every layer's sizes, and the global ones,
            drawn independently. No row comes twice in a step unless there are more draws than rows, or its weight
            asks for it.
        count: How many; a sandwich needs at least 2.
        seed: Of the run.
        step: Optimizer steps that were made.
        weights: For `"weighted"`: one for every row of the frontier, largest row first.
    """
    generator = random.Random(f"{seed}/{step}")  # hashed the same way everywhere
    rows = [Draw(name, subnetwork) for name, subnetwork in held(config.frontier).items()]

    def sizes(number: int) -> list[Draw]:
        return [Draw("random", random_subnetwork(config, generator)) for _ in range(number)]

    equal = [1.0] * len(rows)
    if sampler == "sandwich":
        ends, between = rows[1:][-1:], rows[1:-1]
        middle = spread(between, equal[1:-1], count - 2, generator) if between else sizes(count - 1 - len(ends))
        drawn = [rows[0], *middle, *ends]
    elif sampler == "random":
        drawn = sizes(count)
    else:
        if sampler == "weighted":
            check_weights(config, weights)
        drawn = spread(rows, weights or equal, count, generator)
    order = {draw.name: i for i, draw in enumerate(rows)}
    return sorted(drawn, key=lambda draw: order.get(draw.name, 1))


def spread(rows: list[Draw], weights: list[float], count: int, generator: random.Random) -> list[Draw]:
    """Draw `count` rows, each as often as its share of the weights says, on average, and never more unevenly than so.

    A row whose share is `count * weight / sum(weights)` comes that often, rounded up or down: at most once where its
    share is at most 1. (Systematic sampling: points at equal distances on a line of shuffled pieces.)
    """
    pieces = generator.sample(list(zip(rows, weights, strict=True)), len(rows))
    ends = list(accumulate(weight for _, weight in pieces))
    start = generator.random()
    points = ((start + i) * ends[-1] / count for i in range(count))
    return [pieces[min(bisect(ends, point), len(pieces) - 1)][0] for point in points]


def last_that_learns(model: torch.nn.Module, draws: Sequence[Draw]) -> int | None:
    """The place of the last draw whose pass reaches what is trained: all adapters may be in layers that it skips."""
    trained = {layer_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    learn = [None in trained or not trained.isdisjoint(draw.subnetwork.layers) for draw in draws]
    return max((place for place, learns in enumerate(learn) if learns), default=None)


def check_weights(config: FlextronConfig, weights: list[float] | None) -> None:
    """Refuse weights that do not fit the frontier.

    Raises:
        ValueError: not one non-negative weight for every row, or all zero.
    """
    rows = len(held(config.frontier))
    if weights is None or len(weights) != rows or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        rule = f"The sampler 'weighted' needs one weight of at least 0 for each of the {rows} rows of the frontier."
        raise invalid("sampling_weights", weights, rule, "Pass them largest row first.")
