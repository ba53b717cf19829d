"""Run a decoder layer by layer on states that are given.

What calibration asks of a model it asks of one layer for all of its text, before it goes on to the next: a layer is
read once, wherever its weights are, and what is known of the layers before is not computed again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from modeling_flextron.corrections import number_of_owner
from modeling_flextron.elastic import project
from modeling_flextron.positions import MASKS
from modeling_flextron.subnetwork import SubNetwork


class Walk:
    """A sub-network of a decoder, one part after the other, on rows of tokens that begin at position 0.

    Args:
        decoder: A `FlextronModel` in evaluation mode.
        subnetwork: None for everything that is built.
    """

    def __init__(self, decoder: Any, subnetwork: SubNetwork | None = None):
        built = decoder.built
        self.decoder, self.config, self.subnetwork = decoder, decoder.config, subnetwork or built
        self.hidden = None if self.subnetwork.hidden == built.hidden else self.subnetwork.hidden
        self.owner = number_of_owner(decoder.owners, self.subnetwork)
        self.sizes = {
            layer: {
                "mlp": None if mlp == built.mlp[layer] else mlp,
                "heads": None if heads == built.heads[layer] else heads,
            }
            for layer, mlp, heads in zip(
                self.subnetwork.layers, self.subnetwork.mlp, self.subnetwork.heads, strict=True
            )
        }

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """States `[B, S, D]` before the first layer."""
        states = project(self.decoder.embed_tokens, ids, self.hidden)
        if self.decoder.embed_positions is None:
            return states
        return states + project(self.decoder.embed_positions, _positions(states), self.hidden)

    def around(self, layer: int, states: torch.Tensor) -> dict[str, Any]:
        """What the attention of a layer needs beside states: cosines and sines, and the mask."""
        embeddings = None
        if self.decoder.rotary_emb is not None:
            cos, sin = self.decoder.rotary_emb(states, _positions(states))
            embeddings = cos.unsqueeze(1), sin.unsqueeze(1)
        mask = MASKS[self.config.layer_types[layer]](self.config, states, None, None)
        return {"position_embeddings": embeddings, "attention_mask": mask}

    def run(self, layer: int, states: torch.Tensor, observe: Any = None) -> torch.Tensor:
        """States behind a layer."""
        return self.decoder.layers[layer](
            states, **self.sizes[layer], hidden=self.hidden, owner=self.owner, observe=observe,
            **self.around(layer, states),
        )  # fmt: skip

    def end(self, states: torch.Tensor) -> torch.Tensor:
        """What the head reads, of states behind the last layer."""
        ends = self.decoder if self.owner is None else self.decoder.corrections[self.owner]
        return ends.norm(states)

    def all(self, batches: Sequence[torch.Tensor], observe: Any = None) -> list[torch.Tensor]:
        """What the head reads of batches of ids `[B, S]`, whose states are in memory at the same time."""
        states = [self.embed(ids.to(self.decoder.device)) for ids in batches]
        for layer in self.subnetwork.layers:
            states = [self.run(layer, x, observe) for x in states]
        return [self.end(x) for x in states]


def parts_of(batches: Sequence[torch.Tensor], tokens: int) -> Iterator[Sequence[torch.Tensor]]:
    """Batches `[B, S]` in runs of at most so many tokens, or of one batch: their states are in memory together."""
    start = held = 0
    for end, batch in enumerate(batches):
        if held and held + batch.numel() > tokens:
            yield batches[start:end]
            start, held = end, 0
        held += batch.numel()
    yield batches[start:]


def _positions(states: torch.Tensor) -> torch.Tensor:
    return torch.arange(states.shape[1], device=states.device)[None]
