"""Give the rows of a model corrections of their own, fitted to its parent without training.

How they are fitted best differs between parents (`reconstruction.py`), so every row takes what loses least on text
that was held out, and none where none helps.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from modeling_flextron.corrections import PROJECTIONS, Owner, owned_names
from modeling_flextron.families import is_shared
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import SubNetwork

from .reconstruction import Corrections, corrected, within
from .rows import mean_loss

logger = logging.getLogger(__name__)
TOKENS = 32768  # that are fitted to: their hidden states are in memory
# Each layer reads what the parent's layers write, or what the corrected ones before it do, with norms fitted as well.
WAYS: tuple[dict[str, bool], ...] = ({"sequential": False}, {"sequential": True, "norms": True})


def best_corrections(
    model: Any, subnetwork: SubNetwork, batches: Sequence[torch.Tensor], held_out: list[torch.Tensor], share: float
) -> tuple[Corrections | None, float, float]:
    """The corrections of a row that lose least; None where none of them helps.

    Args:
        model: A `FlextronForCausalLM` without corrections.
        subnetwork: The row.
        batches: Token ids `[B, S]` to fit to.
        held_out: Others, to choose by.
        share: Of the non-embedding parameters of the row that it may own.

    Returns:
        The corrections, and the losses of the row without and with them.
    """
    best, plain = None, mean_loss(model, subnetwork, held_out)
    least = plain
    for way in WAYS:
        found = within(model, subnetwork, batches, share, **way)
        with corrected(model, found):
            loss = mean_loss(model, subnetwork, held_out)
        if loss < least:
            best, least = found, loss
    return best, plain, least


@torch.no_grad()
def add_corrections(
    model: Any, batches: Sequence[torch.Tensor], held_out: list[torch.Tensor], share: float
) -> dict[str, tuple[float, float]]:
    """Fit corrections for every row but the full one, and put them into the model.

    Args:
        model: A `FlextronForCausalLM` with its rows, which it changes.
        batches: Token ids `[B, S]` to fit to, of which the first `TOKENS` count.
        held_out: Others, to choose by.
        share: Of the non-embedding parameters of a row that it may own.

    Returns:
        Name of a row -> its loss without and with corrections.
    """
    used, count = [], 0
    for batch in batches:
        if count < TOKENS:
            used.append(batch)
            count += batch.numel()
    owners, fitted, losses = [], [], {}
    for name, subnetwork in reversed(held(model.config.frontier).items()):
        if subnetwork == model.built:
            continue
        found, plain, least = best_corrections(model, subnetwork, used, held_out, share)
        losses[name] = plain, least
        if found is not None:
            ranks = {projection: _ranks(found, subnetwork, projection) for projection in PROJECTIONS}
            owners.append(Owner(name, subnetwork, ranks))
            fitted.append(found)
    logger.info(f"Losses of the rows without and with corrections: {losses}.")
    model.config.corrections = [owner.to_dict() for owner in owners] or None
    model.model.set_owners(owners)
    for number, found in enumerate(fitted):
        _fill(model, str(number), found)
    return losses


def _ranks(found: Corrections, subnetwork: SubNetwork, projection: str) -> tuple[int, ...]:
    block = {"o_proj": "self_attn", "down_proj": "mlp"}[projection]
    names = [f"model.layers.{layer}.{block}.{projection}.weight" for layer in subnetwork.layers]
    return tuple(found.low_rank[name][0].shape[1] if name in found.low_rank else 0 for name in names)


def _fill(model: Any, number: str, found: Corrections) -> None:
    """Write the corrections of one owner, and of norms that were not fitted what all rows share."""
    parameters = dict(model.named_parameters())
    for name, shared in parameters.items():
        own = [parameters[part] for part in owned_names(name, number) if part in parameters] if is_shared(name) else []
        values: Any = found.low_rank[name] if len(own) == 2 else (found.vectors.get(name, shared),)
        for part, value in zip(own, values, strict=False):
            part.copy_(value[: len(part)])
