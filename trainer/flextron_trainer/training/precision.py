"""Weights in float32 while they are trained, whatever they were loaded in.

bfloat16 keeps 8 bits of a weight, so that a step of less than 1/256 of it is rounded away; products may well be
computed in it (`bf16=True`), sums of steps may not.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: torch.nn.Module, names: Collection[str], wanted: bool = True) -> Iterator[bool]:
    """Keep parameters in float32 inside the `with` block; afterwards they have their dtypes again.

    Args:
        model: Whose they are. Inside of the block it may be wrapped and divided, by FSDP for instance: parts keep
            their dtype.
        names: Of the parameters that are trained.
        wanted: False leaves everything as it is.

    Yields:
        Whether the weights will be rounded at the end.
    """
    halves = {name: p.dtype for name, p in model.named_parameters() if name in names and p.dtype in HALF}
    if wanted:
        _cast(model, dict.fromkeys(halves, torch.float32))
    left = {p.dtype for name, p in model.named_parameters() if name in halves} & {*HALF}
    if left:
        logger.warning_once(
            f"Weights are trained in {left.pop()}, which rounds small steps away: load them in float32."
        )
    elif halves:
        after = next(iter(halves.values()))
        logger.warning_once(f"What is trained is float32 meanwhile, also in checkpoints, and {after} afterwards.")
    try:
        yield bool(halves) and wanted
    finally:
        if wanted:
            _cast(model, halves)


def _cast(model: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters other dtypes, one at a time; those that are divided among processes keep theirs."""
    for name, parameter in model.named_parameters():
        if name in dtypes and not hasattr(parameter, "full_tensor"):
            parameter.data = parameter.data.to(dtypes[name])
