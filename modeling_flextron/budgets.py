"""Budgets: what a user may ask for, and which sub-network that means.

A budget is what the user writes (`flextron_budget=0.5`, `"350M"`, `"6GiB"`, `"small"`, ...). `parse_budget` reads it
without any model; `resolve` finds the sub-network among the rows of the frontier, or asks the static router.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .corrections import Owner, parameters_beside
from .errors import invalid
from .frontier import FrontierRow
from .latency import HasTables, table_of
from .static_router import CLOSE, StaticRouter
from .subnetwork import (
    AXES,
    Cost,
    SubNetwork,
    bytes_per_value,
    is_routed,
    is_subnetwork,
    kv_cache_bytes,
    kv_values_per_token,
    memory_context,
    memory_of,
    parameters_of,
    smallest_subnetwork,
    subnetwork_of,
)
from .thinking import is_phased
from .token_routing import resolve_auto

TOLERANCE = 1.01  # of what a row may cost of the budget by which it is called: norms do not halve
SHARE = 0.8  # of the free memory that "fit" takes: activations, and what else runs there, need some too


class Family(HasTables, Protocol):
    """A config with everything that a budget may refer to."""

    elastic: dict[str, Any]
    frontier: list[FrontierRow]
    static_router: dict[str, Any] | None

    def owners(self) -> tuple[Owner, ...]:
        """The sub-networks with corrections of their own, smallest first."""


@dataclass(frozen=True)
class Budget:
    """A parsed budget: `kind` is one of the rows of the grammar, `value` its number, name or fields."""

    kind: str
    value: Any = None


_FORMS = (
    "Write a fraction in (0, 1] of the parent's non-embedding parameters, a number of parameters (`'350M'` or an"
    " int), memory (`'6GiB'`, `'fit'`), latency (`'25ms'`), quality (`'loss<=2.3'`, `'ppl<=10'`), the name of a row of"
    " the frontier, the fields of a SubNetwork, `'auto'` or `'auto:0.5'`."
)
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)\s*"
_UNITS: dict[str, tuple[str, float]] = {  # what follows a number -> kind of budget, and how much one is
    **{unit: ("parameters", 1000.0**n) for n, unit in enumerate("KMBT", start=1)},
    **{f"{unit}B": ("memory", 1000.0**n) for n, unit in enumerate("KMGT", start=1)},
    **{f"{unit}IB": ("memory", 1024.0**n) for n, unit in enumerate("KMGT", start=1)},
    **{unit: ("latency", seconds) for unit, seconds in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0))},
}


def parse_budget(value: Any) -> Budget:
    """Read a `flextron_budget` without looking at any model.

    Raises:
        ValueError: the value has no meaning in the grammar.
    """
    if value is None:
        return Budget("full")
    if is_phased(value):
        rule = "A size for thinking and one for the answer are those of one call of `generate`."
        raise invalid("flextron_budget", value, rule, "Pass them there, and one budget here.")
    if isinstance(value, dict) or is_subnetwork(value):
        return Budget("exact", value)
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, (list, tuple)):
        rule = "A list is not a budget: it has one for each sequence of a batch, in `forward` and `generate`."
        raise invalid("flextron_budget", value, rule, "Pass it to one of these, and here a single budget.")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid("flextron_budget", value, f"A {type(value).__name__} is not a budget.", _FORMS)
    if isinstance(value, int) and value > 1:
        return Budget("parameters", value)
    if not 0 < value <= 1:  # also NaN
        remedy = "Pass 0.5 for half of the parent, or an int (or a string such as `'350M'`) for a parameter count."
        raise invalid("flextron_budget", value, "A number is a fraction and must lie in (0, 1].", remedy)
    return Budget("fraction", float(value))


def _parse_text(text: str) -> Budget:
    stripped = text.strip()
    if match := re.fullmatch(_NUMBER, stripped):
        number = float(stripped)
        return parse_budget(int(number) if number > 1 and number.is_integer() else number)
    match = re.fullmatch(_NUMBER + r"([A-Za-z]+)", stripped)
    if match and (found := _UNITS.get(match[2]) or _UNITS.get(match[2].upper())):
        kind, unit = found
        return Budget(kind, _positive(text, float(match[1]) * unit))
    if match := re.fullmatch(r"(loss|ppl)\s*<=\s*" + _NUMBER, stripped, re.IGNORECASE):
        limit = _positive(text, float(match[2]))
        return Budget("loss", math.log(limit) if match[1].lower() == "ppl" else limit)
    if match := re.fullmatch(r"auto(?::" + _NUMBER + r")?", stripped):
        return Budget("auto", float(match[1]) if match[1] else None)
    if match := re.fullmatch(r"fit(?::" + _NUMBER + r")?", stripped):
        share = float(match[1]) if match[1] else SHARE
        if not 0 < share <= 1:
            raise invalid("flextron_budget", text, "The share of free memory lies in (0, 1].", "Pass 'fit:0.9'.")
        return Budget("fit", share)
    if not stripped or stripped[0] in "-+.<>=" or stripped[0].isdigit():
        raise invalid("flextron_budget", text, "The text is not a budget.", _FORMS)
    return Budget("name", stripped)


def budget_of_name(name: str) -> Budget | None:
    """Read the name of a row as a budget; None where the row cannot be reached by it, whatever its size."""
    try:
        parsed = parse_budget(name)
    except ValueError:
        return None
    reached = parsed.value == name if parsed.kind == "name" else parsed.kind in ("fraction", "parameters", "memory")
    return parsed if reached else None


def unreached(rows: list[FrontierRow], parent_size: int) -> list[FrontierRow]:
    """Rows that their names do not reach, because these are budgets which mean something else."""
    # Embeddings, context and dtype do not count: they change later.
    wholes, meanings, wrong = {"fraction": parent_size, "parameters": 1}, set[Budget](), []
    for row in rows:
        meaning = budget_of_name(row.name)
        if meaning is None or meaning in meanings:
            wrong.append(row)
            continue
        meanings.add(meaning)
        whole = wholes.get(meaning.kind)
        if whole is not None and row.non_embedding_parameters > TOLERANCE * meaning.value * whole:
            wrong.append(row)
    return wrong


def check_names(rows: list[FrontierRow], parent_size: int) -> None:
    """Refuse rows that are not reached by their names."""
    for row in unreached(rows, parent_size):
        rule = "A row is reached by its name, and this one means something else."
        argument = f"frontier[{rows.index(row)}]['name']"
        raise invalid(argument, row.name, rule, "Begin it with a letter, such as 'small'.")


def plain_budget(budget: Any) -> Any:
    """A budget as JSON has it: a `SubNetwork` becomes the dict of its sizes."""
    if is_routed(budget):
        return f"auto:{budget.target}"
    return budget.to_dict() if is_subnetwork(budget) else budget


def _positive(text: str, number: float) -> float:
    if number <= 0:
        raise invalid("flextron_budget", text, "A budget must be positive.", _FORMS)
    return number


# -------------------------------------------------------------------------------------------------- resolving


def resolve(config: Family, budget: Any) -> SubNetwork:
    """The sub-network that a budget means for a model.

    Args:
        config: The `FlextronConfig` of the model; its `dtype` and `flextron_context` enter memory budgets.
        budget: Any value of the grammar, or a `SubNetwork`, which is taken as it is when it fits.

    Raises:
        ValueError: the budget is not in the grammar, is smaller than the smallest sub-network, asks for a
            sub-network that this model does not hold, or needs a measurement that was not made.
    """
    parsed = parse_budget(budget)
    if parsed.kind == "full":
        return _own(config.built)
    if parsed.kind == "exact":
        return subnetwork_of(config, budget) if isinstance(budget, dict) else _fitting(config, budget)
    if parsed.kind == "auto":
        return resolve_auto(config, budget, parsed.value)
    if parsed.kind == "fit":
        rule = "It asks for the memory that is free before weights are loaded; a smaller size frees none of them later."
        raise invalid("flextron_budget", budget, rule, "Pass it to `from_pretrained`, or ask for a fraction here.")
    if parsed.kind == "name":
        named = [row for row in config.frontier if row.name == parsed.value]
        if not named:
            names = ", ".join(repr(row.name) for row in config.frontier)
            raise invalid("flextron_budget", budget, f"The rows of the frontier are {names}.", _FORMS)
        return _held(budget, named[0])
    if parsed.kind == "loss":
        return _held(budget, _cheapest_of_quality(config, budget, parsed.value))
    return _within(config, budget, parsed)


class Resolver:
    """Resolves budgets, and remembers what they mean for as long as the config says the same."""

    def __init__(self) -> None:
        # In one piece, so that threads see both halves of one config.
        self._known: tuple[dict[str, Any], dict[Budget, SubNetwork]] = {}, {}

    def __call__(self, config: Family, budget: Any) -> SubNetwork:
        """Resolve a budget; a latency budget depends on files and on the machine, too, and is looked up every time."""
        if torch.compiler.is_compiling() or budget is None or isinstance(budget, dict) or is_subnetwork(budget):
            return resolve(config, budget)
        parsed, says = parse_budget(budget), vars(config)
        said, meant = self._known
        if said != says:
            self._known = said, meant = _copied(says), {}
        if parsed not in meant:
            found = resolve(config, budget)
            if parsed.kind == "latency" or len(meant) >= 1000:
                return found
            meant[parsed] = found
        return meant[parsed]


def _copied(value: Any) -> Any:
    """Copy dicts and lists, which may be changed in place; all else, such as rows, stays as it is."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def cost_of(config: Family, kind: str, asked: Any, argument: str = "flextron_budget") -> Cost:
    """The cost that a budget limits: non-embedding parameters of a `fraction`, `parameters`, `memory`, `latency`.

    Raises:
        ValueError: there is no latency table; the message names what was `asked` for in which `argument`.
    """
    if kind == "memory":
        return memory_of(config)
    if kind != "latency":
        return parameters_of(config, embeddings=kind == "parameters")
    table = table_of(config)
    if table is None:
        raise invalid(
            argument, asked, "This model has no latency table, which a latency budget needs.",
            "Make one on this machine with `flextron measure`, or pass a fraction such as 0.5.",
        )  # fmt: skip
    return table.cost()


