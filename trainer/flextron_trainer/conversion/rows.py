"""Chooses the sub-networks that are recommended: the rows of the frontier, one for each budget."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig, FlextronForCausalLM, SubNetwork, count_parameters
from modeling_flextron.budgets import TOLERANCE, budget_of_name, cost_of, parse_budget
from modeling_flextron.errors import invalid
from modeling_flextron.extraction import misfit
from modeling_flextron.frontier import FrontierRow
from modeling_flextron.subnetwork import (
    AXES,
    Cost,
    bytes_per_value,
    flops_per_token,
    parameters_of,
    smallest_subnetwork,
    uniform_subnetworks,
)

from ..evaluation.quality import quality
from ..layerwise import Walk, portions_of
from ..losses import RowScores
from .moments import MOMENT_TOKENS
from .search import search

_UNITS = {"parameters": "parameters", "memory": "bytes with its KV cache"}
USED = 0.95  # of a budget: what a row saves beyond that is lost before any training
ROW_SAMPLES = 64  # of the calibration, on which losses of rows are measured
LOSS_CHUNK = 128  # tokens whose logits exist at the same time
TRIED = 16  # sub-networks of a budget of which losses are measured


def named_budgets(config: FlextronConfig, budgets: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Budgets under the names of their rows.

    Raises:
        ValueError: no budgets, names or kinds that rows cannot have, or, of rows without a name, a number or a size
            that nothing keeps. Of a fraction, and of what has a name, the smallest sub-network takes the place.
    """
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, (Sequence, Mapping)) or not budgets:
        rule = "They are a list of budgets, or names mapped to budgets."
        raise invalid("budgets", budgets, rule, "Pass for instance budgets=[1, 0.5].")
    if unnamed := not isinstance(budgets, Mapping):
        budgets = {f"{budget:g}" if isinstance(budget, float) else str(budget): budget for budget in budgets}
    else:
        for name in budgets:
            named = budget_of_name(name) if isinstance(name, str) else None
            if named is None or (named.kind != "name" and named != parse_budget(budgets[name])):
                rule = "The name of a row is not another budget than its own."
                raise invalid("budgets", name, rule, "Begin it with a letter, such as 'small'.")
    for name, budget in budgets.items():
        if parse_budget(budget).kind not in ("fraction", "parameters", "memory"):
            rule = "A row of the frontier has a budget of parameters or memory."
            raise invalid(f"budgets[{name!r}]", budget, rule, "Pass a fraction, a count or a size in bytes.")
        cost, limit = limit_of(config, budget)
        least = cost(smallest_subnetwork(config))
        if unnamed and least > limit and parse_budget(budget).kind != "fraction":
            rule = f"The smallest sub-network costs {least:,} {_UNITS[parse_budget(budget).kind]}."
            remedy = "Ask for at least that much, allow smaller sizes, or write a fraction: 0.5 is 50 %."
            raise invalid(f"budgets[{name!r}]", budget, rule, remedy)
    return dict(budgets)


def choose_rows(
    config: FlextronConfig,
    budgets: dict[str, Any],
    loss: Callable[[SubNetwork], float] | None,
    nested: bool = True,
    corrections: float = 0.0,
) -> list[FrontierRow]:
    """The full network, called "1" where no budget means it, and one uniform sub-network for each budget.

    The rows are chosen together. Those go first that a stock class can hold as they are. Of these each uses at least
    95 % of its budget wherever the choices have such networks that nest, so that a model loaded at one row can go down
    to all smaller ones; a row that cannot is named in a warning. Among what is left the rows with the lowest sum of
    losses are taken, and without losses the largest.

    Args:
        budgets: Name of a row -> its budget; see `named_budgets`.
        loss: Of a sub-network, on text.
        nested: False chooses each row by itself.
        corrections: As in `limit_of`.
    """
    uniform = uniform_subnetworks(config)
    limits = limits_of(config, budgets, corrections)
    uses = []
    for cost, limit in limits.values():
        fitting = [s for s in uniform if cost(s) <= limit] or [min(uniform, key=cost)]
        uses.append({s: cost(s) / limit for s in fitting})
    return named_rows(
        config, budgets, limits, _together(uses, cache(lambda s: misfit(config, s) is not None), loss, nested)
    )


def named_rows(
    config: FlextronConfig,
    budgets: Mapping[str, Any],
    limits: Mapping[str, tuple[Cost, float]],
    chosen: Iterable[SubNetwork],
) -> list[FrontierRow]:
    """The rows that were chosen, and the full network, called "1", before them where no budget means it.

    A warning tells of a budget that is not reached, that is hardly used, or that brings nothing new and is left out.

    Args:
        budgets: Name of a row -> its budget; see `named_budgets`.
        limits: Of `limits_of`.
        chosen: One sub-network for each of these.
    """
    rows: list[FrontierRow] = []
    for (name, (cost, limit)), best in zip(limits.items(), chosen, strict=True):
        use = cost(best) / limit
        if use > TOLERANCE:
            name = _name_of_smallest(config, name, budgets[name], best)
        if any(best == row.subnetwork for row in rows):
            warnings.warn(
                f"Budget {name!r} would be the same sub-network as a larger one and is left out.", stacklevel=4
            )
            continue
        if use < USED and best != config.built:
            _warn_of_unused(config, name, use)
        rows.append(config.row(name, best))
    return rows if rows[0].subnetwork == config.built else [config.row("1", config.built), *rows]


