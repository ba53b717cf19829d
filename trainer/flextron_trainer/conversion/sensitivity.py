"""Predicts what it costs in nats when a layer writes something else, to second order, before anything is cut.

Where a layer writes `y + e` instead of `y` into the residual stream, the divergence from the parent's predictions is
about `e^T F e / 2` per token, with the Fisher information `F = E[g g^T]` of the stream there: `g` is the gradient of
the log-likelihood of a next token that the model itself draws (K-FAC, arXiv 1503.05671, section 2). With second moments
of what a matrix reads, this says of every number of leading units what is lost when the rest goes, also where those
left make up for it, and so which layers had better be narrow (`rows_by_prediction`). It also says which part of the
best correction of a matrix is worth its parameters (`moments.low_rank`).

Errors and gradients are relative to the size of the stream at each token, as in `reconstruction.py`. Tokens whose state
has ten times the usual mean square (attention sinks) are left out: no error of this size reaches their predictions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig
from modeling_flextron.frontier import FrontierRow
from modeling_flextron.static_router import Candidate, Step, repaired
from modeling_flextron.subnetwork import SubNetwork, smallest_subnetwork

from ..layerwise import ModelBlocks, Text, run_half
from .moments import WRITERS, Moments, Read, least_squares, low_rank, matrix_name, regularised
from .reconstruction import token_weights
from .rows import limits_of, named_rows
from .search import candidate_of

SENSITIVITY_TOKENS = 8192
PREDICTION_RIDGE = 1e-3
OUTLIER = 10  # times the usual mean square of a state


def sensitivities(model: Any, batches: Sequence[torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Fisher information of the residual stream behind every matrix that writes into it.

    Takes a forward and a backward pass; in memory are the activations of one sequence and `8 L D^2` bytes.

    Args:
        model: A `FlextronForCausalLM` at full size.
        batches: Token ids `[B, S]`.
        seed: Of the next tokens that the model draws.

    Returns:
        Name of a matrix -> `[D, D]` float32, per token.
    """
    size, device = model.config.hidden_size, model.device
    names = [matrix_name(i, axis) for i in range(len(model.model.layers)) for axis in WRITERS]
    found = {name: torch.zeros(size, size, device=device) for name in names}
    generator = torch.Generator(device).manual_seed(seed)
    sequences = [ids for batch in batches for ids in batch.split(1)]
    for ids in tqdm(sequences, desc="Sensitivity", unit="sequence"):
        with torch.enable_grad():
            streams = _streams(model, ids.to(device))
            logits = model.lm_head(model.model.norm(streams[-1])).float().flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            gradients = torch.autograd.grad(loss, streams)
        for name, stream, gradient in zip(names, streams, gradients, strict=True):
            weights = token_weights(stream.detach())
            usual = weights > weights.median() / OUTLIER
            relative = (gradient.float() * (usual / weights.sqrt())[..., None]).flatten(0, -2)
            found[name] += relative.T @ relative
    tokens = sum(ids.numel() for ids in sequences)
    return {name: total / tokens for name, total in found.items()}


