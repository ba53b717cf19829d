"""Which sub-networks are recommended: the rows of the frontier, one for each budget."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig, FlextronForCausalLM, SubNetwork, count_parameters
from modeling_flextron.errors import invalid
from modeling_flextron.extraction import misfit
from modeling_flextron.subnetwork import (
    TOLERANCE,
    Cost,
    budget_of_name,
    cost_of,
    parse_budget,
    smallest_subnetwork,
    uniform_subnetworks,
)

from .search import search

_UNITS = {"parameters": "parameters", "memory": "bytes with its KV cache"}
LEAST_OF_A_BUDGET = 0.9  # of what the largest uses: what is saved beyond that would be lost before any training


def named_budgets(config: FlextronConfig, budgets: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Budgets under the names of their rows.

    Raises:
        ValueError: no budgets, names or kinds that rows cannot have, or, of rows without a name, a number or a size
            that nothing keeps. Of a fraction, and of what has a name, the smallest sub-network takes the place.
    """
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, (Sequence, Mapping)) or not budgets:
        rule = "They are a list of budgets, or names mapped to budgets."
        raise invalid("budgets", budgets, rule, "Pass for instance budgets=[1, 0.5].")
    unnamed = not isinstance(budgets, Mapping)
    if not isinstance(budgets, Mapping):
        budgets = {f"{budget:g}" if isinstance(budget, float) else str(budget): budget for budget in budgets}
    else:
        for name in budgets:
            named = budget_of_name(name) if isinstance(name, str) else None
            if named is None or named.kind != "name":
                rule = "The name of a row is not a budget of another kind."
                raise invalid("budgets", name, rule, "Begin it with a letter, such as 'small'.")
    for name, budget in budgets.items():
        if parse_budget(budget).kind not in ("fraction", "parameters", "memory"):
            rule = "A row of the frontier has a budget of parameters or memory."
            raise invalid(f"budgets[{name!r}]", budget, rule, "Pass a fraction, a count or a size in bytes.")
        cost, limit = _limit(config, budget)
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
    evaluations: int = 0,
    seed: int = 0,
) -> list[dict]:
    """The full network, called "1" where no budget means it, and for each budget the best uniform sub-network within
    it and within the next larger row.

    Those that a stock class can hold as they are go before the others. "Best" is the lowest `loss` of those that use
    most of the budget, whichever axes they cut; without losses, the largest. Rows nest, so that a model loaded at one
    can go down to all smaller ones. With `evaluations`, a search that asks for so many losses for each budget takes
    the place of the best uniform one: its layers differ, and its rows need not nest.
    """
    rows, inside = list[dict](), config.built
    uniform = uniform_subnetworks(config)
    limits = {name: _limit(config, budget) for name, budget in budgets.items()}
    for name, (cost, limit) in sorted(limits.items(), key=lambda item: -item[1][1] / item[1][0](config.built)):
        allowed = [s for s in uniform if inside.contains(s)]
        fitting = [s for s in allowed if cost(s) <= limit]
        fitting = [s for s in fitting if misfit(config, s) is None] or fitting
        if not fitting:
            fitting = [min(allowed, key=cost)]
            if cost(fitting[0]) > TOLERANCE * limit:
                name = _name_of_smallest(config, name, budgets[name], fitting[0])
        largest = [s for s in fitting if not any(t != s and t.contains(s) for t in fitting)]
        largest.sort(key=lambda s: count_parameters(config, s), reverse=True)
        best = largest[0]
        least = LEAST_OF_A_BUDGET * count_parameters(config, best, embeddings=False)
        largest = [s for s in largest if count_parameters(config, s, embeddings=False) >= least]
        if loss is not None and len(largest) > 1:
            losses = {s: loss(s) for s in tqdm(largest[:16], desc=f"Budget {name}")}
            best = min(losses, key=lambda s: losses[s])
        inside = best
        if evaluations and loss is not None and best != config.built and cost(best) <= limit:
            options: dict[str, Any] = {"evaluations": evaluations, "seed": seed, "description": f"Searching {name}"}
            found, value = search(config, loss, limit, cost=cost, **options)
            best = found if value < loss(best) else best
        row = config.row(name, best)
        if any(row["subnetwork"] == other["subnetwork"] for other in rows):
            warnings.warn(
                f"Budget {name!r} would be the same sub-network as a larger one and is left out.", stacklevel=3
            )
            continue
        rows.append(row)
    full = config.row("1", config.built)
    return rows if rows[0]["subnetwork"] == full["subnetwork"] else [full, *rows]


def _name_of_smallest(config: FlextronConfig, name: str, budget: Any, smallest: SubNetwork) -> str:
    """What a row is called whose budget cannot be reached: its own name, or the fraction that it costs, rounded up."""
    fraction = count_parameters(config, smallest, embeddings=False) / config.parent_size()
    warnings.warn(
        f"The choices do not reach budget {budget!r}: the smallest sub-network costs {fraction:.4g} of the parent's"
        " non-embedding parameters and takes its place. Allow smaller sizes on some axis to reach it.",
        stacklevel=4,
    )
    return name if name != str(budget) else f"{math.ceil(fraction * 1000) / 1000:g}"


def _limit(config: FlextronConfig, budget: Any) -> tuple[Cost, float]:
    """What a budget counts, and how much of it there may be."""
    parsed = parse_budget(budget)
    whole = config.parent_size() if parsed.kind == "fraction" else 1
    return cost_of(config, parsed.kind, budget), parsed.value * whole


@torch.no_grad()
def mean_loss(model: FlextronForCausalLM, subnetwork: SubNetwork, batches: list[torch.Tensor]) -> float:
    """Mean next-token loss in nats over batches of ids `[B, S]`."""
    losses = [
        model(ids.to(model.device), labels=ids.to(model.device), use_cache=False, flextron_budget=subnetwork).loss
        for ids in batches
    ]
    return torch.stack(losses).mean().item()
