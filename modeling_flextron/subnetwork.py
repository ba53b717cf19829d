"""Sub-networks as values: what one is, and what it costs.

In the weights of a Flextron model every smaller network is a prefix, which a `SubNetwork` names by its sizes alone.
Which one a budget means: `budgets.py`.

Costs follow from the shape alone and are exact: `count_parameters` equals `sum(p.numel())` of the extracted
model. Axes `mlp` and `heads`, and nesting: Flextron (arXiv 2406.10260); `hidden` and `depth`: Nemotron
Elastic (arXiv 2511.16664, equations 34-46).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Any, Protocol, TypeGuard

import torch

from .errors import invalid

AXES = ("mlp", "heads", "hidden", "depth")


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

    def intersection(self, other: "SubNetwork") -> "SubNetwork":
        """The largest network that both contain, with its layers counted as in both."""
        mine, theirs = (
            {layer: sizes for layer, *sizes in zip(network.layers, network.mlp, network.heads, strict=True)}
            for network in (self, other)
        )
        layers = tuple(layer for layer in self.layers if layer in theirs)
        mlp, heads = (tuple(min(mine[layer][i], theirs[layer][i]) for layer in layers) for i in (0, 1))
        return SubNetwork(min(self.hidden, other.hidden), layers, mlp, heads)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: one number where all kept layers agree, a list where they differ."""
        return {
            "hidden": self.hidden,
            "layers": list(self.layers),
            "mlp": self.mlp[0] if len(set(self.mlp)) == 1 else list(self.mlp),
            "heads": self.heads[0] if len(set(self.heads)) == 1 else list(self.heads),
        }


def is_subnetwork(value: Any) -> TypeGuard[SubNetwork]:
    """Whether a value is a sub-network; its class may be that of another copy of this file."""
    return hasattr(value, "layers")


@dataclass(frozen=True)
class RoutedSubNetwork(SubNetwork):
    """A sub-network within which tokens choose, so that the average costs `target` of the parent."""

    target: float = 1.0

    @property
    def bounds(self) -> SubNetwork:
        """The sub-network of the largest choices of a token."""
        return SubNetwork(self.hidden, self.layers, self.mlp, self.heads)


def is_routed(subnetwork: Any) -> TypeGuard[RoutedSubNetwork]:
    """Whether tokens choose within a sub-network; its class may be that of another copy of this file."""
    return hasattr(subnetwork, "target")


