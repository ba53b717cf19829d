"""Static routers: from a budget to a size in every place of the network.

A place is `hidden`, `depth`, or `mlp` or `heads` of one layer. A router in `config.json` holds a score for every size
that may stand in a place, at a few budgets, and interpolates between them. What the scores prefer is brought within the
budget on integers. How scores are learned: `flextron_trainer/routers/`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

from .errors import invalid, is_number
from .subnetwork import AXES, Cost, Shape, SubNetwork

CLOSE = 0.98  # a sub-network that uses so much of a budget uses it
FIELDS = ("budgets", "hidden", "depth", "mlp", "heads")


@dataclass(frozen=True)
class Candidate:
    """A size in every place: for all layers of the model, of which the kept ones count."""

    hidden: int
    depth: int
    mlp: tuple[int, ...]
    heads: tuple[int, ...]

    def subnetwork(self, config: Shape) -> SubNetwork:
        """The sub-network that these sizes make."""
        layers = config.kept_layers(self.depth)
        return SubNetwork(self.hidden, layers, tuple(self.mlp[i] for i in layers), tuple(self.heads[i] for i in layers))

    def steps(self, config: Shape, up: bool, uniform: bool = False) -> Iterator["Step"]:
        """Every step up, or down, to the next choice in one place that counts, that the weights hold.

        With `uniform` all layers take a step together.
        """
        kept, built = config.kept_layers(self.depth), config.built
        for axis, limits in (("mlp", built.mlp), ("heads", built.heads)):
            sizes, allowed = getattr(self, axis), config.choices(axis)
            for layer, together in [(None, kept)] if uniform else [(layer, (layer,)) for layer in kept]:
                size = _next(allowed, sizes[together[0]], up)
                if size is not None and all(size <= limits[one] for one in together):
                    yield Step(axis, layer, size)
        for axis in ("hidden", "depth"):
            size = _next(config.choices(axis), getattr(self, axis), up)
            if size is not None:
                step = Step(axis, None, size)
                if built.contains(self.after(step).subnetwork(config)):
                    yield step

    def after(self, step: "Step") -> "Candidate":
        """The candidate with one step made."""
        value: Any = step.size
        if step.axis in ("mlp", "heads"):
            sizes, i = getattr(self, step.axis), step.layer
            value = (step.size,) * len(sizes) if i is None else (*sizes[:i], step.size, *sizes[i + 1 :])
        return replace(self, **{step.axis: value})


class Step(NamedTuple):
    """A change to `size` on an axis; of one layer, or of all where `layer` is None."""

    axis: str
    layer: int | None
    size: int


Pick = Callable[[Candidate, list[tuple[Step, float]]], Step]


def _next(choices: Sequence[int], size: int, up: bool) -> int | None:
    """The next larger, or smaller, choice."""
    i = choices.index(size) + (-1 if up else 1)
    return choices[i] if 0 <= i < len(choices) else None


def repaired(
    config: Shape, candidate: Candidate, cost: Cost, limit: float, pick: Pick, uniform: bool = False,
    axes: Sequence[str] = AXES,
) -> Candidate:  # fmt: skip
    """A candidate nearby that costs at most `limit`, with nothing more that fits in: steps down while needed, then up.

    Args:
        pick: Called with the candidate and the possible steps, each with the change of the cost; returns one.
        uniform: Keep all layers equal.
        axes: Where steps may be made.

    Raises:
        ValueError: the smallest choices cost more than the limit.
    """
    now = cost(candidate.subnetwork(config))

    def change(step: Step) -> float:
        if step.layer is None:
            return cost(candidate.after(step).subnetwork(config)) - now
        sizes = {"mlp": candidate.mlp[step.layer], "heads": candidate.heads[step.layer]}
        after = {**sizes, step.axis: step.size}
        more = cost.at(step.layer, candidate.hidden, after["mlp"], after["heads"])
        return more - cost.at(step.layer, candidate.hidden, sizes["mlp"], sizes["heads"])

    for up in (False, True):
        while up or now > limit:
            steps = [(step, change(step)) for step in candidate.steps(config, up, uniform) if step.axis in axes]
            if up:
                steps = [(step, more) for step, more in steps if now + more <= limit]
            if not steps and up:
                break
            if not steps:
                rule = f"The smallest sub-network costs {now:.4g}."
                raise invalid("flextron_budget", limit, rule, "Ask for at least that much, or allow smaller sizes.")
            candidate = candidate.after(pick(candidate, steps))
            now = cost(candidate.subnetwork(config))  # not added up: it must be exact
    return candidate


class StaticRouter:
    """The scores in a config, and what they choose.

    Args:
        config: The `FlextronConfig` of the model.
        stored: `budgets`, ascending fractions of the full cost; and for each of them scores of the choices, in the
            order of the config: `hidden` and `depth` `[budgets][sizes]`, `mlp` and `heads`
            `[budgets][layers][sizes]`. Layers without differences in all scores are a uniform router.
    """

    def __init__(self, config: Shape, stored: dict[str, Any]):
        self.config, self.stored = config, stored
        per_layer = [layers for axis in ("mlp", "heads") for layers in stored[axis]]
        self.uniform = all(layer == layers[0] for layers in per_layer for layer in layers)

    def scores(self, budget: float) -> dict[str, Any]:
        """The scores at a budget, interpolated between the neighbouring ones."""
        budgets = self.stored["budgets"]
        upper = min(max(bisect_right(budgets, budget), 1), len(budgets) - 1)
        low, high = budgets[upper - 1], budgets[upper]
        weight = min(max((budget - low) / (high - low), 0.0), 1.0)
        return {axis: _mix(self.stored[axis][upper - 1], self.stored[axis][upper], weight) for axis in FIELDS[1:]}

    def preferred(self, scores: dict[str, Any], **given: int) -> Candidate:
        """The candidate with the highest scores that the weights hold.

        Args:
            scores: As `scores()` returns them.
            given: A `hidden` size and a `depth` that are chosen already.
        """
        config, built = self.config, self.config.built

        def best(axis: str, scores: list[float], limit: int) -> int:
            return max(
                (size for size in config.choices(axis) if size <= limit),
                key=lambda size: scores[config.choices(axis).index(size)],
            )

        hidden = given.get("hidden") or best("hidden", scores["hidden"], built.hidden)
        depth = given.get("depth") or best("depth", scores["depth"], len(built.layers))
        kept = config.kept_layers(depth)

        def each(axis: str, limits: tuple[int, ...]) -> tuple[int, ...]:
            if self.uniform:  # what all kept layers hold; the others do not count
                limits = (min(limits[layer] for layer in kept),) * len(limits)
            return tuple(best(axis, layer, limit) for layer, limit in zip(scores[axis], limits, strict=True))

        return Candidate(hidden, depth, each("mlp", built.mlp), each("heads", built.heads))

    def choose(self, cost: Cost, limit: float) -> SubNetwork:
        """The sub-network for a cost of at most `limit`: never above it, and nothing more fits into its layers.

        The scores are read where they prefer a network that costs about as much. Steps of the hidden size and of the
        depth are large, so every pair of them is filled up, and of those that use the limit the best one counts.

        Raises:
            ValueError: the smallest choices cost more than the limit.
        """
        config = self.config
        low, high = self.stored["budgets"][0], self.stored["budgets"][-1]
        grid = [self.scores(low + (high - low) * i / 32) for i in range(33)]
        scores = min(grid, key=lambda one: abs(cost(self.preferred(one).subnetwork(config)) - limit))
        order = {axis: {size: i for i, size in enumerate(config.choices(axis))} for axis in FIELDS[1:]}

        def score(axis: str, layer: int, size: int) -> float:
            return scores[axis][layer][order[axis][size]]

        def best(candidate: Candidate, steps: list[tuple[Step, float]]) -> Step:
            """Down where it matters least for what it saves, up where it matters most for what it costs."""

            def worth(entry: tuple[Step, float]) -> float:
                (axis, layer, size), change = entry
                at = layer or 0  # of a uniform router all layers have the same scores
                return (score(axis, at, size) - score(axis, at, getattr(candidate, axis)[at])) / max(abs(change), 1e-12)

            return max(steps, key=worth)[0]

        def regret(candidate: Candidate) -> float:
            """How far below the best scores these are, on average over the layers that are kept."""
            kept = config.kept_layers(candidate.depth)
            total = sum(
                max(scores[axis][layer]) - score(axis, layer, getattr(candidate, axis)[layer])
                for axis in ("mlp", "heads")
                for layer in kept
            )
            globally = sum(
                max(scores[axis]) - scores[axis][order[axis][getattr(candidate, axis)]] for axis in ("hidden", "depth")
            )
            return globally + total * config.num_hidden_layers / len(kept)

        filled = []
        for hidden, depth in product(config.choices("hidden"), config.choices("depth")):
            start = self.preferred(scores, hidden=hidden, depth=depth)
            try:
                filled.append(repaired(config, start, cost, limit, best, self.uniform, ("mlp", "heads")))
            except ValueError:  # too large, whatever the layers have
                continue
        if not filled:  # even the smallest sizes cost more, which this says
            begin = self.preferred(scores)
            return repaired(config, begin, cost, limit, lambda _, steps: steps[0][0]).subnetwork(config)
        costs = {candidate: cost(candidate.subnetwork(config)) for candidate in filled}
        using = [candidate for candidate in filled if costs[candidate] >= CLOSE * max(costs.values())]
        return min(using, key=regret).subnetwork(config)


def _mix(low: list, high: list, weight: float) -> list:
    if isinstance(low, list):
        return [_mix(a, b, weight) for a, b in zip(low, high, strict=True)]
    return (1 - weight) * low + weight * high


def check_static_router(config: Shape, stored: Any) -> None:
    """Refuse a stored router that does not fit the choices of a config."""
    remedy = "Learn it with `stage='router'`, or pass None for no router."
    if not isinstance(stored, dict) or set(stored) != set(FIELDS):
        raise invalid("static_router", stored, f"It has the fields {', '.join(FIELDS)}.", remedy)
    budgets = stored["budgets"]
    if not _are_finite(budgets, len(budgets) if isinstance(budgets, list) else 0) or len(budgets) < 2:
        raise invalid("static_router['budgets']", budgets, "They are at least two numbers.", remedy)
    if any(high <= low for low, high in pairwise(budgets)) or budgets[0] <= 0 or budgets[-1] > 1:
        raise invalid("static_router['budgets']", budgets, "They ascend between 0 and 1.", remedy)
    layers = config.num_hidden_layers
    for axis in FIELDS[1:]:
        sizes, rows = len(config.choices(axis)), stored[axis]
        valid = isinstance(rows, list) and len(rows) == len(budgets)
        if valid and axis in ("mlp", "heads"):
            valid = all(isinstance(row, list) and len(row) == layers for row in rows)
            rows = [layer for row in rows for layer in row] if valid else []
        if not valid or not all(_are_finite(row, sizes) for row in rows):
            rule = f"It has a finite score for each of the {sizes} choices, at every budget and in every layer."
            raise invalid(f"static_router[{axis!r}]", stored[axis], rule, remedy)


def _are_finite(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


def narrowed_router(stored: dict[str, Any], layers: Sequence[int], counts: dict[str, int]) -> dict[str, Any]:
    """The router of a model that holds only these layers, and on every axis the last so many choices."""
    result = {"budgets": stored["budgets"]}
    for axis in ("hidden", "depth"):
        result[axis] = [row[-counts[axis] :] for row in stored[axis]]
    for axis in ("mlp", "heads"):
        result[axis] = [[row[layer][-counts[axis] :] for layer in layers] for row in stored[axis]]
    return result
