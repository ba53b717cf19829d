"""Sizes with gradients: a forward pass at the full width in which gates let through what was chosen.

A gate is 1 or 0, so the result is exactly that of the chosen sizes, norms over fewer channels included; its gradient is
that of a soft choice (straight-through). Only training runs this: what is reported, and what users run, are slices.

Gumbel noise and exact norms: Nemotron Elastic, arXiv 2511.16664, equations 6-11 and 20-51.
Shapes: B batch, S sequence, D hidden, K sizes of an axis, F neurons, C sizes of all places (`surrogate.py`).
"""

import random
from typing import Any

import torch

from modeling_flextron import FlextronConfig, SubNetwork
from modeling_flextron.subnetwork import RoutedSubNetwork
from modeling_flextron.token_routing import TokenRouting

from .surrogate import Places


def unit_gates(at_least: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Gates of all units `[..., sizes[0]]`, from how likely each of the descending sizes is reached, `[..., K]`."""
    smaller = [*sizes[1:], 0]
    counts = torch.tensor([size - less for size, less in zip(sizes, smaller, strict=True)], device=at_least.device)
    return at_least.flip(-1).repeat_interleave(counts.flip(0), dim=-1)


class RelaxedSizes:
    """One choice in every place, the same for all tokens, as gates.

    Args:
        places: Where sizes are chosen.
        choice: `[C]`, one-hot in every place with the gradient of a soft choice.
    """

    def __init__(self, places: Places, choice: torch.Tensor):
        hidden, _, *rest = places.split(choice)
        sizes = places.config.choices("hidden")
        self.channels = unit_gates(hidden.cumsum(-1), sizes) if len(sizes) > 1 else None
        self.keep = places.keep(choice[None])[0]
        self.head_dim = places.config.head_dim
        self.mlp = [unit_gates(part.cumsum(-1), places.config.choices("mlp")) for part in rest[: places.layers]]
        self.heads = [unit_gates(part.cumsum(-1), places.config.choices("heads")) for part in rest[places.layers :]]

    def norm(self, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """A norm over the chosen channels."""
        return module(hidden_states) if self.channels is None else module(hidden_states, self.channels)

    def attend(self, module: Any, hidden_states: torch.Tensor, heads: int | None, **kwargs) -> torch.Tensor:
        """The attention of a layer with gates on its heads."""
        gate = self.heads[module.layer_idx][: module.q_proj.out_features // self.head_dim]
        gate = gate.repeat_interleave(self.head_dim).to(hidden_states.dtype)
        return module(hidden_states, heads=heads, gate=gate, **kwargs)[0] * self.keep[module.layer_idx]

    def feed(self, module: Any, hidden_states: torch.Tensor, mlp: int | None, hidden: int | None) -> torch.Tensor:
        """The MLP of a layer with gates on its neurons."""
        gate = self.mlp[module.layer_idx][: module.up_proj.out_features].to(hidden_states.dtype)
        return module(hidden_states, mlp, hidden, gate=gate) * self.keep[module.layer_idx]


class RelaxedTokens(TokenRouting):
    """Token routing with gradients for the routers, and with logistic noise on the needs.

    Args:
        subnetwork: Bounds and target.
        tokens: As in `TokenRouting`.
        temperature: Width of the noise and of the soft gates, in units of the need; the noise is 0 when `seed` is None.
        seed: Of the noise.
        row: Which row of the step's whole batch the first one here is, over all processes and accumulated batches. A
            token has the same noise however the batch is divided.
    """

    def __init__(
        self,
        config: FlextronConfig,
        subnetwork: RoutedSubNetwork,
        tokens: torch.Tensor | None,
        temperature: float,
        seed: str | None,
        row: int = 0,
    ):
        super().__init__(config, subnetwork, tokens)
        self.temperature, self.seed, self.row = temperature, seed, row

    def attend(
        self, module: Any, hidden_states: torch.Tensor, heads: int | None, past_key_values: Any = None, **kwargs
    ) -> torch.Tensor:
        """The attention of a layer, full, with gates on the heads of every token."""
        sizes, gate = self._gates(module, "heads", hidden_states)
        embeddings = kwargs["position_embeddings"]
        key, value = module.keys_and_values(hidden_states, embeddings, past_key_values, sizes[0], kwargs)
        gate = gate.repeat_interleave(module.head_dim, dim=-1).to(hidden_states.dtype)
        return module.forward(hidden_states, keys_and_values=(key, value), heads=sizes[0], gate=gate, **kwargs)[0]

    def feed(self, module: Any, hidden_states: torch.Tensor, mlp: int | None, hidden: int | None) -> torch.Tensor:
        """The MLP of a layer, full, with gates on the neurons of every token."""
        sizes, gate = self._gates(module, "mlp", hidden_states)
        return module(hidden_states, sizes[0], hidden, gate=gate.to(hidden_states.dtype))

    def _gates(self, module: Any, axis: str, hidden_states: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """The sizes of a part, and the gates `[B, S, sizes[0]]` of every token."""
        sizes, borders = self.sizes(axis, module.layer_idx)
        need = module.router(hidden_states, self.position.to(hidden_states.device)) + self.offset
        if self.seed is not None:
            noise = self._noise(f"{self.seed}/{axis}/{module.layer_idx}", *need.shape)
            need = need + self.temperature * noise.to(need.device)
        soft = ((need[..., None] - torch.tensor(borders, device=need.device)) / self.temperature).sigmoid()
        at_least = (soft > 0.5).float() + soft - soft.detach()  # [B, S, K - 1]; all tokens reach the smallest size
        at_least = torch.cat([at_least, torch.ones_like(need)[..., None]], dim=-1)
        if self.tokens is not None:
            smallest = torch.tensor([0.0] * len(borders) + [1.0], device=need.device)
            at_least = torch.where(self.tokens.to(need.device)[..., None], at_least, smallest)
        gate = unit_gates(at_least, sizes)
        getattr(self, axis)[module.layer_idx] = gate.sum(-1)
        return sizes, gate

    def _noise(self, name: str, rows: int, length: int) -> torch.Tensor:
        """Logistic noise `[rows, length]`; that of a row begins the same at every length."""
        generator, result = torch.Generator(), []
        for row in range(self.row, self.row + rows):
            generator.manual_seed(random.Random(f"{name}/{row}").getrandbits(48))
            result.append(torch.rand(length, generator=generator))
        return torch.stack(result).clamp(1e-6, 1 - 1e-6).logit()


def bounds_for(config: FlextronConfig, subnetwork: SubNetwork, within: SubNetwork | None) -> dict[str, Any]:
    """The entry of a target whose bounds are the hidden size, layers and heads of a sub-network.

    Args:
        subnetwork: What a static choice gives for the target.
        within: The bounds of the next larger target, which must contain these.
    """
    hidden, layers = subnetwork.hidden, subnetwork.layers
    heads = dict(zip(layers, subnetwork.heads, strict=True))
    if within is not None:
        limits = dict(zip(within.layers, within.heads, strict=True))
        hidden, layers = min(hidden, within.hidden), config.kept_layers(min(len(layers), len(limits)))
        heads = {layer: min(heads[layer], limits[layer]) for layer in layers}
    bounds = {"hidden": hidden, "layers": len(layers), "heads": [heads[layer] for layer in layers]}
    return bounds | {"offset": 0.0, "cost": None}
