"""Run a decoder layer by layer on states that are given.

A layer is run on all of a text before the next one: so it is read once, wherever its weights are, and is alone in
memory where it need be; and nothing is computed again that is known of the layers before.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from modeling_flextron.corrections import Owner, number_of_owner
from modeling_flextron.positions import attention_masks, documents
from modeling_flextron.subnetwork import SubNetwork

Sizes = dict[str, Any]  # keywords of a layer: `hidden`, `mlp` and `heads`, None where they are full, and `owner`
FULL: Sizes = {"hidden": None}


@dataclass(frozen=True)
class Text:
    """Sequences to read.

    Args:
        input_ids: `[N, S]`.
        attention_mask: `[N, S]` with zeros at padding; None without any.
        position_ids: `[N, S]` that keep documents apart; None where each sequence is one.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    def at(self, places: Sequence[int], device: torch.device | str) -> "Text":
        """Some of the sequences, on a device."""
        parts = (self.input_ids, self.attention_mask, self.position_ids)
        return Text(*(part if part is None else part[list(places)].to(device) for part in parts))  # type: ignore[arg-type]


class Blocks(Protocol):
    """The layers of an elastic model, of which one at a time need be in memory."""

    config: Any
    owners: Sequence[Owner]
    device: torch.device
    dtype: torch.dtype
    rotary_emb: Any  # gives cosines and sines of positions; None where those are learned

    def embed(self, text: Text) -> torch.Tensor:
        """States `[B, S, D]` before the first layer."""

    def layer(self, number: int) -> AbstractContextManager[torch.nn.Module]:
        """A layer, on the device; what it learns inside of the block must be taken from it there."""

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the output head, `[V, D]`, and of the norm before it, `[D]`, wherever they are."""


class ModelBlocks:
    """The layers of a model in memory, which change in place."""

    def __init__(self, model: Any):
        self.model, self.decoder = model, model.base_model
        self.config, self.owners = self.decoder.config, self.decoder.owners
        self.device, self.dtype = self.decoder.device, self.decoder.dtype
        self.rotary_emb = self.decoder.rotary_emb

    def embed(self, text: Text) -> torch.Tensor:
        states = self.decoder.embed_tokens(text.input_ids)
        if self.decoder.embed_positions is None:
            return states
        return states + self.decoder.embed_positions(positions_of(states, text))

    @contextmanager
    def layer(self, number: int) -> Iterator[torch.nn.Module]:
        layer = self.decoder.layers[number]
        training = layer.training
        try:
            yield layer.eval()
        finally:
            layer.train(training)

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.get_output_embeddings().weight.detach(), self.decoder.norm.weight.detach()


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Make a short text that tells models apart: shapes, and a few values of every tensor."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().flatten()[:: max(1, tensor.numel() // 16)][:16].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def positions_of(states: torch.Tensor, text: Text | None = None) -> torch.Tensor:
    """Positions of the tokens of `states` `[B, S, D]`; None for a text in each row that begins at 0."""
    if text is not None and text.position_ids is not None:
        return text.position_ids
    return torch.arange(states.shape[1], device=states.device)[None]


def surroundings(blocks: Blocks, layer: Any, states: torch.Tensor, text: Text | None = None) -> dict[str, Any]:
    """What a layer is called with beside states and sizes: its mask, and where tokens are; `text` as `positions_of`."""
    mask, ids = (None, None) if text is None else (text.attention_mask, text.position_ids)
    places = documents(ids, mask, None, False)
    masks, options = attention_masks(blocks.config, states, mask, None, places)
    positions, rotary = positions_of(states, text), blocks.rotary_emb
    return {
        "attention_mask": masks[blocks.config.layer_types[layer.layer_idx]],
        "position_ids": positions if places is None else places,
        # the same for every head
        "position_embeddings": rotary and tuple(part.unsqueeze(1) for part in rotary(states, positions)),
        **options,
    }


def sizes_of(blocks: Blocks, subnetwork: SubNetwork) -> dict[int, Sizes]:
    """Layer that a sub-network keeps -> what it is called with there."""
    built, owner = blocks.config.built, number_of_owner(blocks.owners, subnetwork)
    hidden = None if subnetwork.hidden == built.hidden else subnetwork.hidden
    return {
        layer: {
            "hidden": hidden,
            "mlp": None if mlp == built.mlp[layer] else mlp,
            "heads": None if heads == built.heads[layer] else heads,
            "owner": owner,
        }
        for layer, mlp, heads in zip(subnetwork.layers, subnetwork.mlp, subnetwork.heads, strict=True)
    }


def run_layer(
    blocks: Blocks, layer: torch.nn.Module, states: torch.Tensor, text: Text | None = None, sizes: Sizes = FULL,
    observe: Any = None,
) -> torch.Tensor:  # fmt: skip
    """States `[B, S, d]` behind a layer, of the leading channels of those before; `text` as in `positions_of`."""
    around = surroundings(blocks, layer, states, text)
    return layer(states[..., : sizes["hidden"]], **sizes, **around, observe=observe)


def run_half(
    blocks: Blocks, layer: Any, half: str, entering: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a half of a layer at full size.

    Args:
        half: `"heads"` for the attention, `"mlp"` for the MLP.
        entering: States `[B, S, D]` before the layer.
        states: Those before this half.

    Returns:
        What its last matrix reads, and the states behind it.
    """
    if half == "heads":
        normed, around = layer.input_layernorm(states), surroundings(blocks, layer, states)
        read, (written, _) = observed(layer.self_attn, normed, **around)
    else:
        normed = layer.post_attention_layernorm(entering if layer.parallel_residual else states)
        read, written = observed(layer.mlp, normed)
    return read, states + written