def row_cost(config: Family, row: FrontierRow, kind: str) -> int:
    """The cost of a row of the frontier in the unit of a budget kind: parameters, or bytes for `memory`."""
    if kind == "fraction":
        return row.non_embedding_parameters
    if kind == "parameters":
        return row.parameters
    if row.subnetwork is not None:
        return memory_of(config)(row.subnetwork) + bytes_beside(config, row.subnetwork)
    # Its layers are not known here: each keeps as many tokens as those of what is built do on average.
    cache = kv_cache_bytes(config, config.built, memory_context(config))
    cache = cache * row.kv_values_per_token // kv_values_per_token(config, config.built)
    return row.parameters * bytes_per_value(config.dtype) + cache


def bytes_beside(config: Family, subnetwork: SubNetwork, dtype: torch.dtype | None = None) -> int:
    """Bytes of the corrections of smaller sizes in what is loaded at a size, in `dtype` or that of the config."""
    return parameters_beside(config, config.owners(), subnetwork) * bytes_per_value(dtype or config.dtype)


def _within(config: Family, budget: Any, asked: Budget) -> SubNetwork:
    """The sub-network for a limit on what it costs: the best row of the frontier, or what the router chooses."""
    cost = cost_of(config, asked.kind, budget)
    limit = asked.value * (config.parent_size() if asked.kind == "fraction" else 1)
    priced = _priced_rows(config, asked, cost)
    best, found = _best_row(priced, asked, limit), None
    if best is not None:
        found = _held(budget, best)
        if config.static_router is None or cost(found) >= CLOSE * min(limit, cost(config.built)):
            return found
    if config.static_router is not None and asked.kind == "memory":
        # Bounds what any size may hold beside its own weights.
        limit -= max(bytes_beside(config, s) for s in (config.built, *(owner.subnetwork for owner in config.owners())))
    if config.static_router is not None and limit >= cost(smallest_subnetwork(config)):
        routed = StaticRouter(config, config.static_router).choose(cost, limit)
        return routed if found is None or cost(routed) > cost(found) else found
    if found is None:
        smallest, least = min(priced, key=lambda entry: entry[1])
        named = budget_of_name(smallest.name) in (None, Budget("name", smallest.name))
        if asked.kind != "fraction" or not named or least > TOLERANCE * limit:
            raise _too_little(config, budget, asked.kind, smallest, least)
        return _held(budget, smallest)  # what it was made for is not known, and may be this
    return found


