"""Sub-networks as values: what one is, what it costs, and which one a budget means.

A Flextron model is one set of weights in which every smaller network is a prefix. A `SubNetwork` names one of
those networks by its sizes alone; it is passed down `forward`, so nothing in the model changes when another is
asked for. A budget is what the user writes (`flextron_budget=0.5`, `"350M"`, `"6GiB"`, `"small"`, ...);
`resolve` turns it into a `SubNetwork` with the frontier of the config, the table of recommended sizes.

Costs follow from the config alone and are exact: `count_parameters` equals `sum(p.numel())` of the extracted
model. Axes `mlp` and `heads`, and nesting: Flextron (arXiv 2406.10260); `hidden` and `depth`: Nemotron
Elastic (arXiv 2511.16664, equations 34-46).
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Any

import torch

from .errors import invalid

AXES = ("mlp", "heads", "hidden", "depth")
CLOSE = 0.98  # a sub-network that uses so much of a budget uses it
TOLERANCE = 1.01  # of what a row may cost of the budget by which it is called: norms do not halve


@dataclass(frozen=True)
class SubNetwork:
    """The sizes of one network inside a Flextron model.

    Args:
        hidden: Width of the residual stream.
        layers: Indices of the kept layers, ascending, counted in the model that runs it.
        mlp: Neurons of the MLP of each kept layer.
        heads: Query heads of each kept layer (KV heads follow: see `FlextronConfig.kv_heads`).
    """

    hidden: int
    layers: tuple[int, ...]
    mlp: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        """Whether every kept layer has the same sizes, so that a stock class can hold it."""
        return len(set(self.mlp)) == 1 and len(set(self.heads)) == 1

    def contains(self, other: "SubNetwork") -> bool:
        """Whether `other` is a prefix of this network on every axis."""
        at = {layer: i for i, layer in enumerate(self.layers)}
        return other.hidden <= self.hidden and all(
            layer in at and mlp <= self.mlp[at[layer]] and heads <= self.heads[at[layer]]
            for layer, mlp, heads in zip(other.layers, other.mlp, other.heads, strict=True)
        )

    def within(self, outer: "SubNetwork") -> "SubNetwork":
        """The same network with its layers counted inside `outer`, which must contain it."""
        at = {layer: i for i, layer in enumerate(outer.layers)}
        return SubNetwork(self.hidden, tuple(at[layer] for layer in self.layers), self.mlp, self.heads)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: one number where all kept layers agree, a list where they differ."""
        return {
            "hidden": self.hidden,
            "layers": list(self.layers),
            "mlp": self.mlp[0] if len(set(self.mlp)) == 1 else list(self.mlp),
            "heads": self.heads[0] if len(set(self.heads)) == 1 else list(self.heads),
        }


def uniform_subnetworks(config) -> list[SubNetwork]:
    """Every sub-network of the choices that has the same sizes in all its layers."""
    result = []
    for hidden, depth, mlp, heads in product(*(config.choices(axis) for axis in ("hidden", "depth", "mlp", "heads"))):
        result.append(SubNetwork(hidden, config.kept_layers(depth), (mlp,) * depth, (heads,) * depth))
    return result


def smallest_subnetwork(config) -> SubNetwork:
    """The smallest choice everywhere."""
    hidden, depth, mlp, heads = (config.choices(axis)[-1] for axis in ("hidden", "depth", "mlp", "heads"))
    return SubNetwork(hidden, config.kept_layers(depth), (mlp,) * depth, (heads,) * depth)


def random_subnetwork(config, generator: random.Random) -> SubNetwork:
    """A heterogeneous sub-network: each size drawn from the choices that its place holds."""
    built = config.built
    layers = config.kept_layers(generator.choice(config.choices("depth")))

    def pick(axis: str, limit: int) -> int:
        return generator.choice([size for size in config.choices(axis) if size <= limit])

    return SubNetwork(
        pick("hidden", built.hidden),
        layers,
        tuple(pick("mlp", built.mlp[layer]) for layer in layers),
        tuple(pick("heads", built.heads[layer]) for layer in layers),
    )


