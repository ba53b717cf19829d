"""Give the rows of a model corrections of their own, fitted to its parent without training.

How they are fitted best differs between parents (`reconstruction.py`), so every row takes what loses least on text
that was held out, and none where none helps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from modeling_flextron.corrections import Owner, owned_names
from modeling_flextron.families import is_shared
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import SubNetwork

from .reconstruction import Corrections, within
from .rows import mean_loss

logger = logging.get_logger(__name__)
# Each layer reads what the parent's layers write, or what the corrected ones before it do, with norms fitted as well.
WAYS: tuple[dict[str, bool], ...] = ({"sequential": False}, {"sequential": True, "norms": True})


def best_corrections(
    model: Any,
    name: str,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    held_out: list[torch.Tensor],
    share: float,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Corrections | None, float, float]:
    """The corrections of a row that lose least; None where none of them helps.

    Args:
        model: A `FlextronForCausalLM`, whose corrections are replaced.
        name: Of the row.
        subnetwork: Its sizes.
        batches: Token ids `[B, S]` to fit to.
        held_out: Others, to choose by.
        share: Of the non-embedding parameters of the row that it may own.
        metrics: Of `sensitivities`.

    Returns:
        The corrections, and the losses of the row without and with them.
    """
    put_corrections(model, {})
    best, plain = None, mean_loss(model, subnetwork, held_out)
    least = plain
    for way in WAYS:
        found = within(model, subnetwork, batches, share, metrics=metrics, **way)
        put_corrections(model, {name: (subnetwork, found)})
        loss = mean_loss(model, subnetwork, held_out)
        if loss < least:
            best, least = found, loss
    return best, plain, least


@torch.no_grad()
def add_corrections(
    model: Any,
    batches: Sequence[torch.Tensor],
    held_out: list[torch.Tensor],
    share: float,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, tuple[float, float]]:
    """Fit corrections for every row but the full one, and put them into the model.

    Args:
        model: A `FlextronForCausalLM` with its rows, which it changes.
        batches: Token ids `[B, S]` to fit to, whose hidden states are in memory.
        held_out: Others, to choose by.
        share: Of the non-embedding parameters of a row that it may own.
        metrics: Of `sensitivities`.

    Returns:
        Name of a row -> its loss without and with corrections.
    """
    fitted: dict[str, tuple[SubNetwork, Corrections]] = {}
    losses = {}
    for name, subnetwork in reversed(held(model.config.frontier).items()):
        if subnetwork == model.built:
            continue
        found, plain, least = best_corrections(model, name, subnetwork, batches, held_out, share, metrics)
        losses[name] = plain, least
        if found is not None:
            fitted[name] = subnetwork, found
    logger.info(f"Losses of the rows without and with corrections: {losses}.")
    put_corrections(model, fitted)
    return losses


@torch.no_grad()
def put_corrections(model: Any, fitted: Mapping[str, tuple[SubNetwork, Corrections]]) -> None:
    """Let rows own these corrections, and all others none.

    Args:
        model: A `FlextronForCausalLM`.
        fitted: Name of a row -> its sizes and its corrections, the smallest row first.
    """
    owners = [Owner(name, subnetwork, _ranks(found, subnetwork)) for name, (subnetwork, found) in fitted.items()]
    model.config.corrections = [owner.to_dict() for owner in owners] or None
    model.model.set_owners(owners)
    parameters = dict(model.named_parameters())
    shared = {name: parameter for name, parameter in parameters.items() if is_shared(name)}
    for number, (_, found) in enumerate(fitted.values()):
        for name, parameter in shared.items():
            own = [parameters[part] for part in owned_names(name, str(number)) if part in parameters]
            # U and V of a matrix; of a norm what was fitted, or else what all rows share.
            values: Any = found.low_rank[name] if len(own) == 2 else (found.vectors.get(name, parameter),) * len(own)
            for part, value in zip(own, values, strict=True):
                part.copy_(value[: len(part)])


def _ranks(found: Corrections, subnetwork: SubNetwork) -> dict[str, tuple[int, ...]]:
    """Projection -> rank of its correction in each kept layer."""
    ranks = {name: up.shape[1] for name, (up, _) in found.low_rank.items()}
    blocks = {"o_proj": "self_attn", "down_proj": "mlp"}
    return {
        projection: tuple(ranks.get(f"model.layers.{i}.{block}.{projection}.weight", 0) for i in subnetwork.layers)
        for projection, block in blocks.items()
    }