def _priced_rows(config: Family, asked: Budget, cost: Cost) -> list[tuple[FrontierRow, float]]:
    """Rows and their costs: those that are held, and larger ones, which say how to reload."""
    priced = []
    for row in config.frontier:
        if row.subnetwork is not None:
            used = cost(row.subnetwork)
            if asked.kind == "memory" and budget_of_name(row.name) != asked:  # else it was made for this very budget
                used += bytes_beside(config, row.subnetwork)
            priced.append((row, used))
        elif asked.kind != "latency" and (used := row_cost(config, row, asked.kind)) > cost(config.built):
            priced.append((row, used))
    return sorted(priced, key=lambda entry: entry[0].subnetwork is None)  # of two that are as good the one held


def _best_row(priced: list[tuple[FrontierRow, float]], asked: Budget, limit: float) -> FrontierRow | None:
    """The row that is called by the budget, or the largest within the limit; of those about as large the best one."""
    # A conversion may give a row much less than its budget, as it does for corrections.
    near = (row for row, used in priced if used <= TOLERANCE * limit)
    return next((row for row in near if budget_of_name(row.name) == asked), None) or best_within(priced, limit)


def best_within(priced: list[tuple[FrontierRow, float]], limit: float) -> FrontierRow | None:
    """Of rows and their costs the largest within a limit; of those about as large the one with the lowest loss."""
    fitting = [row for row, used in priced if used <= limit]
    most = max((row.non_embedding_parameters for row in fitting), default=0)
    alike = [row for row in fitting if row.non_embedding_parameters >= CLOSE * most]
    losses = {row.name: row.loss for row in alike if row.loss is not None}
    if len(losses) == len(alike):
        return min(alike, key=lambda row: losses[row.name], default=None)
    return max(alike, key=lambda row: row.non_embedding_parameters)