# ---------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Cost:
    """Something that adds up over layers: parameters, bytes, seconds.

    Args:
        rest: Hidden size -> what is outside of the layers.
        layer: Hidden size, `mlp` and `heads` -> what is in a layer, whichever it is.
        cache: Index of a layer and its `heads` -> what is in that layer besides: windows differ between layers.
    """

    rest: Callable[[int], float]
    layer: Callable[[int, Any, int], Any]
    cache: Callable[[int, int], float] = lambda layer, heads: 0

    def at(self, layer: int, hidden: int, mlp: Any, heads: int) -> Any:
        """Of one layer, given its index."""
        return self.layer(hidden, mlp, heads) + self.cache(layer, heads)

    def __call__(self, subnetwork: SubNetwork) -> Any:
        """Of a whole sub-network."""
        places = zip(subnetwork.layers, subnetwork.mlp, subnetwork.heads, strict=True)
        return self.rest(subnetwork.hidden) + sum(self.at(i, subnetwork.hidden, mlp, heads) for i, mlp, heads in places)


def parameters_of(config, embeddings: bool = True) -> Cost:
    """Exact numbers of parameters; see `count_parameters`."""
    # Read once: a config of transformers looks up every attribute with care, and rows are chosen among thousands.
    head_dim, matrices, kv_heads = config.head_dim, 3 if config.gated_mlp else 2, cache(config.kv_heads)
    norms, qk_norm, mlp_bias = 2 if config.norm_type == "layer" else 1, config.qk_norm, config.mlp_bias
    attention_bias, attention_output_bias = config.attention_bias, config.attention_output_bias

    def rest(hidden: int) -> int:
        total = norms * hidden  # the last norm
        if embeddings:
            total += config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
            total += config.max_position_embeddings * hidden * config.learned_positions
        return total

    def layer(hidden: int, mlp: int, heads: int) -> int:
        queries, keys = heads * head_dim, kv_heads(heads) * head_dim
        total = hidden * (2 * queries + 2 * keys)  # q, o and k, v
        total += matrices * hidden * mlp
        total += 2 * norms * hidden
        total += 2 * head_dim * qk_norm
        total += (queries + 2 * keys) * attention_bias + hidden * attention_output_bias
        return total + ((matrices - 1) * mlp + hidden) * mlp_bias

    return Cost(rest, layer)


def memory_of(config) -> Cost:
    """Bytes of the weights in the dtype of the config, and of the KV cache that memory budgets reserve."""
    weights, size, context = parameters_of(config), bytes_per_value(config.dtype), memory_context(config)
    return Cost(
        lambda hidden: size * weights.rest(hidden),
        lambda hidden, mlp, heads: size * weights.layer(hidden, mlp, heads),
        lambda layer, heads: size * _kv_values(config, heads) * cached_tokens(config, layer, context),
    )


def count_parameters(config, subnetwork: SubNetwork, embeddings: bool = True) -> int:
    """Exact number of parameters of a sub-network.

    Args:
        config: The `FlextronConfig` of the model that contains it.
        subnetwork: The sizes to count.
        embeddings: Count the embeddings and an untied output head too; False gives the
            non-embedding count that fractional budgets refer to.
    """
    return parameters_of(config, embeddings)(subnetwork)


def kv_values_per_token(config, subnetwork: SubNetwork) -> int:
    """Numbers that the KV cache keeps for one token, over all kept layers."""
    return sum(_kv_values(config, heads) for heads in subnetwork.heads)


def _kv_values(config, heads: int) -> int:
    """Numbers that the KV cache keeps for one token in a layer that runs `heads` query heads."""
    return 2 * config.kv_heads(heads) * config.head_dim


def cached_tokens(config, layer: int, context: int, static: bool = False) -> int:
    """Tokens that the KV cache of a layer keeps of `context`; see `kv_cache_bytes`."""
    if config.layer_types[layer] != "sliding_attention":
        return context
    if static:
        return min(context, config.sliding_window)
    return min(context, config.sliding_window - 1 or context)  # a window of one keeps everything