def search_rows(
    config: FlextronConfig,
    rows: Sequence[FrontierRow],
    budgets: Mapping[str, Any],
    loss: Callable[[SubNetwork], float],
    evaluations: int,
    seed: int,
    corrections: float,
) -> list[FrontierRow]:
    """The rows, or what a search within their budgets finds that is better: its layers differ, and it need not nest.

    Args:
        rows: Of `choose_rows`, at which the searches start; the full network stays.
        budgets: Those of `choose_rows`. A row that is called otherwise, as its budget cannot be reached, stays.
        loss: Of a sub-network, on text.
        evaluations: How many losses each search asks for.
        seed: Of the searches.
        corrections: As in `limit_of`.
    """
    found = []
    for row in rows:
        best = row.subnetwork
        assert best is not None
        if row.name in budgets and best != config.built:
            cost, limit = limit_of(config, budgets[row.name], corrections)
            if cost(best) <= limit:
                other, value = search(
                    config, loss, limit, cost=cost, start=best, evaluations=evaluations, seed=seed,
                    description=f"Searching {row.name}",
                )  # fmt: skip
                best = other if value < loss(best) else best
        found.append(row if best == row.subnetwork else config.row(row.name, best))
    return found


def _together(
    uses: list[dict[SubNetwork, float]],
    odd: Callable[[SubNetwork], bool],
    loss: Callable[[SubNetwork], float] | None,
    nested: bool,
) -> list[SubNetwork]:
    """One sub-network for every budget, the largest budget first, as `choose_rows` says.

    Args:
        uses: Of every budget, what keeps it -> the share of it that this costs.
        odd: Whether no stock class holds it.
        loss, nested: as in `choose_rows`.
    """

    def price(row: int, s: SubNetwork) -> tuple[float, ...]:
        # Squared: two rows that are a little small go before one that is far too small.
        return odd(s), max(0.0, USED - uses[row][s]) ** 2, -uses[row][s]

    # Of thousands a few, and often enough.
    full = [[s for s in use if use[s] >= USED and not odd(s)] for use in uses]
    first = _chain(full, price, nested) or _chain([list(use) for use in uses], price, nested)
    if first is None:  # budgets of several kinds: what keeps a larger one in bytes may not hold a smaller one
        return _together(uses, odd, loss, nested=False)
    if loss is None:
        return first
    good = [
        [s for s in use if use[s] >= min(USED, use[best]) and (odd(best) or not odd(s))]
        for best, use in zip(first, uses, strict=True)
    ]
    if nested:  # what has something around it in the row before, and then something inside it in the row behind
        for i in range(1, len(good)):
            good[i] = [s for s in good[i] if any(_inside(s, outer) for outer in good[i - 1])]
        for i in reversed(range(len(good) - 1)):
            good[i] = [s for s in good[i] if any(_inside(inner, s) for inner in good[i + 1])]
    few = []
    for largest, row, use in zip(first, good, uses, strict=True):
        others = [s for s in row if s != largest and not any(t != s and _inside(s, t) for t in row)]
        few.append([largest, *sorted(others, key=lambda s: -use[s])[: TRIED - 1]])
    undecided = dict.fromkeys(s for row in few if len(row) > 1 for s in row)
    losses = {s: loss(s) for s in tqdm(undecided, desc="Choosing rows", unit="sub-network")}
    return _chain(few, lambda _, s: (losses.get(s, 0.0),), nested) or first


def _inside(inner: SubNetwork, outer: SubNetwork) -> bool:
    """`outer.contains(inner)` of two uniform ones, of which many pairs are compared."""
    sizes = ((s.hidden, len(s.layers), s.mlp[0], s.heads[0]) for s in (inner, outer))
    return all(small <= large for small, large in zip(*sizes, strict=True))


def _chain(
    options: list[list[SubNetwork]], price: Callable[[int, SubNetwork], tuple[float, ...]], nested: bool
) -> list[SubNetwork] | None:
    """One option of every row, each inside the one before when they must be `nested`, with the least sum of prices.

    Returns:
        The chain, or None where there is none.
    """
    best: dict[SubNetwork, tuple[tuple[float, ...], list[SubNetwork]]] = {}
    for row, candidates in enumerate(options):
        following = {}
        for s in candidates:
            before = [entry for outer, entry in best.items() if not nested or _inside(s, outer)] if row else [((), [])]
            if before:
                total, chain = min(before, key=lambda entry: entry[0])
                own = price(row, s)
                total = tuple(a + b for a, b in zip(total or (0.0,) * len(own), own, strict=True))
                following[s] = (total, [*chain, s])
        best = following
    return min(best.values(), key=lambda entry: entry[0])[1] if best else None


