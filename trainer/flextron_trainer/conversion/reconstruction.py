"""Fits corrections of rows by linear algebra: they bring back a part of what is lost when units are cut.

A row of the frontier runs the leading units that `down_proj` and `o_proj` read. What it writes differs from what the
parent writes, in part by what the units that are left could make up for (`moments.py`): low-rank corrections of these
matrices bring the residual stream of the row nearer to that of the parent, layer by layer.

Errors are relative to the size of the residual stream at each token: a norm comes behind it, so that is what the next
layer sees, and errors of all layers can be compared.

A row owns its corrections. The weights that it shares with the other rows stay as they are, so the full network stays
the parent.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron.corrections import Owner
from modeling_flextron.permutation import Permutation
from modeling_flextron.subnetwork import SubNetwork, count_parameters

from ..layerwise import ModelBlocks, Text, observed, run_half, run_layer, surroundings
from .moment_files import MomentFiles
from .moments import WRITERS, Moments, Read, allocate, least_squares, low_rank, matrix_name, norm_scale
from .weights import order_since

LIKELY = 10  # times the mean rank


@dataclass(frozen=True)
class Corrections:
    """Tensors that one row of the frontier adds to the weights that it shares with the others.

    Names are those of the parameters of the full elastic model, so `layers.3` is layer 3 whether or not others are
    dropped. `d` and `k` are the sizes of the row, `r` the rank, which differs between matrices.

    Args:
        low_rank: Name of a matrix -> `up` `[d, r]` and `down` `[r, k]`; the row runs `W[:d, :k] + up @ down`.
        vectors: Name of a parameter of a norm -> `[d]`, which the row uses in its place.
    """

    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]]
    vectors: dict[str, torch.Tensor]

    def owner(self, name: str, subnetwork: SubNetwork) -> Owner:
        """The row of this name and these sizes with them; its norms are its own whether or not they were fitted."""
        found = self.ranks
        ranks = {
            place.rpartition(".")[2]: tuple(found.get(matrix_name(layer, axis), 0) for layer in subnetwork.layers)
            for axis, place in WRITERS.items()
        }
        return Owner(name, subnetwork, ranks)

    @property
    def ranks(self) -> dict[str, int]:
        """Name of a matrix -> rank of its correction."""
        return {name: up.shape[1] for name, (up, _) in self.low_rank.items()}

    def cut(self, ranks: Mapping[str, int]) -> "Corrections":
        """Cut each to a lower rank."""
        kept = {name: ranks.get(name, 0) for name in self.low_rank}
        low_rank = {
            name: (up[:, : kept[name]].clone(), down[: kept[name]].clone())
            for name, (up, down) in self.low_rank.items()
            if kept[name]
        }
        return Corrections(low_rank, self.vectors)


@torch.no_grad()
def input_moments(model: Any, batches: Sequence[torch.Tensor], files: MomentFiles | None = None) -> Iterator[Read]:
    """Second moments of what `o_proj` and `down_proj` of every layer read in the whole model.

    One matrix at a time: in memory are `4 K^2` bytes for its `K` inputs and `4 T (2 D + K)` for the states of `T`
    tokens, whatever the number of layers. Tokens are weighted as in `reconstruct`; outputs are not counted.

    Args:
        model: A `FlextronForCausalLM`, at full size.
        batches: Token ids `[B, S]`.
        files: Where they are read from, when all are there, and kept otherwise.

    Yields:
        Number of the layer, `"heads"` or `"mlp"`, the matrix `[D, K]`, and the moments of what it reads.
    """
    blocks = ModelBlocks(model)
    if files is not None and files.complete(len(model.model.layers)):
        for i, layer in enumerate(model.model.layers):
            for axis, place in WRITERS.items():
                yield i, axis, layer.get_submodule(place).weight, files.load(i, axis, model.device)
        return
    states = [blocks.embed(Text(ids.to(model.device))) for ids in batches]
    for i, layer in enumerate(tqdm(model.model.layers, desc="Second moments", unit="layer")):
        entering = states
        for axis, place in WRITERS.items():
            matrix = layer.get_submodule(place)
            moments = Moments.zeros(matrix.in_features, 0, model.device)
            following = []
            for x, first in zip(states, entering, strict=True):
                h, behind = run_half(blocks, layer, axis, first, x)
                following.append(behind)
                moments.add(h, h[..., :0], token_weights(behind))
            states = following
            if files is not None:
                files.save(i, axis, moments)
            yield i, axis, matrix.weight, moments


@torch.no_grad()
def sorted_moments(model: Any, batches: Sequence[torch.Tensor], files: MomentFiles | None = None) -> Iterator[Read]:
    """`input_moments` of a model whose units are sorted, from files that were written before they were.

    Args:
        model: A `FlextronForCausalLM` at full size, with its permutation.
        batches: Token ids `[B, S]`, for what is in no file.
        files: Of `input_moments` with the units of the parent in their order.
    """
    if files is None or not files.complete(len(model.model.layers)):
        yield from input_moments(model, batches)
        return
    moved = order_since(Permutation.unsorted(model.config), model.permutation)
    for layer, axis, weight, moments in input_moments(model, batches, files):
        (order,) = moved.indices((axis,), layer)
        assert order is not None  # units of a layer have one
        order = order.to(weight.device)
        inputs = moments.inputs[order][:, order]
        yield layer, axis, weight, replace(moments, inputs=inputs, input_sum=moments.input_sum[order])


def token_weights(stream: torch.Tensor) -> torch.Tensor:
    """`[B, S]`: makes squared errors of states `[B, S, D]` relative to their size, which the next norm takes away."""
    return 1 / stream.float().square().mean(-1).clamp_min(1e-12)


def _walk_beside(
    model: Any,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    fit: Callable[[str, Callable[[], Moments], torch.Tensor], torch.Tensor],
    *,
    sequential: bool,
    norms: bool,
) -> dict[str, torch.Tensor]:
    """Walk through the layers of the parent and of a row side by side, and fit each matrix of the row.

    The layer before a dropped one is to write what that one wrote, too (ReplaceMe does this linearly).

    Args:
        fit: Gets the name of a matrix, what takes its moments, and the matrix `[d, k]`; returns what the row runs in
            its place.
        model, subnetwork, batches, sequential, norms: As in `reconstruct`.

    Returns:
        Name of a parameter of a norm -> what was fitted for it.
    """
    blocks, decoder, d = ModelBlocks(model), model.model, subnetwork.hidden
    vectors = dict[str, torch.Tensor]()
    parent = [blocks.embed(Text(ids.to(model.device))) for ids in batches]
    reduced = [states[..., :d] for states in parent]

    def normed(name: str, module: Any, ours: list[torch.Tensor], whole: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = [module(states) for states in ours]
        if not norms:
            return outputs
        aims = [module(states)[..., :d] for states in whole]
        both = sum((a.double() * o.double()).flatten(0, -2).sum(0) for a, o in zip(aims, outputs, strict=True))
        own = sum(o.double().square().flatten(0, -2).sum(0) for o in outputs)
        scale = norm_scale(both, own)
        for kind, parameter in module.named_parameters():
            vectors[f"{name}.{kind}"] = (parameter[:d].double() * scale).to(parameter.dtype)
        return [o * scale.to(o.dtype) for o in outputs]

    for at, i in enumerate(tqdm(subnetwork.layers, desc="Reconstructing", unit="layer", leave=False)):
        layer, prefix = decoder.layers[i], f"model.layers.{i}"
        # the parent, which is what the row is to become
        middle = [run_half(blocks, layer, "heads", states, states)[1] for states in parent]
        after = [run_half(blocks, layer, "mlp", *both)[1] for both in zip(parent, middle, strict=True)]
        following = (*subnetwork.layers, len(decoder.layers))[at + 1]
        for dropped in decoder.layers[i + 1 : following]:  # what they do is for this one to make up for
            after = [run_layer(blocks, dropped, states) for states in after]
        start = reduced
        for axis, aims in (("heads", middle), ("mlp", after)):
            if axis == "heads":
                inputs = normed(f"{prefix}.input_layernorm", layer.input_layernorm, start, parent)
                sizes = {"heads": subnetwork.heads[at], "hidden": d}
                reads = [observed(layer.self_attn, x, **sizes, **surroundings(blocks, layer, x))[0] for x in inputs]
            else:
                sides = (start, parent) if layer.parallel_residual else (reduced, middle)
                key = f"{prefix}.post_attention_layernorm"
                inputs = normed(key, layer.post_attention_layernorm, *sides)
                reads = [observed(layer.mlp, x, mlp=subnetwork.mlp[at], hidden=d)[0] for x in inputs]
            module = layer.get_submodule(WRITERS[axis])
            weight = module.weight[:d, : reads[0].shape[-1]]
            bias = 0 if module.bias is None else module.bias[:d]
            taken = partial(_moments_of, reads, aims, reduced, bias)
            fitted = fit(matrix_name(i, axis), taken, weight).to(weight.dtype)
            if sequential:
                reduced = [states + h @ fitted.T + bias for states, h in zip(reduced, reads, strict=True)]
            else:
                reduced = [states[..., :d] for states in aims]
        parent = after
    if norms:
        normed("model.norm", decoder.norm, reduced, parent)
    return vectors


def _moments_of(
    reads: list[torch.Tensor], aims: list[torch.Tensor], states: list[torch.Tensor], bias: torch.Tensor | int
) -> Moments:
    """Second moments of what a matrix reads and what it should add to states `[..., d]`, to reach the aims."""
    d = states[0].shape[-1]
    moments = Moments.zeros(reads[0].shape[-1], d, reads[0].device)
    for h, aim, x in zip(reads, aims, states, strict=True):
        moments.add(h, aim[..., :d] - x - bias, token_weights(aim))
    return moments


@torch.no_grad()
def reconstruct(
    model: Any,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    *,
    ranks: Mapping[str, int] | None = None,
    sequential: bool = True,
    norms: bool = False,
    metrics: Mapping[str, torch.Tensor] | None = None,
    share: float | None = None,
) -> tuple[Corrections, dict[str, torch.Tensor]]:
    """The corrections with which a row writes what the parent writes, as nearly as linear algebra gets.

    Args:
        model: A `FlextronForCausalLM` at full size; it is not changed.
        batches: Calibration batches `[B, S]`.
        ranks: Name of a matrix -> its rank; None for full ranks, an upper bound.
        sequential: Each layer reads what the corrected layers before it write; otherwise what the parent's write.
        norms: Fit the weights of the norms, too, channel by channel to the parent's outputs. It helps some parents much
            and harms others.
        metrics: Name of a matrix -> how much errors of its output count, `[D, D]`; see `sensitivity.py`.
        share: Of the row's parameters that it will own in the end; much higher ranks are then not kept.

    Returns:
        The corrections; and of each matrix that was fitted the error that each rank takes away.
    """
    low, gains = dict[str, tuple[torch.Tensor, torch.Tensor]](), dict[str, torch.Tensor]()

    def fit(name: str, taken: Callable[[], Moments], weight: torch.Tensor) -> torch.Tensor:
        rank = None if ranks is None else ranks.get(name, 0)
        if rank == 0:
            return weight
        moments = taken()
        metric = None if metrics is None else metrics[name][: len(weight), : len(weight)]
        up, down, worth = low_rank(least_squares(moments, weight), moments.inputs, metric=metric)
        up, down = up[:, :rank], down[:rank]
        kept = len(worth) if share is None else _likely_rank(model, subnetwork, share, weight)
        gains[name], low[name] = worth[:kept].float().cpu(), (up[:, :kept].float(), down[:kept].float())
        return weight.double() + up @ down

    vectors = _walk_beside(model, subnetwork, batches, fit, sequential=sequential, norms=norms)
    return Corrections(low, vectors), gains


def within(
    model: Any,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    share: float = 0.03,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> Corrections:
    """Corrections that are at most `share` of the non-embedding parameters of a row.

    They are fitted to layers that read what the parent's layers write.

    Args:
        model, subnetwork, batches, metrics: As in `reconstruct`.
        share: Of the row's parameters, norms included. Too little for its norms gives these alone.
    """
    full, gains = reconstruct(model, subnetwork, batches, sequential=False, metrics=metrics, share=share)
    return full.cut(_ranks(model, subnetwork, full, gains, share))


@torch.no_grad()
def from_inputs(
    model: Any,
    rows: Mapping[str, SubNetwork],
    moments: Iterable[Read],
    share: float,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Corrections]:
    """`within` of several rows at once, which keep all of `hidden`: one walk serves all of them.

    What such a row reads in a layer is a part of what the parent reads, so second moments of the latter say it all. But
    for what dropped layers did, which `within` also fits.

    Args:
        model: A `FlextronForCausalLM`, its units sorted.
        rows: Name -> sizes.
        moments: Of `input_moments`, on this model.
        share, metrics: As in `within` and `reconstruct`.
    """
    low: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {name: {} for name in rows}
    gains: dict[str, dict[str, torch.Tensor]] = {name: {} for name in rows}
    for layer, axis, weight, found in moments:
        matrix = matrix_name(layer, axis)
        for name, row in rows.items():
            if layer not in row.layers:
                continue
            at = row.layers.index(layer)
            count = row.mlp[at] if axis == "mlp" else row.heads[at] * model.config.head_dim
            if count == weight.shape[1]:
                continue
            part, slice_ = found.leading(count, weight), weight[:, :count]
            metric = None if metrics is None else metrics[matrix]
            up, down, worth = low_rank(least_squares(part, slice_), part.inputs, metric=metric)
            kept = _likely_rank(model, row, share, slice_)
            low[name][matrix] = up[:, :kept].float(), down[:kept].float()
            gains[name][matrix] = worth[:kept].float().cpu()
    fitted = {name: Corrections(found, {}) for name, found in low.items()}
    return {name: found.cut(_ranks(model, rows[name], found, gains[name], share)) for name, found in fitted.items()}


def _likely_rank(model: Any, subnetwork: SubNetwork, share: float, weight: torch.Tensor) -> int:
    """A rank that no matrix of a row is expected to get: what is kept is chosen when all of them are known."""
    budget = share * count_parameters(model.config, subnetwork, embeddings=False)
    return math.ceil(LIKELY * budget / (len(WRITERS) * len(subnetwork.layers) * sum(weight.shape)))


def _ranks(
    model: Any, subnetwork: SubNetwork, full: Corrections, gains: Mapping[str, torch.Tensor], share: float
) -> dict[str, int]:
    """Ranks of the corrections of a row with which it owns at most `share` of its parameters."""
    costs = {name: len(up) + down.shape[1] for name, (up, down) in full.low_rank.items()}
    norms = Corrections({}, {}).owner("", subnetwork).parameters(model.config)
    return allocate(gains, costs, share * count_parameters(model.config, subnetwork, embeddings=False) - norms)
