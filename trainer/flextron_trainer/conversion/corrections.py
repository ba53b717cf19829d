"""Give the rows of a model corrections of their own, fitted to its parent without training.

How they are fitted best differs between parents (`reconstruction.py`), so every row takes what loses least on text
that was held out, and none where none helps.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging

from modeling_flextron.corrections import owned_names, owner_number
from modeling_flextron.families import is_shared
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import SubNetwork, count_parameters

from ..blockwise import BlockRecipe, distill_blocks
from ..layerwise import ModelBlocks, Text
from .moments import Read
from .reconstruction import Corrections, from_inputs, reconstruct, within
from .rows import mean_loss

logger = logging.get_logger(__name__)
# Each layer reads what the corrected layers before it write, whose norms are fitted as well. Ranks are those of layers
# that read what the parent's write; a walk of its own to choose them would be as much work again (docs/log.md).
SEQUENTIAL = {"sequential": True, "norms": True}
LEARNING_RATE = 3e-3  # of corrections
NOISE = 0.01  # nats that losses of rows may differ by for nothing


@torch.no_grad()
def add_corrections(
    model: Any,
    inputs: Iterable[Read],
    batches: Sequence[torch.Tensor],
    held_out: list[torch.Tensor],
    share: float,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, tuple[float, float]]:
    """Fit corrections for every row but the full one, and put them into the model.

    Args:
        model: A `FlextronForCausalLM` with its rows, which it changes.
        inputs: Of `sorted_moments`, on this model.
        batches: Token ids `[B, S]` to fit to, whose hidden states are in memory.
        held_out: Others, to choose by.
        share: Of the non-embedding parameters of a row that it may own.
        metrics: Of `sensitivities`; None to count errors of all channels alike.

    Returns:
        Name of a row -> its loss without and with corrections.
    """
    rows = {name: row for name, row in held(model.config.frontier).items() if row != model.built}
    full = model.built.hidden, model.built.layers
    wide = {name: row for name, row in rows.items() if (row.hidden, row.layers) == full}
    found = from_inputs(model, wide, inputs, share, metrics) if wide else {}
    fitted: dict[str, tuple[SubNetwork, Corrections]] = {}
    losses = {}
    for name, row in reversed(rows.items()):
        # Each layer reads what the parent's layers write.
        first = found.get(name) or within(model, row, batches, share, metrics)
        second, _ = reconstruct(model, row, batches, ranks=first.ranks, metrics=metrics, **SEQUENTIAL)
        most = share * count_parameters(model.config, row, embeddings=False)
        # Norms alone may be too much.
        ways = [way for way in (first, second) if way.owner(name, row).parameters(model.config) <= most]
        best, losses[name] = _best(model, name, row, ways, held_out)
        if best is not None:
            fitted[name] = row, best
    logger.info(f"Losses of the rows without and with corrections: {losses}.")
    put_corrections(model, fitted)
    return losses


def warn_of_reversals(losses: Mapping[str, float]) -> None:
    """Warn of rows that lose more than a smaller one: a cut took what the rest of the network stands on.

    Args:
        losses: Name of a row -> its loss on text that was held out, the smallest row first.
    """
    best = next(iter(losses), "")
    for name, loss in losses.items():
        if loss > losses[best] + NOISE:
            warnings.warn(
                f"Row {name!r} loses more than the smaller row {best!r} on calibration text that was held out"
                f" ({loss:.2f} and {losses[best]:.2f} nats a token). Convert with more text or with other sizes, or"
                " train before you use it.",
                stacklevel=3,
            )
        best = min(best, name, key=lambda each: losses[each])


def _best(
    model: Any, name: str, row: SubNetwork, ways: Iterable[Corrections], held_out: list[torch.Tensor]
) -> tuple[Corrections | None, tuple[float, float]]:
    """The corrections of a row that lose least, None where none helps; and its losses without and with them."""
    put_corrections(model, {})
    best, plain = None, mean_loss(model, row, held_out)
    least = plain
    for found in ways:
        put_corrections(model, {name: (row, found)})
        loss = mean_loss(model, row, held_out)
        if loss < least:
            best, least = found, loss
    put_corrections(model, {})
    return best, (plain, least)


def train_corrections(
    model: Any, batches: Sequence[torch.Tensor], held_out: list[torch.Tensor], steps: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Let corrections learn, layer by layer, what the parent's layers write; a row that gains nothing keeps its own.

    Args:
        model: A `FlextronForCausalLM` with corrections, which it changes; nothing else of it learns.
        batches: Token ids `[B, S]` to learn from, a batch in each step.
        held_out: Others, to choose by.
        steps: Of each layer.
        seed: Of the order of samples.

    Returns:
        Name of a row with corrections -> its loss before and after.
    """
    rows = {str(number): (owner.name, owner.subnetwork) for number, owner in enumerate(model.model.owners)}
    if not rows:
        return {}
    own = {name: parameter for name, parameter in model.named_parameters() if owner_number(name) is not None}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    plain = {name: mean_loss(model, row, held_out) for name, row in rows.values()}
    size = len(batches[0])
    recipe = BlockRecipe(steps, size, LEARNING_RATE, seed=seed, parameters="corrections", inputs="parent")
    with TemporaryDirectory() as folder:
        distill_blocks(ModelBlocks(model), Text(torch.cat(list(batches))[: steps * size]), recipe, folder=Path(folder))
    losses = {}
    with torch.no_grad():
        for number, (row, subnetwork) in rows.items():
            losses[row] = plain[row], mean_loss(model, subnetwork, held_out)
            if not losses[row][1] < losses[row][0]:
                for name in own:
                    if owner_number(name) == number:
                        own[name].copy_(before[name])
    logger.info(f"Losses of the rows before and after their corrections learned: {losses}.")
    return losses


@torch.no_grad()
def put_corrections(model: Any, fitted: Mapping[str, tuple[SubNetwork, Corrections]]) -> None:
    """Let rows own these corrections, and all others none.

    Args:
        model: A `FlextronForCausalLM`.
        fitted: Name of a row -> its sizes and its corrections, the smallest row first.
    """
    owners = [found.owner(name, subnetwork) for name, (subnetwork, found) in fitted.items()]
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
