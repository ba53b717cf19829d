"""Orders in which neurons and heads are kept, and the choice among them by the loss of the slices.

* `importance`: by activation alone (`importance.py`);
* `norms`: times the norm of the outgoing weights;
* `variance`: variance of the activation times the squared norm of the outgoing weights (FLAP, arXiv 2312.11983);
* `obs`: greedy Optimal Brain Surgeon, the others making up for each unit that goes (`moments.removal_order`).

Which of them is best differs between models, so `best_order` asks the slices themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron.families import stored_heads
from modeling_flextron.subnetwork import SubNetwork

from .importance import Importance
from .moment_files import MomentFiles
from .moments import Moments, removal_order
from .reconstruction import input_moments

RANKINGS = ("importance", "norms", "variance", "obs")


@torch.no_grad()
def rankings(
    model: Any,
    scores: Importance,
    batches: Sequence[torch.Tensor],
    names: Sequence[str],
    files: MomentFiles | None = None,
) -> dict[str, Any]:
    """Scores of neurons and heads by several rules; those of channels and layers are `scores` in all of them.

    Args:
        model: A `FlextronForCausalLM` whose weights are still in the parent's order.
        scores: Of `importance.measure`, for this model.
        batches: Token ids `[B, S]`.
        names: Of `RANKINGS`.
        files: Where second moments are kept.

    Returns:
        Name -> `Importance`.
    """
    found = {name: scores for name in names if name == "importance"}
    rules = [name for name in names if name != "importance"]
    if not rules:
        return found
    config = model.config
    heads, size = config.num_attention_heads, config.head_dim
    stored = torch.tensor(stored_heads(heads, config.num_key_value_heads))
    in_parent = stored.argsort()
    columns = {axis: [dict[str, torch.Tensor]() for _ in scores.layers] for axis in ("mlp", "heads")}
    for layer, axis, weight, moments in input_moments(model, batches, files):
        if axis == "mlp":
            units, activation = torch.arange(weight.shape[1])[:, None], scores.mlp[layer]
        else:
            units, activation = torch.arange(heads * size).view(heads, size), scores.heads[layer][stored]
        for rule in rules:
            values = _score(rule, weight.cpu(), moments, units, activation)
            columns[axis][layer][rule] = values if axis == "mlp" else values[in_parent]
    for rule in rules:
        mlp, by_head = (torch.stack([layer[rule] for layer in columns[axis]]) for axis in ("mlp", "heads"))
        found[rule] = replace(scores, mlp=mlp, heads=by_head)
    return found


def _score(
    rule: str, weight: torch.Tensor, moments: Moments, units: torch.Tensor, activation: torch.Tensor
) -> torch.Tensor:
    """`[U]` float32: what each unit is worth to the matrix that reads it, in stored order."""
    norms = weight.float().square().sum(0)
    if rule == "norms":
        return activation * norms[units].sum(1).sqrt()
    if rule == "variance":
        mean = moments.input_sum / moments.tokens
        variance = (moments.inputs.diagonal() / moments.tokens - mean.square()).clamp_min(0)
        return (variance.cpu() * norms)[units].sum(1)
    order = removal_order(moments.inputs.cpu(), weight, units)
    worth = torch.empty(len(units))
    worth[order] = torch.arange(len(units), 0, -1).float()
    return worth


def best_order(
    candidates: Mapping[str, Importance],
    rows: Sequence[SubNetwork],
    permute: Callable[[Importance], None],
    loss: Callable[[SubNetwork], float],
    full: float,
) -> tuple[str, dict[str, float]]:
    """The order whose slices lose least: by the geometric mean over the rows of what each loses to the full network.

    A smallest row that is far from usable under every order then counts no more than the others.

    Args:
        candidates: Of `rankings`.
        rows: The slices to compare.
        permute: Sorts the model by some scores.
        loss: Of a slice, on text that was not used to measure the scores.
        full: Loss of the full network on that text.

    Returns:
        Its name, and the mean of each in nats.
    """
    means = {}
    for name, scores in tqdm(candidates.items(), desc="Comparing orders", unit="order"):
        permute(scores)
        lost = torch.tensor([loss(row) - full for row in rows], dtype=torch.double)
        means[name] = lost.clamp_min(1e-6).log().mean().exp().item()
    return min(means, key=lambda name: means[name]), means
