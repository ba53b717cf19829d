"""Second moments in files, so that a later conversion of the same parent with the same text reads them."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_flextron.errors import invalid

from ..files import write_file_beside
from .moments import WRITERS, Moments

KEPT_FOR_NOW = 2**32  # bytes of second moments that are kept unasked while a conversion runs


class MomentFiles:
    """A folder with a file for every matrix whose inputs were counted: `4 K^2` bytes for `K` of them.

    Args:
        folder: Made where it is missing.
        parent, data: Fingerprints of what they were measured on. Files of anything else are written again.
    """

    def __init__(self, folder: str | os.PathLike, parent: str, data: str):
        self.folder, self.about = Path(folder), {"parent": parent, "data": data}

    def _path(self, layer: int, axis: str) -> Path:
        return self.folder / f"layer-{layer:03d}-{axis}.safetensors"

    def __contains__(self, place: tuple[int, str]) -> bool:
        path = self._path(*place)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return file.metadata() == self.about
        except Exception as error:  # safetensors raises a bare exception class of its own
            rule = f"It is not a file of second moments ({error})."
            raise invalid("moments", str(path), rule, "Delete it to measure them again.") from error

    def complete(self, layers: int) -> bool:
        """Tell whether there is a file for every matrix of so many layers."""
        return all((layer, axis) in self for layer in range(layers) for axis in WRITERS)

    def save(self, layer: int, axis: str, moments: Moments) -> None:
        """Keep the moments of the inputs of a matrix; those of its outputs are not kept."""
        tensors = {
            "inputs": moments.inputs.cpu(),
            "input_sum": moments.input_sum.cpu(),
            "tokens": torch.tensor([moments.tokens, moments.count], dtype=torch.float64),
        }
        with write_file_beside(self._path(layer, axis)) as path:
            save_file(tensors, path, metadata=self.about)

    def load(self, layer: int, axis: str, device: torch.device | str) -> Moments:
        """Read what `save` kept."""
        with safe_open(self._path(layer, axis), framework="pt", device=str(device)) as file:
            inputs, input_sum = file.get_tensor("inputs"), file.get_tensor("input_sum")
            weighted, count = file.get_tensor("tokens").tolist()
            return Moments(inputs, inputs[:0], input_sum, weighted, int(count))


@contextmanager
def moment_files(
    folder: str | os.PathLike | None, config: Any, parent: str, data: str, wanted: bool, for_now: Any = None
) -> Iterator[MomentFiles | None]:
    """Where second moments of a model in its parent's order are kept: in a folder, or for as long as the block runs.

    Args:
        folder: None for the latter.
        parent, data: Fingerprints of what they are measured on.
        wanted: Whether they are needed more than once. If so, and they are small, they are kept without a folder.
        for_now: Where they are in that case; None for the system's folder for such files.
    """
    read = config.intermediate_size, config.num_attention_heads * config.head_dim
    size = 4 * config.num_hidden_layers * sum(inputs**2 for inputs in read)
    if folder is None and (not wanted or size > KEPT_FOR_NOW):
        yield None
        return
    with ExitStack() as stack:
        place = folder or stack.enter_context(TemporaryDirectory(prefix="flextron-moments-", dir=for_now))
        yield MomentFiles(place, parent, data)