def _streams(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """States `[B, S, D]` behind each half of each layer, in the order of `WRITERS`, with a graph between them."""
    blocks = ModelBlocks(model)
    states, found = blocks.embed(Text(ids)).detach().requires_grad_(), list[torch.Tensor]()
    for layer in model.model.layers:
        entering = states
        for half in WRITERS:
            states = run_half(blocks, layer, half, entering, states)[1]
            found.append(states)
    return found


@torch.no_grad()
def predicted_losses(
    model: Any,
    inputs: Iterable[Read],
    metrics: Mapping[str, torch.Tensor],
    corrections: float = 0.0,
) -> dict[str, list[list[float]]]:
    """Predict the loss for every number of leading units that a layer may keep.

    It lies between the loss of the slice and that of the best small matrix, as near to the latter as corrections of
    the likely rank bring it at half of the size.

    Args:
        model: A `FlextronForCausalLM`, its units sorted.
        inputs: Of `sorted_moments`, on this model.
        metrics: Of `sensitivities`, on this model.
        corrections: Part of its parameters that a row may own.

    Returns:
        `"heads"` and `"mlp"` -> layer -> number of units -> nats per token; for no units, what goes with the layer.
    """
    config = model.config
    units = {"heads": config.head_dim, "mlp": 1}
    each = corrections * config.parent_size() / config.num_hidden_layers / 4  # half of a layer, two matrices
    found: dict[str, list[list[float]]] = {axis: [] for axis in WRITERS}
    for layer, axis, weight, moments in inputs:
        metric = metrics[matrix_name(layer, axis)]
        sliced, fitted = leading_losses(moments, weight, metric)
        bias = model.get_submodule(matrix_name(layer, axis).removesuffix(".weight")).bias
        if bias is not None:  # it goes with the layer
            b, mean = bias.detach().double(), moments.input_sum.double() / moments.count
            more = 2 * (weight.double() @ mean) + moments.tokens / moments.count * b
            sliced[0] = fitted[0] = sliced[0] + (metric.double() @ b @ more).cpu() / 2
        rank = int(each / (weight.shape[0] + weight.shape[1] / 2))
        missed = 1.0 if not rank else _missed(moments, weight, metric, rank)
        found[axis].append((fitted + missed * (sliced - fitted))[:: units[axis]].tolist())
    return found


def leading_losses(
    moments: Moments, weight: torch.Tensor, metric: torch.Tensor, ridge: float = PREDICTION_RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats per token that are lost with the first k columns alone: as they are, and fitted anew; `[K + 1]` float64.

    With `C = L L^T` the first k inputs determine the first k of the white variables `L^-1 h`; what `W` writes from the
    others is lost for any matrix that reads the first k.

    Args:
        moments: Of what the matrix reads.
        weight: `[D, K]`.
        metric: `[D, D]`, see `sensitivities`.
        ridge: See `regularised`: what is not repeatable is not counted on.
    """
    w, inputs = weight.double(), regularised(moments.inputs, ridge) / moments.count
    pairs = (w.T @ (metric.double() @ w)).mul_(inputs)
    sliced = pairs.flip(0, 1).cumsum_(0).cumsum_(1).diagonal().flip(0) / 2
    del pairs  # as large as the moments
    white = w @ torch.linalg.cholesky(inputs)
    fitted = ((metric.double() @ white) * white).sum(0).flip(0).cumsum(0).flip(0) / 2
    end = fitted.new_zeros(1)
    return torch.cat([sliced, end]).cpu(), torch.cat([fitted, end]).cpu()


def _missed(moments: Moments, weight: torch.Tensor, metric: torch.Tensor, rank: int) -> float:
    """The part of what the best matrix of half the columns gains that a change of a rank does not."""
    half = weight.shape[1] // 2
    part = moments.leading(half, weight)
    *_, gains = low_rank(least_squares(part, weight[:, :half]), part.inputs, metric=metric)
    return 1 - float(gains[:rank].sum() / gains.sum().clamp_min(1e-30))


def rows_by_prediction(
    config: FlextronConfig,
    budgets: Mapping[str, Any],
    losses: Mapping[str, list[list[float]]],
    corrections: float = 0.0,
) -> list[FrontierRow]:
    """The full network, and for each budget the sub-network of which least is predicted to be lost.

    Every layer gets sizes of its own, and layers may go; `hidden`, of which nothing is known, shrinks last. Each row
    contains the next.

    Args:
        budgets: Name of a row -> its budget, see `named_budgets`.
        losses: Of `predicted_losses`.
        corrections: As in `limit_of`.
    """

    def lost(candidate: Candidate) -> float:
        kept = set(config.kept_layers(candidate.depth))
        sizes = {"mlp": candidate.mlp, "heads": candidate.heads}
        return sum(
            losses[axis][layer][size if layer in kept else 0]
            for axis, every in sizes.items()
            for layer, size in enumerate(every)
        )

    def more_lost(candidate: Candidate, step: Step) -> float:
        if step.layer is None:
            return lost(candidate.after(step)) - lost(candidate)
        of_layer = losses[step.axis][step.layer]
        return of_layer[step.size] - of_layer[getattr(candidate, step.axis)[step.layer]]

    def best(candidate: Candidate, steps: list[tuple[Step, float]]) -> Step:
        # Nothing is known of `hidden`: it goes last.
        return min(steps, key=lambda s: (s[0].axis == "hidden", more_lost(candidate, s[0]) / (abs(s[1]) or 1)))[0]

    limits = limits_of(config, budgets, corrections)
    smallest, outer, chosen = smallest_subnetwork(config), config.built, list[SubNetwork]()
    for cost, limit in limits.values():
        if cost(smallest) > limit:
            outer = smallest
        elif cost(outer) > limit:
            found = repaired(config, candidate_of(config, outer), cost, limit, best)
            outer = found.subnetwork(config).intersection(outer)
        chosen.append(outer)
    return named_rows(config, budgets, limits, chosen)