class Shape(Protocol):
    """The shape of an elastic model and its allowed sizes; a `FlextronConfig` is one, with fields of these meanings."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    num_hidden_layers: int
    max_position_embeddings: int
    norm_type: str
    norm_eps: float
    qk_norm: bool
    gated_mlp: bool
    mlp_bias: bool
    attention_bias: bool
    attention_output_bias: bool
    learned_positions: bool
    tie_word_embeddings: bool
    layer_types: list[str]
    sliding_window: int | None
    dtype: Any
    flextron_context: int
    token_routing: Any  # a dict, or None

    @property
    def built(self) -> SubNetwork:
        """Everything that the weights hold."""

    def kv_heads(self, heads: int) -> int:
        """KV heads of a layer that runs `heads` query heads."""

    def choices(self, axis: str) -> list[int]:
        """Allowed sizes on an axis, largest first."""

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """Layers that a network of `depth` layers keeps."""

    def parent_size(self) -> int:
        """Non-embedding parameters of the parent."""


def axis_sizes(shape: Shape, subnetwork: SubNetwork, at: int) -> dict[str, int]:
    """Length of each axis of `families.ELASTIC` in the kept layer number `at`."""
    heads = subnetwork.heads[at]
    return {
        "hidden": subnetwork.hidden,
        "mlp": subnetwork.mlp[at],
        "heads": heads * shape.head_dim,
        "kv_heads": shape.kv_heads(heads) * shape.head_dim,
    }


def uniform_subnetworks(shape: Shape) -> list[SubNetwork]:
    """Every sub-network of the choices that has the same sizes in all its layers."""
    result = []
    for hidden, depth, mlp, heads in product(*(shape.choices(axis) for axis in ("hidden", "depth", "mlp", "heads"))):
        result.append(SubNetwork(hidden, shape.kept_layers(depth), (mlp,) * depth, (heads,) * depth))
    return result


def smallest_subnetwork(shape: Shape) -> SubNetwork:
    """The smallest choice everywhere."""
    hidden, depth, mlp, heads = (shape.choices(axis)[-1] for axis in ("hidden", "depth", "mlp", "heads"))
    return SubNetwork(hidden, shape.kept_layers(depth), (mlp,) * depth, (heads,) * depth)


def random_subnetwork(shape: Shape, generator: random.Random) -> SubNetwork:
    """A heterogeneous sub-network: each size drawn from the choices that its place holds."""
    built = shape.built
    layers = shape.kept_layers(generator.choice(shape.choices("depth")))

    def pick(axis: str, limit: int) -> int:
        return generator.choice([size for size in shape.choices(axis) if size <= limit])

    return SubNetwork(
        pick("hidden", built.hidden),
        layers,
        tuple(pick("mlp", built.mlp[layer]) for layer in layers),
        tuple(pick("heads", built.heads[layer]) for layer in layers),
    )


# ---------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Cost:
    """Something that adds up over layers: parameters, bytes, seconds. Costs can be added and multiplied by a number.

    Args:
        rest: Hidden size -> what is outside of the layers.
        layer: Hidden size, `mlp` and `heads` -> what is in a layer, whichever it is.
        cache: Index of a layer and its `heads` -> what is in that layer besides: windows differ between layers.
    """

    rest: Callable[[int], float] = lambda hidden: 0
    layer: Callable[[int, Any, int], Any] = lambda hidden, mlp, heads: 0
    cache: Callable[[int, int], float] = lambda layer, heads: 0

    def at(self, layer: int, hidden: int, mlp: Any, heads: int) -> Any:
        """Of one layer, given its index."""
        return self.layer(hidden, mlp, heads) + self.cache(layer, heads)

    def __call__(self, subnetwork: SubNetwork) -> Any:
        """Of a whole sub-network."""
        places = zip(subnetwork.layers, subnetwork.mlp, subnetwork.heads, strict=True)
        return self.rest(subnetwork.hidden) + sum(self.at(i, subnetwork.hidden, mlp, heads) for i, mlp, heads in places)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            lambda hidden: self.rest(hidden) + other.rest(hidden),
            lambda hidden, mlp, heads: self.layer(hidden, mlp, heads) + other.layer(hidden, mlp, heads),
            lambda layer, heads: self.cache(layer, heads) + other.cache(layer, heads),
        )

    def __mul__(self, factor: float) -> "Cost":
        return Cost(
            lambda hidden: factor * self.rest(hidden),
            lambda hidden, mlp, heads: factor * self.layer(hidden, mlp, heads),
            lambda layer, heads: factor * self.cache(layer, heads),
        )


def _weights_of(shape: Shape) -> Callable[[int, Any, int], Any]:
    """Hidden size, `mlp` and `heads` -> weights of the projections of a layer."""
    # Read once: a config of transformers looks up every attribute with care, and rows are chosen among thousands.
    head_dim, matrices, kv_heads = shape.head_dim, 3 if shape.gated_mlp else 2, cache(shape.kv_heads)
    return lambda hidden, mlp, heads: hidden * (2 * head_dim * (heads + kv_heads(heads)) + matrices * mlp)


def parameters_of(shape: Shape, embeddings: bool = True) -> Cost:
    """Exact numbers of parameters; see `count_parameters`."""
    head_dim, kv_heads, weights = shape.head_dim, cache(shape.kv_heads), _weights_of(shape)
    norms, qk_norm = 2 if shape.norm_type == "layer" else 1, shape.qk_norm
    ups, mlp_bias = 2 if shape.gated_mlp else 1, shape.mlp_bias
    attention_bias, attention_output_bias = shape.attention_bias, shape.attention_output_bias
    outside = norms  # the last norm
    if embeddings:
        outside += shape.vocab_size * (1 if shape.tie_word_embeddings else 2)
        outside += shape.max_position_embeddings * shape.learned_positions

    def layer(hidden: int, mlp: Any, heads: int) -> Any:
        total = weights(hidden, mlp, heads) + 2 * norms * hidden + 2 * head_dim * qk_norm
        total += (heads + 2 * kv_heads(heads)) * head_dim * attention_bias + hidden * attention_output_bias
        return total + (ups * mlp + hidden) * mlp_bias

    return Cost(lambda hidden: outside * hidden, layer)


def cache_of(shape: Shape, context: int, static: bool = False) -> Cost:
    """Numbers that the KV cache of one sequence keeps, of which sliding layers keep their windows.

    Args:
        context: Tokens that were read; of a static cache those that it has room for.
        static: Of a `StaticCache` instead of a `DynamicCache`, which keeps one token less of a window.
    """
    head_dim, kv_heads, window = shape.head_dim, cache(shape.kv_heads), shape.sliding_window or context
    windowed = min(context, window if static else window - 1 or context)  # a window of one keeps everything
    tokens = [windowed if kind == "sliding_attention" else context for kind in shape.layer_types]
    return Cost(cache=lambda layer, heads: 2 * kv_heads(heads) * head_dim * tokens[layer])


def memory_of(shape: Shape) -> Cost:
    """Bytes of the weights in the dtype of the config, and of the KV cache that memory budgets reserve."""
    return (parameters_of(shape) + cache_of(shape, memory_context(shape))) * bytes_per_value(shape.dtype)


def memory_context(shape: Shape) -> int:
    """Tokens of KV cache that memory budgets reserve: no more than the model has positions."""
    return min(shape.flextron_context, shape.max_position_embeddings)


def count_parameters(config: Shape, subnetwork: SubNetwork, embeddings: bool = True) -> int:
    """Exact number of parameters of a sub-network.

    Args:
        config: The `FlextronConfig` of the model that contains it.
        subnetwork: The sizes to count.
        embeddings: Count the embeddings and an untied output head too; False gives the
            non-embedding count that fractional budgets refer to.
    """
    return parameters_of(config, embeddings)(subnetwork)


def kv_values_per_token(config: Shape, subnetwork: SubNetwork) -> int:
    """Numbers that the KV cache keeps for one token, over all kept layers."""
    return sum(2 * config.kv_heads(heads) * config.head_dim for heads in subnetwork.heads)


def weight_bytes(config: Shape, subnetwork: SubNetwork, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights in `dtype` (default: the dtype of the config)."""
    return count_parameters(config, subnetwork) * bytes_per_value(dtype or config.dtype)


