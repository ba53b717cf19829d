"""Which sub-networks a training step trains: a function of the seed and the step alone.

Every process draws the same ones, and a resumed run continues the sequence of the uninterrupted one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modeling_flextron import FlextronConfig, SubNetwork
from modeling_flextron.errors import invalid
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
        config: Of the elastic model.
        sampler: `"sandwich"`: the largest and the smallest row of the frontier and random rows between them
            (slimmable networks, arXiv 1903.05134); `"uniform"` and `"weighted"`: rows of the frontier with equal
            or given probabilities; `"random"`: every layer's sizes, and the global ones, drawn independently.
        count: How many; a sandwich needs at least 2.
        seed: Of the run.
        step: Optimizer steps that were made.
        weights: For `"weighted"`: one for every row of the frontier, largest row first.
    """
    generator = random.Random(f"{seed}/{step}")  # hashed the same way everywhere
    rows = [Draw(row["name"], config.resolve(row["subnetwork"])) for row in config.frontier if row["subnetwork"]]
    if sampler == "sandwich":
        between = rows[1:-1] or [Draw("random", random_subnetwork(config, generator))]
        drawn = [rows[0], *generator.choices(between, k=max(0, count - 2)), rows[-1]]
    elif sampler == "uniform":
        drawn = generator.choices(rows, k=count)
    elif sampler == "weighted":
        check_weights(config, weights)
        drawn = generator.choices(rows, weights, k=count)
    else:
        drawn = [Draw("random", random_subnetwork(config, generator)) for _ in range(count)]
    order = {draw.name: i for i, draw in enumerate(rows)}
    return sorted(drawn, key=lambda draw: order.get(draw.name, 1))


def check_weights(config: FlextronConfig, weights: list[float] | None) -> None:
    """Refuse weights that do not fit the frontier.

    Raises:
        ValueError: not one non-negative weight for every row, or all zero.
    """
    rows = sum(row["subnetwork"] is not None for row in config.frontier)
    if weights is None or len(weights) != rows or min(weights) < 0 or sum(weights) <= 0:
        rule = f"The sampler 'weighted' needs one weight of at least 0 for each of the {rows} rows of the frontier."
        raise invalid("sampling_weights", weights, rule, "Pass them largest row first.")
