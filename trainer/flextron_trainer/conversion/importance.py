"""Scores the importance of each neuron, head, channel and layer, from forward passes alone.

The score of a unit is the L2 norm over samples of its mean absolute activation over the sequence, in float32
(Minitron, arXiv 2407.14679, section 2.2; the aggregation its Table 13 finds best):

* neuron: at the input of the down projection;
* head: at the input of the output projection, L2 over the head's channels;
* hidden channel: at the output of every norm of a layer, summed over the norms;
* layer: how far its output turns from its input, `1 - cos(h_in, h_out)`, or the order in which layers are best
  dropped one after the other by the error on the logits (Nemotron Elastic, arXiv 2511.16664, equation 5).
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from modeling_flextron.errors import invalid
from modeling_flextron.families import stored_heads

from ..files import write_file_beside
from ..layerwise import Walk, digest, portions_of
from .moments import MOMENT_TOKENS

CONTROLS = ("random", "reverse")


@dataclass(frozen=True)
class Importance:
    """Scores of one parent, in the parent's own order. L layers, F neurons, H query heads, D channels.

    Args:
        mlp: `[L, F]` float32.
        heads: `[L, H]` float32.
        hidden: `[D]` float32.
        layers: `[L]` float32.
        layer_ranking: `[n]` int64, layers in the order in which they are best dropped; empty until depth needs it.
    """

    mlp: torch.Tensor
    heads: torch.Tensor
    hidden: torch.Tensor
    layers: torch.Tensor
    layer_ranking: torch.Tensor

    def save(self, path: str | os.PathLike, parent: str, data: str) -> None:
        """Write the scores as safetensors, with the fingerprints of the parent and of the data they belong to."""
        tensors = {field.name: getattr(self, field.name).cpu().contiguous() for field in fields(self)}
        with write_file_beside(path) as file:
            save_file(tensors, file, metadata={"parent": parent, "data": data})

    @classmethod
    def load(cls, path: str | os.PathLike, parent: str) -> tuple["Importance", str]:
        """Read scores that `save` wrote, and the fingerprint of the data they were measured on.

        Raises:
            ValueError: the file holds the scores of another parent, or something else.
        """
        names = [field.name for field in fields(cls)]
        try:
            with safe_open(path, framework="pt") as file:
                owner = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
        except Exception as error:
            rule = f"It is not a file of importance scores ({error})."
            raise invalid("importance", str(path), rule, "Delete it to compute the scores again.") from error
        if owner.get("parent") != parent:
            rule = "It holds the scores of another parent."
            raise invalid("importance", str(path), rule, "Pass another path, or delete it to compute them again.")
        return cls(**tensors), owner.get("data", "")

    def reordered(self, order: str, seed: int) -> "Importance":
        """The same scores for an ablation: `"random"` draws new ones, `"reverse"` turns every ranking around.

        Any other order leaves them as they are.
        """
        if order not in CONTROLS:
            return self
        generator = torch.Generator().manual_seed(seed)
        change: Callable[[torch.Tensor], torch.Tensor] = (
            torch.neg if order == "reverse" else lambda scores: torch.rand(scores.shape, generator=generator)
        )
        return replace(self, mlp=change(self.mlp), heads=change(self.heads), hidden=change(self.hidden))


def fingerprint(model) -> str:
    """Make a short text that tells two parents apart: shapes, and a digest of a few values of every tensor."""
    return digest(sorted(model.state_dict().items()))


def fingerprint_of_data(config: Any, batches: Sequence[torch.Tensor], rotated: bool = False) -> str:
    """Make a short text that tells calibrations apart: by the text in its rows, and by how such a model reads it."""
    read = (config.rope_parameters, config.sliding_window, config.norm_eps, config.hidden_act, str(config.dtype))
    found = hashlib.sha256(repr((rotated, batches and batches[0].shape[1:], *read)).encode())
    for batch in batches:
        found.update(batch.numpy().tobytes())
    return found.hexdigest()[:16]


class _Statistics:
    """Running sums over samples, one for every place that the decoder shows.

    `energy` holds `sum (mean over the sequence of |activation|)^2` per unit; a kind that a layer shows twice (its
    norms) is kept apart. `turns` holds the sum of `1 - cos(input, output)` per layer.
    """

    def __init__(self) -> None:
        self.energy: dict[tuple[str, int, int], torch.Tensor] = {}
        self.turns: dict[int, torch.Tensor] = {}

    def observe(self, kind: str, layer: int, *activations: torch.Tensor) -> None:
        """Add activations `[B, S, C]` of one batch."""
        if kind == "layer":
            before, after = (states.float() for states in activations)
            turn = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
            self.turns[layer] = self.turns.get(layer, 0) + turn.cpu()
            return
        for place, activation in enumerate(activations):
            energy = activation.float().abs().mean(dim=1).square().sum(dim=0).cpu()
            key = (kind, layer, place)
            self.energy[key] = self.energy.get(key, 0) + energy

    def scores(self, kind: str) -> torch.Tensor:
        """`[L, C]`: the roots of the sums, added up over the places within each layer."""
        layers: dict[int, torch.Tensor] = {}
        for (found, layer, _), energy in self.energy.items():
            if found == kind:
                layers[layer] = layers.get(layer, 0) + energy.sqrt()
        return torch.stack([layers[layer] for layer in sorted(layers)])


@torch.no_grad()
def measure(model, batches: Sequence[torch.Tensor]) -> Importance:
    """Score every unit of an elastic model whose weights are still in the parent's order.

    Args:
        model: A `FlextronForCausalLM` at full size.
        batches: Token ids `[B, S]`.
    """
    statistics, walk = _Statistics(), Walk(model)
    for part in tqdm(list(portions_of(batches, MOMENT_TOKENS)), desc="Importance", unit="part"):
        walk.all(part, statistics.observe)
    by_channel = statistics.scores("heads")
    return Importance(
        mlp=statistics.scores("mlp"),
        heads=_in_parent_order(model.config, by_channel),
        hidden=statistics.scores("hidden").sum(dim=0),
        layers=torch.stack([statistics.turns[layer] for layer in sorted(statistics.turns)]) / len(batches),
        layer_ranking=torch.empty(0, dtype=torch.int64),
    )


def _in_parent_order(config, by_channel: torch.Tensor) -> torch.Tensor:
    """Scores `[L, H]` of the parent's heads from those `[L, H E]` of the stored channels of all heads."""
    stored = torch.tensor(stored_heads(config.num_attention_heads, config.num_key_value_heads))
    scores = torch.empty(by_channel.shape[0], config.num_attention_heads)
    scores[:, stored] = by_channel.unflatten(1, (config.num_attention_heads, config.head_dim)).norm(dim=-1)
    return scores