def weight_bytes(config, subnetwork: SubNetwork, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights in `dtype` (default: the dtype of the config)."""
    return count_parameters(config, subnetwork) * bytes_per_value(dtype or config.dtype)


def kv_cache_bytes(
    config, subnetwork: SubNetwork, context: int, dtype: torch.dtype | None = None, static: bool = False
) -> int:
    """Bytes of the KV cache of one sequence of `context` tokens, of which sliding layers keep their windows.

    Args:
        config: The `FlextronConfig` of the model that contains it.
        subnetwork: What fills the cache.
        context: Tokens that were read; of a static cache those that it has room for.
        dtype: Of keys and values (default: the dtype of the config).
        static: Of a `StaticCache` instead of a `DynamicCache`, which keeps one token less of a window.
    """
    values = sum(
        _kv_values(config, heads) * cached_tokens(config, layer, context, static)
        for layer, heads in zip(subnetwork.layers, subnetwork.heads, strict=True)
    )
    return values * bytes_per_value(dtype or config.dtype)


def flops_per_token(config, subnetwork: SubNetwork, context: int = 0) -> int:
    """Floating-point operations of the matrix products that produce one token.

    Two per weight of every projection and of the output head, and four per query value and cached position
    for the attention scores and their weighted sum at `context` positions.
    """
    head_dim, flops = config.head_dim, 2 * config.vocab_size * subnetwork.hidden
    for mlp, heads in zip(subnetwork.mlp, subnetwork.heads, strict=True):
        projections = 2 * heads * head_dim + 2 * config.kv_heads(heads) * head_dim
        projections += (3 if config.gated_mlp else 2) * mlp
        flops += 2 * subnetwork.hidden * projections + 4 * heads * head_dim * context
    return flops


def bytes_per_value(dtype: torch.dtype | str | None) -> int:
    """Bytes of one number: of `dtype`, or of float32 when it is not known."""
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32).itemsize


# --------------------------------------------------------------------------------------------------- budgets


@dataclass(frozen=True)
class Budget:
    """A parsed budget: `kind` is one of the rows of the grammar, `value` its number, name or fields."""

    kind: str
    value: Any = None


_FORMS = (
    "Write a fraction in (0, 1] of the parent's non-embedding parameters, a number of parameters (`'350M'` or an"
    " int), memory (`'6GiB'`), latency (`'25ms'`), quality (`'loss<=2.3'`, `'ppl<=10'`), the name of a row of the"
    " frontier, the fields of a SubNetwork, `'auto'` or `'auto:0.5'`."
)
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)\s*"
_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_budget(value: Any) -> Budget:
    """Read a `flextron_budget` without looking at any model.

    Raises:
        ValueError: the value has no meaning in the grammar.
    """
    if value is None:
        return Budget("full")
    if isinstance(value, dict) or hasattr(value, "layers"):  # a SubNetwork, also one of another copy of this file
        return Budget("exact", value)
    if isinstance(value, str):
        return _parse_text(value)
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
    if match := re.fullmatch(_NUMBER + r"([KMBT])", stripped, re.IGNORECASE):
        return Budget("parameters", _positive(text, float(match[1]) * _COUNT[match[2].upper()]))
    if match := re.fullmatch(_NUMBER + r"([KMGT]i?B)", stripped, re.IGNORECASE):
        return Budget("memory", _positive(text, float(match[1]) * _BYTES[match[2].upper()]))
    if match := re.fullmatch(_NUMBER + r"(us|ms|s)", stripped):
        return Budget("latency", _positive(text, float(match[1]) * _SECONDS[match[2]]))
    if match := re.fullmatch(r"(loss|ppl)\s*<=\s*" + _NUMBER, stripped, re.IGNORECASE):
        limit = _positive(text, float(match[2]))
        return Budget("loss", math.log(limit) if match[1].lower() == "ppl" else limit)
    if match := re.fullmatch(r"auto(?::" + _NUMBER + r")?", stripped):
        return Budget("auto", float(match[1]) if match[1] else None)
    if not stripped or stripped[0] in "-+.<>=" or stripped[0].isdigit():
        raise invalid("flextron_budget", text, "The text is not a budget.", _FORMS)
    return Budget("name", stripped)


def budget_of_name(name: str) -> Budget | None:
    """What the name of a row means as a budget; None where the row cannot be reached by it, whatever its size."""
    try:
        parsed = parse_budget(name)
    except ValueError:
        return None
    reached = parsed.value == name if parsed.kind == "name" else parsed.kind in ("fraction", "parameters", "memory")
    return parsed if reached else None


def _positive(text: str, number: float) -> float:
    if number <= 0:
        raise invalid("flextron_budget", text, "A budget must be positive.", _FORMS)
    return number


def resolve(config, budget: Any) -> SubNetwork:
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
        return config.built
    if parsed.kind == "exact":
        return subnetwork_of(config, parsed.value) if isinstance(parsed.value, dict) else _fitting(config, parsed.value)
    if parsed.kind == "auto":
        return config.routed(budget, parsed.value)
    if parsed.kind == "name":
        rows = [row for row in config.frontier if row.name == parsed.value]
        if not rows:
            names = ", ".join(repr(row.name) for row in config.frontier)
            raise invalid("flextron_budget", budget, f"The rows of the frontier are {names}.", _FORMS)
        return _held(budget, rows[0])
    if parsed.kind == "loss":
        return _held(budget, _cheapest_of_quality(config, budget, parsed.value))
    return _within(config, budget, parsed)


def cost_of(config, kind: str, asked: Any, argument: str = "flextron_budget") -> Cost:
    """What a kind of budget limits: non-embedding parameters of a `fraction`, `parameters`, `memory`, `latency`.

    Raises:
        ValueError: there is no latency table; the message names what was `asked` for in which `argument`.
    """
    if kind == "memory":
        return memory_of(config)
    if kind != "latency":
        return parameters_of(config, embeddings=kind == "parameters")
    table = config.latency_table()
    if table is None:
        raise invalid(
            argument, asked, "This model has no latency table, which a latency budget needs.",
            "Make one on this machine with `flextron measure`, or pass a fraction such as 0.5.",
        )  # fmt: skip
    return table.cost()


def row_cost(config, row, kind: str) -> int:
    """What a row of the frontier costs in the unit of a budget kind: parameters, or bytes for `memory`."""
    if kind == "fraction":
        return row.non_embedding_parameters
    if kind == "parameters":
        return row.parameters
    if row.subnetwork is not None:
        return memory_of(config)(row.subnetwork)
    # Its layers are not known here: each keeps as many tokens as those of what is built do on average.
    cache = kv_cache_bytes(config, config.built, memory_context(config))
    cache = cache * row.kv_values_per_token // kv_values_per_token(config, config.built)
    return row.parameters * bytes_per_value(config.dtype) + cache


def memory_context(config) -> int:
    """Tokens of KV cache that memory budgets reserve: no more than the model has positions."""
    return min(config.flextron_context, config.max_position_embeddings)


def _within(config, budget: Any, parsed: Budget) -> SubNetwork:
    """The sub-network for a limit on what it costs: the best row of the frontier, or what the router chooses."""
    cost = cost_of(config, parsed.kind, budget)
    limit = parsed.value * (config.parent_size() if parsed.kind == "fraction" else 1)

    def row_of(row) -> float:
        if parsed.kind == "latency":
            return cost(row.subnetwork)
        return row_cost(config, row, parsed.kind)

    # Of rows that are not held those count that are larger than what is: they say how to reload.
    built = cost(config.built)
    others = [row for row in config.frontier if parsed.kind != "latency" and row.subnetwork is None]
    rows = [row for row in config.frontier if row.subnetwork] + [row for row in others if row_of(row) > built]
    own = [row for row in rows if budget_of_name(row.name) == parsed and row_of(row) <= TOLERANCE * limit]
    fitting = {row.name: row for row in rows if row_of(row) <= limit} | {row.name: row for row in own}
    chosen = None
    if fitting:
        most = max(row.non_embedding_parameters for row in fitting.values())
        alike = [row for row in fitting.values() if row in own or row.non_embedding_parameters >= CLOSE * most]
        best = max(own or alike, key=lambda row: row.non_embedding_parameters)
        if all(row.loss is not None for row in alike):
            best = min(alike, key=lambda row: row.loss)
        chosen = _held(budget, best)
        if config.static_router is None or cost(chosen) >= CLOSE * min(limit, built):
            return chosen
    if config.static_router is not None and limit >= cost(smallest_subnetwork(config)):
        routed = config.router().choose(cost, limit)
        return routed if chosen is None or cost(routed) > cost(chosen) else chosen
    if chosen is not None:
        return chosen
    name, least = min(((row.name, row_of(row)) for row in rows), key=lambda entry: entry[1])
    if parsed.kind == "latency":
        device = config.latency_table().device
        rule = f"The fastest sub-network, {name!r}, takes {1e3 * least:.3g} ms for a token on {device}."
        raise invalid("flextron_budget", budget, rule, "Ask for at least that much.")
    unit = {
        "fraction": f"non-embedding parameters, a fraction of {least / config.parent_size():.4g}",
        "parameters": "parameters",
        "memory": f"bytes with a KV cache of {memory_context(config)} tokens (`flextron_context`)",
    }[parsed.kind]
    sizes = {"layers" if axis == "depth" else axis: config.choices(axis)[-1] for axis in AXES}
    raise invalid(
        "flextron_budget", budget, f"The smallest row of the frontier, {name!r}, costs {least:,} {unit}.",
        f"Ask for at least that much, or name exact sizes, down to {sizes}.",
    )  # fmt: skip


def _cheapest_of_quality(config, budget: Any, limit: float):
    measured = [row for row in config.frontier if row.loss is not None]
    if not measured:
        raise invalid(
            "flextron_budget", budget, "No row of the frontier has a measured loss.",
            "Measure them with `flextron evaluate --write`, or pass a fraction such as 0.5.",
        )  # fmt: skip
    good = [row for row in measured if row.loss <= limit]
    if not good:
        best = min(row.loss for row in measured)
        raise invalid(
            "flextron_budget", budget, f"The best measured loss is {best:.4f} (perplexity {math.exp(best):.2f}).",
            "Ask for a quality that this model reaches.",
        )  # fmt: skip
    return min(good, key=lambda row: row.non_embedding_parameters)


def _held(budget: Any, row) -> SubNetwork:
    if row.subnetwork is None:
        raise invalid(
            "flextron_budget", budget, f"It means row {row.name!r}, which is not among the weights in memory.",
            f"Reload it from the full checkpoint with `from_pretrained(..., flextron_budget={row.name!r})`.",
        )  # fmt: skip
    return row.subnetwork


def _fitting(config, value: Any) -> SubNetwork:
    """A `SubNetwork` object in the class of this file, if the model contains it."""
    if hasattr(value, "target"):
        return config.routed(value, value.target)
    subnetwork = SubNetwork(value.hidden, tuple(value.layers), tuple(value.mlp), tuple(value.heads))
    if not subnetwork.layers or not config.built.contains(subnetwork):
        remedy = f"Stay within {config.built.to_dict()}, or reload with a larger `flextron_budget`."
        raise invalid("flextron_budget", value, "It is not inside the weights in memory.", remedy)
    return subnetwork


def subnetwork_of(config, sizes: dict[str, Any]) -> SubNetwork:
    """The sub-network that a dict of sizes names; an absent field means the largest size."""
    names = [field.name for field in fields(SubNetwork)]
    for key in sizes:
        if key not in names:
            rule = f"{key!r} is not a field of a SubNetwork."
            remedy = f"The fields are {', '.join(names)}; `layers` may be a number of layers."
            raise invalid("flextron_budget", sizes, rule, remedy)
    layers = _exact_layers(config, sizes.get("layers"))
    hidden = sizes.get("hidden", config.built.hidden)
    _require_choice(config, "hidden", hidden)
    per_layer: dict[str, tuple[int, ...]] = {}
    for axis, full in (("mlp", config.built.mlp), ("heads", config.built.heads)):
        value = sizes.get(axis, [full[layer] for layer in layers])
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(layers)
        if len(values) != len(layers):
            rule = f"`{axis}` has {len(values)} sizes for {len(layers)} kept layers."
            raise invalid("flextron_budget", sizes, rule, "Give one size for all layers, or one for each kept layer.")
        for layer, size in zip(layers, values, strict=True):
            _require_choice(config, axis, size)
            if size > full[layer]:
                rule = f"Layer {layer} holds only {full[layer]} in `{axis}`."
                raise invalid("flextron_budget", sizes, rule, "Ask for at most that, or reload with a larger budget.")
        per_layer[axis] = values
    return SubNetwork(hidden, layers, per_layer["mlp"], per_layer["heads"])


def _exact_layers(config, value: Any) -> tuple[int, ...]:
    if value is None:
        return config.built.layers
    depth = len(value) if isinstance(value, (list, tuple)) else value
    _require_choice(config, "depth", depth)
    kept = config.kept_layers(depth)
    if isinstance(value, (list, tuple)) and tuple(value) != kept:
        rule = f"At depth {depth} this model keeps the layers {list(kept)}."
        raise invalid("flextron_budget", {"layers": value}, rule, f"Pass those, or just `'layers': {depth}`.")
    return kept


def _require_choice(config, axis: str, size: Any) -> None:
    choices = config.choices(axis)
    if isinstance(size, bool) or size not in choices:
        field = "layers" if axis == "depth" else axis
        rule = f"The choices on the `{axis}` axis are {choices}."
        raise invalid("flextron_budget", {field: size}, rule, "Pick one of them.")
