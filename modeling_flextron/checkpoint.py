"""Checkpoint files: reading the leading slices that a budget needs, and writing so that nothing is half-written."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import safe_open

from .errors import invalid
from .families import ELASTIC, axes

LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


class LeadingSlice:
    """The leading block of a tensor in a safetensors file, read when it is indexed.

    It has the three methods that transformers uses of a safetensors slice. The file is opened for every read:
    pages of a mapped tensor stay in memory until its mapping closes, and a block of columns touches every page of
    the stored tensor.
    """

    def __init__(self, file: str, name: str, shape: tuple[int, ...], dtype: str):
        self.file, self.name, self.shape, self.dtype = file, name, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: EllipsisType | slice | int | tuple) -> torch.Tensor:
        with safe_open(self.file, framework="pt", device="cpu") as tensors:
            block = tensors.get_slice(self.name)[tuple(slice(0, size) for size in self.shape)]
            return block[index].clone(memory_format=torch.contiguous_format)


def leading_slices(model, files: list[str]) -> dict[str, LeadingSlice]:
    """The stored tensors that a model needs, each cut to the model's size, under the model's layer numbers.

    Args:
        model: A `FlextronPreTrainedModel`, usually still on the meta device; `model.stored` says which stored
            layers it keeps.
        files: The safetensors files of the checkpoint.

    Raises:
        OSError: a file is truncated or not in the safetensors format.
    """
    position = {stored: built for built, stored in enumerate(model.stored.layers)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for file in files:
        for name, shape, dtype in _contents(file):
            target = name
            if match := LAYER.search(name):
                if int(match[2]) not in position:
                    continue
                target = LAYER.sub(f"{match[1]}layers.{position[int(match[2])]}.", name)
            prefix = model.base_model_prefix + "."
            aliases = (target, target.removeprefix(prefix), prefix + target)
            ours = next((alias for alias in aliases if alias in shapes), None)
            # What does not fit stays as it is: transformers then says which tensor that is.
            fits = ours is not None and _is_leading(axes(ours), shapes[ours], shape)
            found[target] = LeadingSlice(file, name, shapes[ours] if fits else shape, dtype)
    return found


def _is_leading(dims: tuple[str, ...], part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape is another one cut along elastic axes alone."""
    return len(part) == len(whole) and all(
        p == w or (p < w and axis in ELASTIC) for axis, p, w in zip(dims, part, whole, strict=True)
    )


def _contents(file: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                stored = tensors.get_slice(name)
                yield name, tuple(stored.get_shape()), stored.get_dtype()
    except Exception as error:  # safetensors raises a bare exception class of its own
        raise OSError(f"{file} is not a complete safetensors file ({error}). Download or save it again.") from error


@contextmanager
def write_beside(target: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Give a fresh folder to write into, and move it to `target` when the block ends without an error.

    A new target appears at once. In an existing one each file is replaced at once, weights before the config,
    and weight files of an earlier save of the same `variant` that are no longer part of it are removed; other files
    stay.
    """
    target = Path(target)
    exists = target.exists()
    if exists and not target.is_dir():
        raise invalid("save_directory", str(target), "There is a file of this name.", "Pass the path of a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside a target that exists: it may be a mount point, onto which nothing can be moved from beside it.
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if exists else target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if not exists:
            os.replace(folder, target)
            return
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (".safetensors" not in path.name, path)):
            (target / path).parent.mkdir(exist_ok=True)
            os.replace(folder / path, target / path)
        names = {str(path) for path in files}
        dot = re.escape(f".{variant}") if variant else ""
        weights = re.compile(rf"model{dot}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dot}\.json")
        for path in list(target.iterdir()):
            if weights.fullmatch(path.name) and path.name not in names:
                path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_file_beside(target: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write one file at, and move the file to `target` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        path = Path(folder) / target.name
        yield path
        os.replace(path, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