def _name_of_smallest(config: FlextronConfig, name: str, budget: Any, smallest: SubNetwork) -> str:
    """Name a row whose budget cannot be reached: its own name, or the fraction that it costs, rounded up."""
    fraction = count_parameters(config, smallest, embeddings=False) / config.parent_size()
    warnings.warn(
        f"The choices do not reach budget {budget!r}: the smallest sub-network costs {fraction:.4g} of the parent's"
        " non-embedding parameters and takes its place. Allow smaller sizes on some axis to reach it.",
        stacklevel=5,
    )
    return name if name != str(budget) else f"{math.ceil(fraction * 1000) / 1000:g}"


def _warn_of_unused(config: FlextronConfig, name: str, use: float) -> None:
    """Say that a row is much smaller than its budget, and which sizes would help."""
    gaps = {
        (larger / smaller, axis, larger, smaller)
        for axis in AXES
        for larger, smaller in pairwise(config.choices(axis))
        if larger - smaller > 1
    }
    hint = "on some axis"
    if gaps:
        _, axis, larger, smaller = max(gaps)
        hint = f"of `{axis}` between {larger} and {smaller}"
    warnings.warn(
        f"Row {name!r} uses {use:.0%} of its budget: no allowed sizes nearer to it nest in the larger rows. Allow more"
        f" sizes, for instance {hint}, or choose each row by itself (`nested=False`).",
        stacklevel=5,
    )


def limits_of(
    config: FlextronConfig, budgets: Mapping[str, Any], corrections: float = 0.0
) -> dict[str, tuple[Cost, float]]:
    """`limit_of` every budget, the largest first."""
    limits = {name: limit_of(config, budget, corrections) for name, budget in budgets.items()}
    return dict(sorted(limits.items(), key=lambda item: -item[1][1] / item[1][0](config.built)))


def limit_of(config: FlextronConfig, budget: Any, corrections: float = 0.0) -> tuple[Cost, float]:
    """Read a budget: the cost that it limits, and the limit.

    Args:
        budget: Of parameters or memory.
        corrections: Part of its non-embedding parameters that a row may own besides, which counts in its cost. Of the
            full network, which owns nothing, only what it is.
    """
    parsed = parse_budget(budget)
    limit = parsed.value * (config.parent_size() if parsed.kind == "fraction" else 1)
    cost = cost_of(config, parsed.kind, budget)
    if corrections and cost(config.built) > limit:
        size = bytes_per_value(config.dtype) if parsed.kind == "memory" else 1
        cost += parameters_of(config, embeddings=False) * (corrections * size)
    return cost, limit


@torch.no_grad()
def mean_loss(model: FlextronForCausalLM, subnetwork: SubNetwork, batches: Sequence[torch.Tensor]) -> float:
    """Mean next-token loss in nats over batches of ids `[B, S]`, run layer by layer."""
    found = []
    for part in portions_of(batches, MOMENT_TOKENS):
        for ids, states in zip(part, Walk(model, subnetwork).all(part), strict=True):
            scores = RowScores(ids, LOSS_CHUNK)
            scores(states, model.lm_head)
            assert scores.rows is not None
            found.append(scores.rows.cpu())
    return quality(torch.cat(found))["loss"]


class TextLoss:
    """The loss of sub-networks on one text: each is measured once, and what that took is counted.

    Args:
        model: The elastic model, whose weights stay as they are from now on.
        batches: Of ids `[B, S]`.
        known: Losses on the same text that were measured before.
    """

    def __init__(
        self,
        model: FlextronForCausalLM,
        batches: Sequence[torch.Tensor],
        known: Mapping[SubNetwork, float] = MappingProxyType({}),
    ):
        self.model, self.batches, self.known = model, batches, dict(known)
        self.measured: list[SubNetwork] = []

    def __call__(self, subnetwork: SubNetwork) -> float:
        if subnetwork not in self.known:
            self.known[subnetwork] = mean_loss(self.model, subnetwork, self.batches)
            self.measured.append(subnetwork)
        return self.known[subnetwork]

    def effort(self) -> dict[str, int]:
        """Count the `evaluations` that were made here, the `tokens` that they read, and the `full_size_tokens` that the
        full network reads with as many floating-point operations."""
        config, tokens = self.model.config, sum(batch.numel() for batch in self.batches)
        length = max(batch.shape[1] for batch in self.batches)
        work = [flops_per_token(config, each, length // 2) for each in (*self.measured, self.model.built)]
        return {
            "evaluations": len(self.measured),
            "tokens": tokens * len(self.measured),
            "full_size_tokens": round(tokens * sum(work[:-1]) / work[-1]),
        }
