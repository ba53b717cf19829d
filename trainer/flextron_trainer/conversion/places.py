"""Weights in files that are mapped into memory, for models that are larger than it.

Pages of a mapped file are read when they are needed, and given back when something else needs the memory: only what is
computed at a time must fit. The files have no names: they are gone when the last tensor in them is, however the process
ends.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Place = Callable[[torch.Tensor], torch.Tensor]  # gives the same numbers, contiguous, in another place


def place_in(folder: str | os.PathLike) -> Place:
    """Files in a folder, which is made where it is missing. It must not be in memory itself, as `/tmp` may be."""
    Path(folder).mkdir(parents=True, exist_ok=True)

    def put(tensor: torch.Tensor) -> torch.Tensor:
        with tempfile.NamedTemporaryFile(dir=str(folder), prefix=".weights-") as file:
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)

    return put