def observed(module: torch.nn.Module, normed: torch.Tensor, **how: Any) -> tuple[torch.Tensor, Any]:
    """What the last matrix of an attention or an MLP reads of states that are normed already, and what comes of it."""
    found: list[torch.Tensor] = []
    output = module(normed, observe=lambda _, __, states: found.append(states), **how)
    return found[0], output


class Walk:
    """A sub-network of a model in memory, layer by layer, on texts that begin at position 0.

    Args:
        model: In evaluation mode.
        subnetwork: None for everything that is built.
    """

    def __init__(self, model: Any, subnetwork: SubNetwork | None = None):
        self.blocks = ModelBlocks(model)
        self.subnetwork = subnetwork or self.blocks.config.built
        self.sizes = sizes_of(self.blocks, self.subnetwork)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """States before the first layer."""
        return self.blocks.embed(Text(ids))[..., : self.subnetwork.hidden]

    def run(self, number: int, states: torch.Tensor, observe: Any = None) -> torch.Tensor:
        """States behind a layer."""
        with self.blocks.layer(number) as layer:
            return run_layer(self.blocks, layer, states, None, self.sizes[number], observe)

    def end(self, states: torch.Tensor) -> torch.Tensor:
        """What the head reads, of states behind the last layer."""
        owner, decoder = number_of_owner(self.blocks.owners, self.subnetwork), self.blocks.decoder
        return (decoder if owner is None else decoder.corrections[owner]).norm(states)

    def all(self, batches: Sequence[torch.Tensor], observe: Any = None) -> list[torch.Tensor]:
        """What the head reads of batches of ids `[B, S]`, whose states are in memory at the same time."""
        states = [self.embed(ids.to(self.blocks.device)) for ids in batches]
        for number in self.subnetwork.layers:
            states = [self.run(number, x, observe) for x in states]
        return [self.end(x) for x in states]


def portions_of(batches: Sequence[torch.Tensor], tokens: int) -> Iterator[Sequence[torch.Tensor]]:
    """Batches `[B, S]` in runs of at most so many tokens, or of one batch: their states are in memory together."""
    start = held = 0
    for end, batch in enumerate(batches):
        if held and held + batch.numel() > tokens:
            yield batches[start:end]
            start, held = end, 0
        held += batch.numel()
    yield batches[start:]
