"""Read a checkpoint in levels, or a part of a plain one: lazy tensors, put together from their blocks when read."""

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .corrections import folded, owned_names, owner_number
from .errors import invalid
from .families import ELASTIC, at_layer, axes, layer_of
from .level_blocks import AGAIN, DTYPES, Box, overlap, parse_block, volume

SHARD = re.compile(r"model(\.level\d+)?(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Block:
    """A part of a tensor, as it lies in a safetensors file."""

    file: str
    key: str
    box: Box

    def read(self, part: Box) -> torch.Tensor:
        """The overlap with `part`, a view of the mapped file; it keeps the mapping alive."""
        with safe_open(self.file, framework="pt", device="cpu") as tensors:
            inside = tuple(
                slice(low - begin, high - begin) for (low, high), (begin, _) in zip(part, self.box, strict=True)
            )
            return tensors.get_slice(self.key)[inside]


class Slice:
    """What transformers uses of a slice of safetensors, beside the indexing."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = shape, dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype


class StoredTensor(Slice):
    """The leading part of a tensor in safetensors files, put together from its blocks.

    A file is opened for every read: pages of a mapped tensor stay in memory until its mapping closes.
    """

    def __init__(self, blocks: list[Block], shape: tuple[int, ...], dtype: str):
        super().__init__(shape, dtype)
        self.box = tuple((0, size) for size in shape)
        self.parts = [(block, part) for block in blocks if (part := overlap(block.box, self.box))]

    def __getitem__(self, index: EllipsisType | slice | int | tuple) -> torch.Tensor:
        if len(self.parts) == 1:
            ((block, part),) = self.parts
            tensor = block.read(part)[index]
            # A block as it is stays mapped, as transformers does it; of a part the rest of its pages would stay, too.
            return tensor if part == block.box else tensor.clone(memory_format=torch.contiguous_format)
        whole: torch.Tensor | None = None
        for block, part in self.parts:
            tensor = block.read(part)
            whole = tensor.new_empty(self.shape) if whole is None else whole
            whole[tuple(slice(*side) for side in part)] = tensor
        assert whole is not None
        return whole if index is ... else whole[index].clone(memory_format=torch.contiguous_format)


class LazyTensor(Slice):
    """A tensor that is computed when it is indexed."""

    def __init__(self, shape: tuple[int, ...], dtype: str, read: Callable[[], torch.Tensor]):
        super().__init__(shape, dtype)
        self.read = read

    def __getitem__(self, index: EllipsisType | slice | int | tuple) -> torch.Tensor:
        return self.read()[index]


def stored_tensors(
    model: Any, files: list[str], metadata: dict[str, Any] | None = None
) -> dict[str, StoredTensor | LazyTensor]:
    """The stored tensors that a model needs, each cut to the model's size, under the model's layer numbers.

    Args:
        model: Usually still on the meta device; `model.stored` says which stored layers it keeps.
        files: The safetensors files of the checkpoint, or of the levels that the model needs.
        metadata: Of the index that named the files, with its `weight_map`; None when there was none.

    Raises:
        ValueError: the files are not those of the index or of this model, or do not hold all of a tensor.
        OSError: a file is missing, truncated or not in the safetensors format.
    """
    index = metadata if metadata is not None and "checkpoint" in metadata else None
    wanted = {} if index is None else _check_files(model.config, files, index)
    stored_layers = (model.stored or model.built).layers
    position = {stored: built for built, stored in enumerate(stored_layers)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix + "."
    blocks: dict[str, list[Block]] = {}
    dtypes: dict[str, str] = {}
    total = 0
    for file in files:
        keys = wanted.get(Path(file).name)
        for key, shape, dtype in _contents(file, None if index is None else index["checkpoint"], keys):
            name, box = parse_block(key)
            if box is None:
                box = tuple((0, size) for size in shape)
            elif tuple(high - low for low, high in box) != shape:
                raise invalid("tensor", key, f"Its block has the shape {shape}.", AGAIN)
            total += prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 0)
            if (layer := layer_of(name)) is not None and layer < model.stored_depth:  # else unexpected, as it is
                if layer not in position:
                    continue
                name = at_layer(name, position[layer])
            blocks.setdefault(name, []).append(Block(file, key, box))
            dtypes.setdefault(name, dtype)
    if index is not None and total != index["total_size"]:
        rule = f"Its blocks have {total:,} bytes, and it says {index['total_size']}."
        raise invalid("index", index["checkpoint"], rule, AGAIN)
    found: dict[str, StoredTensor | LazyTensor] = {}
    if model.folded is not None:
        found = _corrected_tensors(model, blocks, dtypes, shapes)
    for name, parts in blocks.items():
        whole = _whole(parts)
        aliases = (name, name.removeprefix(prefix), prefix + name)
        ours = next((alias for alias in aliases if alias in shapes), None)
        # What does not fit stays as it is: transformers then says which tensor that is. Only a budget takes parts.
        exact = ours is not None and shapes[ours] == whole
        fits = exact or (ours is not None and bool(model.stored) and _is_leading(axes(ours), shapes[ours], whole))
        if index is not None and ours is not None and not fits:
            rule = f"The files hold {whole} of it, and this model needs {shapes[ours]}."
            raise invalid("tensor", name, rule, AGAIN)
        tensor = StoredTensor(parts, shapes[ours] if fits and ours is not None else whole, dtypes[name])
        _check_tiles(name, tensor)
        found[name] = tensor
    if index is not None:
        held = {name.removeprefix(prefix) for name in found}
        decoder = [name for name in stored_state(model) if model.base_model is model or name.startswith(prefix)]
        if lacking := [name for name in decoder if name.removeprefix(prefix) not in held]:
            raise invalid("index", index["checkpoint"], f"It does not name the tensor {lacking[0]!r}.", AGAIN)
    return found


def _whole(parts: list[Block]) -> tuple[int, ...]:
    """Shape of the tensor that blocks make."""
    return tuple(max(part.box[dim][1] for part in parts) for dim in range(len(parts[0].box)))


def _corrected_tensors(
    model: Any, blocks: dict[str, list[Block]], dtypes: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> dict[str, StoredTensor | LazyTensor]:
    """Fold corrections into the tensors of a model that is loaded at a size which has some.

    Args:
        blocks: Name -> blocks of what is stored; what these tensors are made of is taken out.
    """
    prefix, own = model.base_model_prefix + ".", model.folded
    found: dict[str, StoredTensor | LazyTensor] = {}

    def stored(name: str, *sizes: int | None) -> StoredTensor:
        shape = tuple(had if size is None else size for size, had in zip(sizes, _whole(blocks[name]), strict=True))
        tensor = StoredTensor(blocks[name], shape, dtypes[name])
        _check_tiles(name, tensor)
        return tensor

    for ours, shape in shapes.items():
        name = next((alias for alias in (ours, ours.removeprefix(prefix), prefix + ours) if alias in blocks), ours)
        number, kind = owner_number(name), name.rpartition(".")[2]
        if number is None and (names := [part for part in owned_names(name, own) if part in blocks]):
            if len(names) == 1:
                found[name] = stored(names[0], *shape)
            else:
                up, down = stored(names[0], shape[0], None), stored(names[1], None, shape[1])
                found[name] = LazyTensor(shape, dtypes[name], partial(_read_folded, stored(name, *shape), up, down))
        elif number is not None and kind in ("up", "down"):
            beside = name.replace(f".corrections.{number}.", f".corrections.{own}.")
            if beside in blocks:
                sizes = (shape[0], None) if kind == "up" else (None, shape[1])
                parts = tuple(stored(part, *sizes) for part in (name, beside) if part in blocks)
                found[name] = LazyTensor(shape, dtypes[beside], partial(_read_joined, parts, kind))
    for name in list(blocks):
        if name in found or ((number := owner_number(name)) is not None and int(number) >= int(own)):
            del blocks[name]
    return found


def _read_folded(weight: StoredTensor, up: StoredTensor, down: StoredTensor) -> torch.Tensor:
    return folded(weight[...], up[...], down[...])


def _read_joined(parts: tuple[StoredTensor, ...], kind: str) -> torch.Tensor:
    """Join what a smaller owner corrects with what is folded in, which it takes back."""
    *mine, beside = (part[...] for part in parts)
    return torch.cat((*mine, -beside), 1) if kind == "up" else torch.cat((*mine, beside), 0)


def _check_files(config: Any, files: list[str], index: dict[str, Any]) -> dict[str, set[str]]:
    """File -> the blocks that an index names in it, when the files are those that it describes."""
    if config.levels is None or index["checkpoint"] != config.levels["checkpoint"]:
        rule = f"It is of another checkpoint: `config.json` is of {config.levels and config.levels['checkpoint']!r}."
        raise invalid("index", index["checkpoint"], rule, AGAIN)
    wanted: dict[str, set[str]] = {}
    for key, name in index["weight_map"].items():
        wanted.setdefault(name, set()).add(key)
    for file in map(Path, files):
        size = index["shards"][file.name]["size"]
        if not file.is_file() or file.stat().st_size != size:
            state = f"has {file.stat().st_size:,} bytes" if file.is_file() else "is missing"
            raise OSError(f"{file} {state}, and its index says {size:,} bytes. {AGAIN}")
    return wanted


def _contents(file: str, checkpoint: str | None, keys: set[str] | None) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of the tensors in a file; with `keys` of these alone, all of which it must hold."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            owner, held = (tensors.metadata() or {}).get("checkpoint"), set(tensors.keys())
            slices = {key: tensors.get_slice(key) for key in (held if keys is None else held & keys)}
            contents = [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in sorted(slices.items())]
    except Exception as error:  # safetensors raises a bare exception class of its own
        raise OSError(f"{file} is not a complete safetensors file ({error}). Download or save it again.") from error
    if checkpoint is not None and owner != checkpoint:
        rule = f"It is of checkpoint {owner!r}, and its index is of {checkpoint!r}."
        raise invalid("shard", file, rule, AGAIN)
    if keys is not None and (lacking := sorted(keys - held)):
        rule = f"Its index says that it holds {lacking[0]!r}, and it does not."
        raise invalid("shard", file, rule, AGAIN)
    yield from contents


def _check_tiles(name: str, tensor: StoredTensor) -> None:
    """Refuse blocks that overlap, or leave a part of a tensor out."""
    boxes = [part for _, part in tensor.parts]
    apart = not any(overlap(a, b) for a, b in combinations(boxes, 2))
    if not apart or sum(map(volume, boxes)) != volume(tensor.box):
        rule = f"Its blocks {'leave a part of it out' if apart else 'overlap'}."
        raise invalid("tensor", name, rule, AGAIN)


def _is_leading(dims: tuple[str, ...], part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape is another one cut along elastic axes alone."""
    return len(part) == len(whole) and all(
        p == w or (p < w and axis in ELASTIC) for axis, p, w in zip(dims, part, whole, strict=True)
    )


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """A model as it is before weights are loaded into it, on the meta device."""
    with torch.device("meta"):
        return model_class(deepcopy(config))


def stored_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model holds; of tied ones, one."""
    return {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}


def read_index(path: Path) -> dict[str, Any]:
    """An index of a checkpoint in levels: its metadata, and the `weight_map` beside it.

    Raises:
        ValueError: it describes no checkpoint in levels, or names a file that is not beside it.
        OSError: there is none, or it is not JSON.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is no complete JSON ({error}). {AGAIN}") from error
    index = index if isinstance(index, dict) else {}
    weight_map, found = index.get("weight_map"), index.get("metadata")
    metadata: dict[str, Any] = found if isinstance(found, dict) else {}
    shards = metadata.get("shards")
    described = isinstance(metadata.get("checkpoint"), str) and type(metadata.get("total_size")) is int
    if not isinstance(weight_map, dict) or not isinstance(shards, dict) or not described:
        rule = "It has a weight_map, and metadata with checkpoint, total_size and shards."
        raise invalid("index", path.name, rule, AGAIN)
    for name in [*shards, *weight_map.values()]:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise invalid("shard", name, f"{path.name} may only name files like model.level0.safetensors.", AGAIN)
    for name in weight_map.values():
        shard = shards.get(name)
        if not isinstance(shard, dict) or type(shard.get("size")) is not int:
            raise invalid("shard", name, f"{path.name} does not say how large it is.", AGAIN)
    for key in weight_map:
        parse_block(key)
    return {**metadata, "weight_map": weight_map}
