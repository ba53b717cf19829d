"""Batches: what is accepted, how it is brought to the device, and the first rows of a dataset."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device

from modeling_flextron.errors import invalid

from ..data import told_by_positions
from .teachers import check_documents

CALIBRATION_SAMPLES = 64


def read_batch(inputs: dict[str, Any], collator: Any, teacher: Any, device: torch.device) -> dict[str, Any]:
    """Check a batch and put it on a device; where positions keep documents apart, they do so without a mask.

    Args:
        inputs: As the collator made it.
        collator: Who made it, for messages.
        teacher: Who reads it as well; None for nobody.

    Raises:
        ValueError: nothing says what is to be foretold, or the teacher would not keep the documents apart.
    """
    check_batch(inputs, collator)
    inputs = told_by_positions(send_to_device(inputs, device))
    if teacher is not None and len(inputs.get("position_ids", ())) > 1:
        check_documents(teacher)
    return inputs


def check_batch(inputs: Mapping[str, Any], collator: Any) -> None:
    """Refuse a batch that does not say what is to be foretold.

    Raises:
        ValueError: it has no ids or labels, or labels that are shifted already.
    """
    missing = [name for name in ("input_ids", "labels") if inputs.get(name) is None]
    if missing or "shift_labels" in inputs:
        rule = f"Its batches have no `{missing[0]}`." if missing else "The loss shifts `labels` itself."
        remedy = "Make batches of `input_ids` and `labels`, which is what comes of leaving it out."
        raise invalid("data_collator", type(collator).__name__, rule, remedy)


def real_tokens_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Where a batch has no padding, `[B, S]`; None where nothing says that it has any.

    Where positions keep documents apart there is no mask, and each token of padding is a document of its own, at 0;
    so is one that begins with the last token of a row, behind which nothing is foretold either.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None or positions is None:
        return None if mask is None else mask.bool()
    real = positions.flip(-1).cummax(-1).values.flip(-1) > 0
    real[:, 0] = True
    return real


def stored_length(dataset: Any) -> int | None:
    """Tokens in the first row of a dataset that holds its rows; None of one that makes them when they are read."""
    stored = isinstance(dataset, (list, tuple)) or (
        isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    )
    row = dataset[0] if stored and len(dataset) else None
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else None


def first_batches(dataset: Any, collate: Callable, size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The first samples of a dataset in batches, without labels, the same in every process."""
    samples = list(itertools.islice(iter(dataset), CALIBRATION_SAMPLES))
    batches = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
    kept = ("input_ids", "attention_mask", "position_ids")
    return [{name: batch[name].to(device) for name in kept if name in batch} for batch in batches]