def kv_cache_bytes(
    config: Shape, subnetwork: SubNetwork, context: int, dtype: torch.dtype | None = None, static: bool = False
) -> int:
    """Bytes of the KV cache of one sequence in `dtype` (default: the dtype of the config); see `cache_of`."""
    return cache_of(config, context, static)(subnetwork) * bytes_per_value(dtype or config.dtype)


def flops_per_token(config: Shape, subnetwork: SubNetwork, context: int = 0) -> int:
    """Floating-point operations of the matrix products that produce one token.

    Two per weight of every projection and of the output head, and four per query value and cached position
    for the attention scores and their weighted sum at `context` positions.
    """
    weights, attention = _weights_of(config), 4 * config.head_dim * context
    flops = Cost(
        lambda hidden: 2 * config.vocab_size * hidden,
        lambda hidden, mlp, heads: 2 * weights(hidden, mlp, heads) + attention * heads,
    )
    return flops(subnetwork)


def bytes_per_value(dtype: torch.dtype | str | None) -> int:
    """Bytes of one number: of `dtype`, or of float32 when it is not known."""
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32).itemsize


# -------------------------------------------------------------------------------------------------- JSON form


def subnetwork_of(shape: Shape, sizes: dict[str, Any]) -> SubNetwork:
    """The sub-network that a dict of sizes names; an absent field means the largest size."""
    names = [field.name for field in fields(SubNetwork)]
    for key in sizes:
        if key not in names:
            rule = f"{key!r} is not a field of a SubNetwork."
            remedy = f"The fields are {', '.join(names)}; `layers` may be a number of layers."
            raise invalid("flextron_budget", sizes, rule, remedy)
    layers = _layers_of(shape, sizes.get("layers"))
    hidden = sizes.get("hidden", shape.built.hidden)
    _require_choice(shape, "hidden", hidden)
    per_layer: dict[str, tuple[int, ...]] = {}
    for axis, full in (("mlp", shape.built.mlp), ("heads", shape.built.heads)):
        value = sizes.get(axis, [full[layer] for layer in layers])
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(layers)
        if len(values) != len(layers):
            rule = f"`{axis}` has {len(values)} sizes for {len(layers)} kept layers."
            raise invalid("flextron_budget", sizes, rule, "Give one size for all layers, or one for each kept layer.")
        for layer, size in zip(layers, values, strict=True):
            _require_choice(shape, axis, size)
            if size > full[layer]:
                rule = f"Layer {layer} holds only {full[layer]} in `{axis}`."
                raise invalid("flextron_budget", sizes, rule, "Ask for at most that, or reload with a larger budget.")
        per_layer[axis] = values
    return SubNetwork(hidden, layers, per_layer["mlp"], per_layer["heads"])


def _layers_of(shape: Shape, value: Any) -> tuple[int, ...]:
    if value is None:
        return shape.built.layers
    depth = len(value) if isinstance(value, (list, tuple)) else value
    _require_choice(shape, "depth", depth)
    kept = shape.kept_layers(depth)
    if isinstance(value, (list, tuple)) and tuple(value) != kept:
        rule = f"At depth {depth} this model keeps the layers {list(kept)}."
        raise invalid("flextron_budget", {"layers": value}, rule, f"Pass those, or just `'layers': {depth}`.")
    return kept


def _require_choice(shape: Shape, axis: str, size: Any) -> None:
    choices = shape.choices(axis)
    if isinstance(size, bool) or size not in choices:
        field = "layers" if axis == "depth" else axis
        rule = f"The choices on the `{axis}` axis are {choices}."
        raise invalid("flextron_budget", {field: size}, rule, "Pick one of them.")
