"""Token routing: every token chooses its MLP width and its number of query heads in every layer.

A router of a layer sees the normalised hidden state of a token and the target, the average cost that is asked for.
Its output, the need of the token, is a fraction of the full width; the nearest allowed size is what runs. In an MLP
the tokens are sorted by width, and each increment of neurons runs on the leading tokens that want it. In attention the
keys and values of all heads are computed, because later tokens may need them, and the queries of tokens with the same
number of heads run together. A few tokens, as in decoding, run at the largest of their sizes, with a gate of what each
chose; so do all queries of an attention function that cannot take some of them (flex and flash attention).
The host waits for the device twice in a layer, once for each part: what is computed next has as many rows as the
choices say, and the choices of the MLP depend on what attention adds.

Input-adaptive routers: Flextron, arXiv 2406.10260, section 3. How they learn: `flextron_trainer/routers/gates.py`.

Shapes: B batch, S sequence, D hidden, F neurons, H query heads, K sizes, T targets, N tokens.
"""

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from .elastic import project_block
from .errors import invalid
from .measured import FIGURE_FIELDS, Figures, read_figures
from .subnetwork import RoutedSubNetwork, Shape, SubNetwork, parameters_of

FEW = 16  # tokens for which sorting costs more than it saves
TARGET_FIELDS = ("target", "hidden", "layers", "heads", "offset", "cost", *FIGURE_FIELDS)


