"""Sub-networks whose layers differ, found by evaluating real slices: the baseline for every learned router.

A sub-network is a choice of `hidden` and `depth` and of `mlp` and `heads` in each layer. `fill` makes any choice use
a budget: it is never above it, and nothing more fits in. `search` is a small evolutionary search over filled
choices, which starts at the best uniform ones.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig, SubNetwork, count_parameters
from modeling_flextron.errors import invalid, require_int
from modeling_flextron.subnetwork import uniform_subnetworks

Cost = Callable[[SubNetwork], float]
Loss = Callable[[SubNetwork], float]


@dataclass(frozen=True)
class Choices:
    """One choice on every axis: sizes for all layers of the model, of which the kept ones count."""

    hidden: int
    depth: int
    mlp: tuple[int, ...]
    heads: tuple[int, ...]

    def subnetwork(self, config: FlextronConfig) -> SubNetwork:
        """The sub-network that these choices make."""
        layers = config.kept_layers(self.depth)
        return SubNetwork(self.hidden, layers, tuple(self.mlp[i] for i in layers), tuple(self.heads[i] for i in layers))

    @classmethod
    def of(cls, config: FlextronConfig, subnetwork: SubNetwork) -> "Choices":
        """The choices that make a sub-network, within what each layer holds; dropped layers get a median."""
        at = {layer: i for i, layer in enumerate(subnetwork.layers)}
        built = config.built

        def spread(sizes: tuple[int, ...], limits: tuple[int, ...]) -> tuple[int, ...]:
            middle = sorted(sizes)[len(sizes) // 2]
            return tuple(min(sizes[at[i]] if i in at else middle, limit) for i, limit in enumerate(limits))

        mlp, heads = spread(subnetwork.mlp, built.mlp), spread(subnetwork.heads, built.heads)
        return cls(subnetwork.hidden, len(subnetwork.layers), mlp, heads)

    def steps(self, config: FlextronConfig, up: bool) -> Iterator["Choices"]:
        """Every choice that differs by one step up, or down, in one place that counts."""
        kept, built = config.kept_layers(self.depth), config.built
        for axis in ("hidden", "depth"):
            size = _next(config.choices(axis), getattr(self, axis), up)
            if size is not None:
                yield self._with(axis, size)
        for axis, limits in (("mlp", built.mlp), ("heads", built.heads)):
            sizes = getattr(self, axis)
            for layer in kept:
                size = _next(config.choices(axis), sizes[layer], up)
                if size is not None and size <= limits[layer]:
                    yield self._with(axis, (*sizes[:layer], size, *sizes[layer + 1 :]))

    def _with(self, axis: str, value: Any) -> "Choices":
        changes: dict[str, Any] = {axis: value}
        return replace(self, **changes)


def _next(choices: Sequence[int], size: int, up: bool) -> int | None:
    """The next larger, or smaller, choice."""
    i = choices.index(size) + (-1 if up else 1)
    return choices[i] if 0 <= i < len(choices) else None


def non_embedding(config: FlextronConfig) -> Cost:
    """The cost that fractional budgets refer to."""
    return lambda subnetwork: count_parameters(config, subnetwork, embeddings=False)


def fill(config: FlextronConfig, choices: Choices, cost: Cost, limit: float, generator: random.Random) -> Choices:
    """Lower random choices until `limit` is kept, then raise random ones while it is.

    Raises:
        ValueError: the smallest choices cost more than the limit.
    """
    while cost(choices.subnetwork(config)) > limit:
        lower = list(choices.steps(config, up=False))
        if not lower:
            rule = f"The smallest sub-network costs {cost(choices.subnetwork(config)):.4g}."
            raise invalid("budget", limit, rule, "Ask for at least that much, or allow smaller sizes.")
        choices = generator.choice(lower)
    higher = list(choices.steps(config, up=True))
    while higher:
        candidate = higher.pop(generator.randrange(len(higher)))
        if cost(candidate.subnetwork(config)) <= limit:
            choices, higher = candidate, list(candidate.steps(config, up=True))
    return choices


def search(
    config: FlextronConfig,
    loss: Loss,
    limit: float,
    *,
    cost: Cost | None = None,
    evaluations: int = 256,
    parents: int = 12,
    seed: int = 0,
    description: str = "Searching",
) -> tuple[SubNetwork, float]:
    """The best sub-network within a budget that an evolutionary search finds.

    Args:
        config: Of the elastic model.
        loss: What to minimise, usually the mean loss on a few batches.
        limit: What the sub-network may cost.
        cost: Non-embedding parameters by default; anything that grows with every size, such as predicted seconds.
        evaluations: How often `loss` is asked.
        parents: Best networks so far from which the next one is made.
        seed: Of everything random.
        description: Title of the progress bar.

    Returns:
        The sub-network and its loss.

    Raises:
        ValueError: no sub-network costs so little.
    """
    require_int("evaluations", evaluations)
    require_int("parents", parents)
    cost, generator = cost or non_embedding(config), random.Random(seed)
    known: dict[SubNetwork, tuple[float, Choices]] = {}
    uniform = [s for s in uniform_subnetworks(config) if cost(s) <= limit]
    uniform.sort(key=cost, reverse=True)
    start = []
    for subnetwork in uniform[: max(1, evaluations // 16)]:  # as it is, and with the rest of the budget
        start.append(Choices.of(config, subnetwork))
        start.append(fill(config, start[-1], cost, limit, generator))
    with tqdm(total=evaluations, desc=description, unit="sub-network") as bar:
        for attempt in range(20 * evaluations):
            if len(known) == evaluations:
                break
            if attempt < len(start):
                choices = start[attempt]
            elif not known or generator.random() < 0.05:
                choices = fill(config, _random(config, generator), cost, limit, generator)
            else:
                best = sorted(known.values(), key=lambda entry: entry[0])[:parents]
                choices = fill(config, _child([entry[1] for entry in best], config, generator), cost, limit, generator)
            subnetwork = choices.subnetwork(config)
            if subnetwork not in known:
                known[subnetwork] = loss(subnetwork), choices
                bar.update()
    best_one = min(known, key=lambda s: known[s][0])
    return best_one, known[best_one][0]


def _random(config: FlextronConfig, generator: random.Random) -> Choices:
    built = config.built
    sizes = {
        axis: tuple(generator.choice([size for size in config.choices(axis) if size <= limit]) for limit in limits)
        for axis, limits in (("mlp", built.mlp), ("heads", built.heads))
    }
    return Choices(generator.choice(config.choices("hidden")), generator.choice(config.choices("depth")), **sizes)


def _child(parents: list[Choices], config: FlextronConfig, generator: random.Random) -> Choices:
    """A parent, or a mixture of two, with a few places lowered so that others can be raised."""
    child = generator.choice(parents)
    if generator.random() < 0.3:
        other = generator.choice(parents)
        mixed: dict[str, Any] = {
            axis: tuple(generator.choice(pair) for pair in zip(getattr(child, axis), getattr(other, axis), strict=True))
            for axis in ("mlp", "heads")
        }
        child = replace(child, **mixed)
    for _ in range(generator.choice((1, 1, 2, 4))):
        lower = list(child.steps(config, up=False))
        child = generator.choice(lower) if lower else child
    return child