@torch.no_grad()
def from_weights(model) -> Importance:
    """Scores without any data: products of the norms of the weights around each unit.

    Far weaker than `measure`: a large weight says nothing about how often it is used.
    """
    tensors = model.state_dict()
    mlp, heads, layers = [], [], []
    for layer in range(model.config.num_hidden_layers):
        q, o, up, down = (
            tensors[f"model.layers.{layer}.{name}_proj.weight"].float().cpu()
            for name in ("self_attn.q", "self_attn.o", "mlp.up", "mlp.down")
        )
        mlp.append(up.norm(dim=1) * down.norm(dim=0))
        heads.append(q.norm(dim=1) * o.norm(dim=0))
        layers.append(o.norm() * down.norm())
    return Importance(
        mlp=torch.stack(mlp),
        heads=_in_parent_order(model.config, torch.stack(heads)),
        hidden=tensors["model.embed_tokens.weight"].norm(dim=0, dtype=torch.float32).cpu(),
        layers=torch.stack(layers),
        layer_ranking=torch.empty(0, dtype=torch.int64),
    )


@torch.no_grad()
def rank_layers(model, batches: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The `count` layers that are best dropped, one after the other, by the error on the logits.

    In every round the layer goes whose absence changes the logits least:
    `sum (logits_full - logits_without)^2 / sum logits_full^2`. The first layer of each kind of attention stays.

    A network without a layer begins where that layer does, on the states that the layers before it wrote, and ends
    before the logits: their square is a quadratic form of what the head reads. So one round takes half a pass for each
    candidate, and in memory are two states of one batch beside what the head reads of all.
    """
    walk, square = Walk(model), _squared_logits(model.lm_head.weight)
    whole = walk.all(batches)
    energy = sum(square(states) for states in whole)
    remaining, ranking, anchors = list(model.built.layers), list[int](), model.config.anchors()
    passes = sum(len(remaining) - len(anchors) - i for i in range(count)) * len(batches)
    with tqdm(desc="Layer ranking", unit="network", total=passes) as progress:
        for _ in range(count):
            errors = {layer: 0.0 for layer in remaining if layer not in anchors}
            for ids, full in zip(batches, whole, strict=True):
                states = walk.embed(ids.to(model.device))
                for at, layer in enumerate(remaining):
                    if layer in errors:
                        without = states
                        for later in remaining[at + 1 :]:
                            without = walk.run(later, without)
                        errors[layer] += square(walk.end(without).float() - full.float())
                        progress.update()
                    states = walk.run(layer, states)
            progress.set_postfix(error=min(errors.values()) / energy)
            ranking.append(min(errors, key=lambda layer: errors[layer]))
            remaining.remove(ranking[-1])
    return torch.tensor(ranking, dtype=torch.int64)


def _squared_logits(head: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """A function that sums the squares of the logits of states `[..., D]` under a head `[V, D]`, without logits."""
    gram = torch.zeros(head.shape[1], head.shape[1], device=head.device)
    for part in head.split(2**14):
        gram.addmm_(part.float().T, part.float())
    return lambda states: ((states.float() @ gram) * states.float()).sum().item()


def read_or_measure(
    path: str | os.PathLike | None, model, batches: Sequence[torch.Tensor], depth_drops: int, parent: str, data: str
) -> Importance:
    """Scores from `path` when it has those of this parent and data, and otherwise (or what is missing) measured.

    Args:
        path: Where the scores are kept, or None to keep them nowhere. Scores of other data are replaced.
        model: The elastic model in the parent's order.
        batches: Calibration batches; empty to fall back to the norms of the weights.
        depth_drops: How many layers the smallest depth drops.
        parent, data: Fingerprints of both.
    """
    known = None
    if path is not None and Path(path).exists():
        known, measured_on = Importance.load(path, parent)
        if batches and measured_on != data:
            warnings.warn(
                f"The scores in {path} were measured on other calibration data. They are measured again.", stacklevel=3
            )
            known = None
    scores = known or (measure(model, batches) if batches else from_weights(model))
    if len(scores.layer_ranking) < depth_drops:
        if batches:
            ranking = rank_layers(model, batches[: max(1, len(batches) // 16)], depth_drops)
        else:
            order = scores.layers.argsort().tolist()
            ranking = torch.tensor([layer for layer in order if layer not in model.config.anchors()][:depth_drops])
        scores = replace(scores, layer_ranking=ranking)
    if path is not None and scores is not known and batches:
        scores.save(path, parent, data)
    return scores