def _too_little(config: Family, budget: Any, kind: str, row: FrontierRow, least: float) -> ValueError:
    """The refusal of a budget below the smallest row, which costs `least`."""
    if kind == "latency":
        table = table_of(config)
        assert table is not None  # it gave the cost
        rule = f"The fastest sub-network, {row.name!r}, takes {1e3 * least:.3g} ms for a token on {table.device}."
        return invalid("flextron_budget", budget, rule, "Ask for at least that much.")
    unit = {
        "fraction": f"non-embedding parameters, a fraction of {least / config.parent_size():.4g}",
        "parameters": "parameters",
        "memory": f"bytes with a KV cache of {memory_context(config)} tokens (`flextron_context`)",
    }[kind]
    sizes = {"layers" if axis == "depth" else axis: config.choices(axis)[-1] for axis in AXES}
    rule = f"The smallest row of the frontier, {row.name!r}, costs {least:,} {unit}."
    remedy = f"Ask for at least that much, or name exact sizes, down to {sizes}."
    return invalid("flextron_budget", budget, rule, remedy)


def _cheapest_of_quality(config: Family, budget: Any, limit: float) -> FrontierRow:
    """The smallest row whose measured loss is at most `limit`."""
    losses = {row.name: row.loss for row in config.frontier if row.loss is not None}
    if not losses:
        raise invalid(
            "flextron_budget", budget, "No row of the frontier has a measured loss.",
            "Measure them with `flextron evaluate --write`, or pass a fraction such as 0.5.",
        )  # fmt: skip
    good = [row for row in config.frontier if losses.get(row.name, math.inf) <= limit]
    if not good:
        best = min(losses.values())
        raise invalid(
            "flextron_budget", budget, f"The best measured loss is {best:.4f} (perplexity {math.exp(best):.2f}).",
            "Ask for a quality that this model reaches.",
        )  # fmt: skip
    return min(good, key=lambda row: row.non_embedding_parameters)


def _held(budget: Any, row: FrontierRow) -> SubNetwork:
    if row.subnetwork is None:
        raise invalid(
            "flextron_budget", budget, f"It means row {row.name!r}, which is not among the weights in memory.",
            f"Reload it from the full checkpoint with `from_pretrained(..., flextron_budget={row.name!r})`.",
        )  # fmt: skip
    return _own(row.subnetwork)


def _own(value: Any) -> SubNetwork:
    """The same sub-network in the class of this copy of the code: that of a config may be another one."""
    if type(value) is SubNetwork:
        return value
    return SubNetwork(value.hidden, tuple(value.layers), tuple(value.mlp), tuple(value.heads))


def _fitting(config: Family, value: Any) -> SubNetwork:
    """A `SubNetwork` object in the class of this file, if the model contains it."""
    if is_routed(value):
        return resolve_auto(config, value, value.target)
    subnetwork = _own(value)
    if not subnetwork.layers or not config.built.contains(subnetwork):
        remedy = f"Stay within {config.built.to_dict()}, or reload with a larger `flextron_budget`."
        raise invalid("flextron_budget", value, "It is not inside the weights in memory.", remedy)
    return subnetwork
