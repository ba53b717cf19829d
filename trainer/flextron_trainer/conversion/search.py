"""Sub-networks whose layers differ, found by evaluating real slices: the baseline for every learned router.

A sub-network is a choice of `hidden` and `depth` and of `mlp` and `heads` in each layer. `fill` makes any choice use
a budget: it is never above it, and nothing more fits in. `search` is a small evolutionary search over filled
choices, which starts at the best uniform ones.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig, SubNetwork
from modeling_flextron.errors import require_int
from modeling_flextron.static_router import Candidate, repaired
from modeling_flextron.subnetwork import Cost, parameters_of, uniform_subnetworks

Loss = Callable[[SubNetwork], float]


def fill(
    config: FlextronConfig,
    candidate: Candidate,
    cost: Cost,
    limit: float,
    generator: random.Random,
    uniform: bool = False,
) -> Candidate:
    """Lower random choices until `limit` is kept, then raise random ones while it is.

    Raises:
        ValueError: the smallest choices cost more than the limit.
    """
    return repaired(config, candidate, cost, limit, lambda _, steps: generator.choice(steps)[0], uniform)


def search(
    config: FlextronConfig,
    loss: Loss,
    limit: float,
    *,
    cost: Cost | None = None,
    start: SubNetwork | None = None,
    evaluations: int = 256,
    parents: int = 12,
    seed: int = 0,
    description: str = "Searching",
) -> tuple[SubNetwork, float]:
    """The best sub-network within a budget that an evolutionary search finds.

    Args:
        loss: What to minimise, usually the mean loss on a few batches.
        limit: What the sub-network may cost.
        cost: Non-embedding parameters by default; anything that grows with every size, such as predicted seconds.
        start: Tried first, as it is and with the rest of the budget; the largest uniform ones come after it.
        evaluations: How often `loss` is asked.
        parents: Best networks so far from which the next one is made.
        description: Title of the progress bar.

    Returns:
        The sub-network and its loss.

    Raises:
        ValueError: no sub-network costs so little.
    """
    require_int("evaluations", evaluations)
    require_int("parents", parents)
    cost, generator = cost or parameters_of(config, embeddings=False), random.Random(seed)
    known: dict[SubNetwork, tuple[float, Candidate]] = {}
    uniform = [s for s in uniform_subnetworks(config) if cost(s) <= limit]
    uniform.sort(key=cost, reverse=True)
    first = []
    for subnetwork in [*filter(None, [start]), *uniform[: max(1, evaluations // 16)]]:
        first.append(candidate_of(config, subnetwork))
        first.append(fill(config, first[-1], cost, limit, generator))
    with tqdm(total=evaluations, desc=description, unit="sub-network") as bar:
        for attempt in range(20 * evaluations):
            if len(known) == evaluations:
                break
            if attempt < len(first):
                candidate = first[attempt]
            elif not known or generator.random() < 0.05:
                candidate = fill(config, random_candidate(config, generator), cost, limit, generator)
            else:
                best = sorted(known.values(), key=lambda entry: entry[0])[:parents]
                candidate = fill(
                    config, _child([entry[1] for entry in best], config, generator), cost, limit, generator
                )
            subnetwork = candidate.subnetwork(config)
            if subnetwork not in known:
                known[subnetwork] = loss(subnetwork), candidate
                bar.update()
    best_one = min(known, key=lambda s: known[s][0])
    return best_one, known[best_one][0]


def candidate_of(config: FlextronConfig, subnetwork: SubNetwork) -> Candidate:
    """The candidate that makes a sub-network, within what each layer holds; dropped layers get a median."""
    at = {layer: i for i, layer in enumerate(subnetwork.layers)}
    built = config.built

    def spread(sizes: tuple[int, ...], limits: tuple[int, ...]) -> tuple[int, ...]:
        middle = sorted(sizes)[len(sizes) // 2]
        return tuple(min(sizes[at[i]] if i in at else middle, limit) for i, limit in enumerate(limits))

    mlp, heads = spread(subnetwork.mlp, built.mlp), spread(subnetwork.heads, built.heads)
    return Candidate(subnetwork.hidden, len(subnetwork.layers), mlp, heads)


def random_candidate(config: FlextronConfig, generator: random.Random, uniform: bool = False) -> Candidate:
    """A candidate drawn independently in every place, or once for all layers."""
    built = config.built

    def pick(axis: str, limits: tuple[int, ...]) -> tuple[int, ...]:
        if uniform:
            return (generator.choice([size for size in config.choices(axis) if size <= min(limits)]),) * len(limits)
        return tuple(generator.choice([size for size in config.choices(axis) if size <= limit]) for limit in limits)

    hidden, depth = generator.choice(config.choices("hidden")), generator.choice(config.choices("depth"))
    return Candidate(hidden, depth, pick("mlp", built.mlp), pick("heads", built.heads))


def _child(parents: list[Candidate], config: FlextronConfig, generator: random.Random) -> Candidate:
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
        child = child.after(generator.choice(lower)) if lower else child
    return child