class Routing(Protocol):
    """Runs the parts of a layer where their sizes are not one number for all tokens."""

    def norm(self, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise `[B, S, D]` with a norm of the decoder."""

    def attend(self, module: Any, hidden_states: torch.Tensor, heads: int | None, **kwargs) -> torch.Tensor:
        """Run the attention of a layer; `kwargs` are those of its forward pass."""

    def feed(self, module: Any, hidden_states: torch.Tensor, mlp: int | None, hidden: int | None) -> torch.Tensor:
        """Run the MLP of a layer."""


class TokenRouter(nn.Module):
    """The need of every token, for one part of one layer; linear in the normalised hidden state."""

    def __init__(self, hidden_size: int, targets: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(targets, hidden_size))
        self.bias = nn.Parameter(torch.zeros(targets))

    def forward(self, hidden_states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Map `[B, S, D]` to needs `[B, S]`, at a position `[T]` between the targets."""
        size = hidden_states.shape[-1]
        weight = (position @ self.weight.float())[:size]
        return hidden_states.float() @ weight / size**0.5 + position @ self.bias.float()


def token_router(config: Shape) -> TokenRouter | None:
    """Make the router of a part of a layer, in a model whose tokens can choose."""
    if config.token_routing is None:
        return None
    return TokenRouter(config.built.hidden, len(config.token_routing["targets"]))


def route_layer(
    layer: Any, routing: Routing, hidden_states: torch.Tensor, mlp: int | None, hidden: int | None, **kwargs
) -> torch.Tensor:
    """Run a decoder layer whose sizes differ between tokens or are being learned: `routing` runs each part."""
    attn_input = routing.norm(layer.input_layernorm, hidden_states)
    residual = hidden_states + layer.drop(routing.attend(layer.self_attn, attn_input, hidden=hidden, **kwargs))
    mlp_input = routing.norm(layer.post_attention_layernorm, hidden_states if layer.parallel_residual else residual)
    return residual + layer.drop(routing.feed(layer.mlp, mlp_input, mlp, hidden))


class TokenRouting:
    """How the layers of one forward pass run when tokens choose their sizes, and afterwards what they chose.

    Args:
        config: The `FlextronConfig` of the model.
        subnetwork: Bounds and target.
        tokens: `[B, S]`, false at padding, which gets the smallest sizes; None without padding.

    Attributes:
        mlp: Layer -> neurons `[B, S]` of every token.
        heads: Layer -> query heads `[B, S]` of every token.
    """

    def __init__(self, config: Shape, subnetwork: RoutedSubNetwork, tokens: torch.Tensor | None = None):
        self.config, self.subnetwork, self.tokens = config, subnetwork, tokens
        position = position_of(config, subnetwork.target)
        self.position = torch.tensor(position)
        targets = config.token_routing["targets"]
        self.offset = sum(weight * entry["offset"] for weight, entry in zip(position, targets, strict=True))
        self.mlp: dict[int, torch.Tensor] = {}
        self.heads: dict[int, torch.Tensor] = {}

    def average(self) -> dict[str, list[float]]:
        """Average width of the tokens, padding left out, as a fraction of the full one: `mlp` and `heads` by layer."""
        result = {}
        for axis, chosen in (("mlp", self.mlp), ("heads", self.heads)):
            full = self.config.token_routing[axis][0]
            result[axis] = [self._mean(chosen[layer]).item() / full for layer in sorted(chosen)]
        return result

    def cost(self) -> torch.Tensor:
        """Parameters that a token used on average, as a fraction of the parent's non-embedding parameters.

        Keys and values count for all heads within the bounds.
        """
        config, hidden = self.config, self.subnetwork.hidden
        cost = parameters_of(config, embeddings=False)
        total = torch.as_tensor(float(cost.rest(hidden)))
        for layer, bound in zip(self.subnetwork.layers, self.subnetwork.heads, strict=True):
            total = total + cost.layer(hidden, self._mean(self.mlp[layer]), bound)
            idle = bound - self._mean(self.heads[layer])  # there are their queries and outputs, but not for this token
            total = total - idle * config.head_dim * (2 * hidden + config.attention_bias)
        return total / config.parent_size()

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        if self.tokens is None:
            return values.mean()
        tokens = self.tokens.to(values)
        return (values * tokens).sum() / tokens.sum()

    # ------------------------------------------------------------------------------------ used by the decoder

    def norm(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """A norm, as it is."""
        return module(hidden_states)

    def attend(
        self, module: Any, hidden_states: torch.Tensor, heads: int | None, past_key_values: Any = None, **kwargs
    ) -> torch.Tensor:
        """The attention of a layer: keys and values of all heads, queries of the chosen ones."""
        sizes, which = self._choose(module, "heads", hidden_states)
        self.heads[module.layer_idx] = chosen = torch.tensor(sizes, device=which.device)[which]
        # The keys and values of all heads, whichever of them this token asks.
        read = module.keys_and_values(hidden_states, kwargs["position_embeddings"], past_key_values, max(sizes), kwargs)
        if which.numel() > FEW and (mask := mask_by_rows(module.config, kwargs, read[0], which.shape[1])) is not None:
            kwargs["attention_mask"] = mask
            return self._attend_in_groups(module, hidden_states, sizes, which, read, **kwargs)
        # A kernel that reads the pages of an engine itself writes there, too: of all heads, for later tokens.
        size = max(sizes) if "k_cache" in kwargs else int(chosen.max())
        gate = torch.arange(size, device=chosen.device) < chosen[..., None]
        gate = gate.repeat_interleave(module.head_dim, dim=-1).to(hidden_states.dtype)
        groups = module.kv_heads_of(size)
        read = read[0][:, :groups], read[1][:, :groups]
        return module.forward(hidden_states, keys_and_values=read, heads=size, gate=gate, **kwargs)[0]

    def _attend_in_groups(
        self, module, hidden_states, sizes, which, read, *, attention_mask, position_embeddings, **kwargs
    ) -> torch.Tensor:
        key, value = read
        counts = _counts(which, len(sizes))
        starts = counts.cumsum(dim=1) - counts
        order = which.argsort(dim=1, stable=True)  # the widest first
        rank = place = order.argsort(dim=1) - starts.gather(1, which)  # of a token among those of its size
        parts, done = [], 0
        for number, (size, most) in enumerate(zip(sizes, counts.amax(dim=0).tolist(), strict=True)):
            if most == 0:
                continue
            place = torch.where(which == number, rank + done, place)
            done += most
            index = starts[:, number, None] + torch.arange(most, device=which.device)
            index = order.gather(1, index.clamp(max=which.shape[1] - 1))  # [B, n], filled up with others
            groups = module.kv_heads_of(size)
            mixed, _ = module.forward(
                _rows(hidden_states, index),
                keys_and_values=(key[:, :groups], value[:, :groups]),
                heads=size,
                position_embeddings=position_embeddings
                and tuple(_rows(part[:, 0], index)[:, None] for part in position_embeddings),
                attention_mask=_rows(attention_mask[:, 0], index)[:, None],
                **kwargs,
            )
            parts.append(mixed)
        return _rows(torch.cat(parts, dim=1), place)

    def feed(self, module: Any, hidden_states: torch.Tensor, mlp: int | None, hidden: int | None) -> torch.Tensor:
        """The MLP of a layer: each increment of neurons on the tokens that want it."""
        sizes, which = self._choose(module, "mlp", hidden_states)
        self.mlp[module.layer_idx] = chosen = torch.tensor(sizes, device=which.device)[which]
        if which.numel() <= FEW:
            size = int(chosen.max())
            gate = torch.arange(size, device=chosen.device) < chosen[..., None]
            return module(hidden_states, size, hidden, gate=gate.to(hidden_states.dtype))
        order = which.flatten().argsort(stable=True)  # the widest first
        states = hidden_states.flatten(0, 1)[order]
        counts = _counts(which, len(sizes)).sum(dim=0).cumsum(0).tolist()
        output, lower = None, 0
        for size, count in reversed(list(zip(sizes, counts, strict=True))):
            if count:
                total = None if output is None else output[:count]
                part = increment(module, states[:count], slice(lower, size), hidden, total)
                output = part if output is None else output  # the smallest size: all tokens
            lower = size
        assert output is not None
        return output[order.argsort()].view(*which.shape, -1)  # half of the time of writing them where they belong

    def _choose(self, module: Any, axis: str, hidden_states: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """The sizes of a part of a layer, largest first, and which of them `[B, S]` each token gets."""
        sizes, borders = self.sizes(axis, module.layer_idx)
        need = module.router(hidden_states, self.position.to(hidden_states.device)) + self.offset
        which = torch.bucketize(-need, -torch.tensor(borders, device=need.device))  # borders descend
        if self.tokens is not None:
            which = which.masked_fill(~self.tokens.to(which.device), len(sizes) - 1)
        return sizes, which

    def sizes(self, axis: str, layer: int) -> tuple[list[int], list[float]]:
        """The sizes within the bounds of a layer, largest first, and the needs `[K - 1]` that lie between them."""
        bound = getattr(self.subnetwork, axis)[self.subnetwork.layers.index(layer)]
        allowed = self.config.token_routing[axis]
        sizes = sorted({min(size, bound) for size in allowed}, reverse=True)
        return sizes, [(a + b) / 2 / allowed[0] for a, b in pairwise(sizes)]


def increment(
    module: Any, states: torch.Tensor, neurons: slice, hidden: int | None, total: torch.Tensor | None
) -> torch.Tensor:
    """Compute what some neurons of an MLP add to the output `[N, hidden]` of `[N, d]`, added to `total`."""
    inputs = slice(states.shape[-1])
    result = project_block(module.up_proj, states, neurons, inputs)
    if module.gate_proj is None:
        result = module.act_fn(result)
    else:
        result = module.act_fn(project_block(module.gate_proj, states, neurons, inputs)) * result
    return project_block(module.down_proj, result, slice(hidden), neurons, total)


def mask_by_rows(config: Any, options: dict[str, Any], key: torch.Tensor, length: int) -> torch.Tensor | None:
    """A mask `[B or 1, 1, S, S']` that has a row for each of the queries, from which some can be taken.

    Args:
        options: Keywords of the attention function.
        key: What is read, `[B, G, S', E]`.
        length: Number of queries of a sequence, S.

    Returns:
        None where attention has no such mask, or one for each head: then all queries are to run together.
    """
    mask, implementation = options["attention_mask"], config._attn_implementation
    if mask is None and implementation == "sdpa" and "is_causal" not in options:
        # It lets a query see the keys up to its own place, counted from the first key; one alone sees all.
        seen = key.shape[2]
        return torch.ones(1, 1, length, seen, dtype=torch.bool, device=key.device).tril(0 if length > 1 else seen)
    rows = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == 1
    return mask if rows and implementation in ("eager", "paged|eager", "sdpa") else None


def _counts(which: torch.Tensor, count: int) -> torch.Tensor:
    """How many of `[B, S]` are 0, 1, ..., `count` - 1 in every row: `[B, count]`; counting them otherwise may wait."""
    return (which[..., None] == torch.arange(count, device=which.device)).sum(dim=1)


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `[B, n]` of `[B or 1, S, C]`."""
    states = states.expand(len(index), -1, -1)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


# ------------------------------------------------------------------------------------------------- in a config


def position_of(config: Shape, target: float) -> list[float]:
    """Where a target lies between those of a config: one weight for each, which sum to 1."""
    targets = [entry["target"] for entry in config.token_routing["targets"]]
    for i, (low, high) in enumerate(pairwise(targets)):
        if low <= target <= high:
            weight = (target - low) / (high - low)
            return [1 - weight if j == i else weight if j == i + 1 else 0.0 for j in range(len(targets))]
    return [float(entry == target) for entry in targets]


def bounds_of(config: Shape, entry: dict[str, Any], target: float) -> RoutedSubNetwork:
    """The bounds of a target of a config: its own hidden size, layers and heads, and MLPs of the full size."""
    layers = config.kept_layers(entry["layers"])
    mlp = tuple(config.built.mlp[layer] for layer in layers)
    return RoutedSubNetwork(entry["hidden"], layers, mlp, tuple(entry["heads"]), target)


def resolve_auto(config: Shape, budget: Any, target: float | None) -> RoutedSubNetwork:
    """The bounds and the target of `"auto"` (the largest target) and `"auto:0.5"`.

    Raises:
        ValueError: the model has no token routers, or they were not trained for this target.
    """
    if config.token_routing is None:
        raise invalid(
            "flextron_budget", budget, "This model has no token routers, which `auto` needs.",
            "Train them with `flextron train --stage router --router-method token`, or pass a fraction such as 0.5.",
        )  # fmt: skip
    entries = config.token_routing["targets"]
    low, high = entries[0]["target"], entries[-1]["target"]
    target = high if target is None else target
    if not low <= target <= high:
        rule = f"The token routers were trained for averages from {low:g} to {high:g}."
        raise invalid("flextron_budget", budget, rule, "Ask for one of them, or pass a fraction without 'auto'.")
    return bounds_of(config, next(entry for entry in entries if entry["target"] >= target), target)


def check_token_routing(config: Shape, stored: Any) -> None:
    """Refuse token routing that does not fit the choices of a config."""
    remedy = "Train token routers with `router_method='token'`, or pass None for none."
    if not isinstance(stored, dict) or set(stored) != {"mlp", "heads", "targets"}:
        raise invalid("token_routing", stored, "It has the fields mlp, heads, targets.", remedy)
    for axis in ("mlp", "heads"):
        sizes = stored[axis]
        if not isinstance(sizes, list) or not sizes or sorted(set(sizes), reverse=True) != sizes:
            raise invalid(f"token_routing[{axis!r}]", sizes, "The sizes descend strictly.", remedy)
    entries = stored["targets"]
    older = Figures().figures()  # had a loss alone
    if (
        not isinstance(entries, list)
        or not entries
        or any(not isinstance(entry, dict) or older.keys() | entry.keys() != set(TARGET_FIELDS) for entry in entries)
    ):
        rule = f"It is a list of entries with {', '.join(TARGET_FIELDS)}."
        raise invalid("token_routing['targets']", entries, rule, remedy)
    targets = [entry["target"] for entry in entries]
    if sorted(set(targets)) != targets or not targets[0] > 0 or not targets[-1] <= 1:
        raise invalid("token_routing['targets']", targets, "The targets ascend between 0 and 1.", remedy)
    for i, entry in enumerate(entries):
        entry |= Figures(**read_figures(f"token_routing['targets'][{i}]", older | entry)).figures()
        if not config.built.contains(bounds_of(config, entry, entry["target"]).bounds):
            rule = f"The bounds of target {entry['target']} are not within the model."
            raise invalid("token_routing['targets']", entry, rule, remedy)


def figures_of_targets(stored: dict[str, Any] | None) -> dict[str, Figures]:
    """`"auto:0.5"` -> what was measured of this target, for every target of a config's token routing."""
    entries = stored["targets"] if stored else []
    return {f"auto:{entry['target']:g}": Figures(**read_figures("target", entry)) for entry in entries}


def with_figures(stored: dict[str, Any] | None, figures: dict[str, Figures]) -> dict[str, Any] | None:
    """A config's token routing, with these figures of its targets."""
    if not stored:
        return stored
    targets = [entry | figures[f"auto:{entry['target']:g}"].figures() for entry in stored["targets"]]
    return {**stored, "targets": targets}


def narrowed_routing(config: Shape, narrow: Shape, layers: tuple[int, ...]) -> dict[str, Any] | None:
    """The token routing of a model that holds only a part, of which `narrow` is the shape and `layers` the layers of
    the whole one: the targets whose bounds it still holds.
    """
    entries = []
    for entry in config.token_routing["targets"]:
        bounds = bounds_of(config, entry, entry["target"])
        whole = SubNetwork(narrow.built.hidden, layers, bounds.mlp, bounds.heads)
        if not set(bounds.layers) <= set(layers) or bounds.hidden > whole.hidden:
            break  # of each router a part for every target is kept, and what is kept of a tensor is its beginning
        inside = bounds.within(whole)
        if inside.layers != narrow.kept_layers(len(inside.layers)) or any(
            heads > narrow.built.heads[layer] for layer, heads in zip(inside.layers, inside.heads, strict=True)
        ):
            break
        entries.append(entry)
    return {**config.token_routing, "targets": entries} if entries else None
