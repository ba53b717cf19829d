"""Write a checkpoint in levels, tensor by tensor."""

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils.hub import convert_file_size_to_int
from transformers.utils.logging import tqdm

from modeling_flextron.corrections import number_of_owner, owner_number
from modeling_flextron.families import at_layer, axes, layer_of
from modeling_flextron.frontier import held
from modeling_flextron.level_blocks import DTYPES, Box, index_name, volume
from modeling_flextron.level_reader import empty_model, read_index, stored_state
from modeling_flextron.subnetwork import SubNetwork, axis_sizes

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # of torch -> of safetensors


@dataclass
class Piece:
    """A block that is to be written."""

    name: str  # of the tensor
    key: str
    box: Box
    size: int  # bytes


def level_rows(model: Any) -> list[tuple[str, SubNetwork]]:
    """The rows of the frontier that are less than everything, smallest first, with their sub-networks."""
    rows = held(reversed(model.frontier)).items()
    return [(name, subnetwork) for name, subnetwork in rows if subnetwork != model.built]


def plan_levels(model: Any) -> tuple[list[list[Piece]], list[dict[str, tuple[int, ...]]]]:
    """The blocks of every level of a model, and the shapes `tensor -> sizes` that every level's row needs."""
    state = stored_state(model)
    needs = [_shapes_at(model, subnetwork) for _, subnetwork in level_rows(model)]
    needs.append({name: tuple(tensor.shape) for name, tensor in state.items()})
    levels: list[list[Piece]] = [[] for _ in needs]
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        for level, box in blocks_of(shape, [need.get(name) for need in needs[:-1]]):
            size = volume(box) * tensor.element_size()
            levels[level].append(Piece(name, block_name(name, box, shape), box, size))
    return levels, needs


def _shapes_at(model: Any, subnetwork: SubNetwork) -> dict[str, tuple[int, ...]]:
    """The shapes that a model loaded at a sub-network has, under the layer numbers of the whole one."""
    config = deepcopy(model.config)
    config.flextron_budget = subnetwork.to_dict()
    shapes = {}
    for name, tensor in stored_state(empty_model(type(model), config)).items():
        if owner_number(name) is not None:
            continue
        if (layer := layer_of(name)) is not None:
            name = at_layer(name, subnetwork.layers[layer])
        shapes[name] = tuple(tensor.shape)
    owner = number_of_owner(model.base_model.owners, subnetwork)
    for name, tensor in model.state_dict().items():
        number = owner_number(name)
        if number is None or (owner is not None and int(number) > int(owner)):
            continue
        if (layer := layer_of(name)) in (None, *subnetwork.layers):
            sizes = axis_sizes(model.config, subnetwork, 0 if layer is None else subnetwork.layers.index(layer))
            shapes[name] = tuple(
                min(size, sizes.get(axis, size)) for size, axis in zip(tensor.shape, axes(name), strict=True)
            )
    return shapes


def write_levels(model: Any, folder: Path, max_shard_size: int | str) -> dict[str, Any]:
    """Write the weights of a model as levels, tensor by tensor.

    Args:
        model: The model.
        folder: Where to write.
        max_shard_size: Largest file, such as `"5GB"`; a block is never cut, and may be larger.

    Returns:
        What `FlextronConfig.levels` must say.
    """
    state, (levels, needs) = stored_state(model), plan_levels(model)
    checkpoint, limit = _fingerprint(model, state), convert_file_size_to_int(max_shard_size)
    where: dict[str, str] = {}
    shards: dict[str, dict[str, Any]] = {}
    with tqdm(
        total=sum(piece.size for piece in chain(*levels)), unit="B", unit_scale=True, desc="Writing levels"
    ) as bar:
        for level, pieces in enumerate(levels):
            groups = _groups(pieces, limit)
            for number, group in enumerate(groups):
                part = f"-{number + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
                file = f"model.level{level}{part}.safetensors"
                where |= {piece.key: file for piece in group}
                shards[file] = _write_shard(folder / file, group, model, state, checkpoint, bar)
    for level, need in enumerate(needs):
        needed = [piece for piece in chain(*levels) if piece.name in need and inside(piece.box, need[piece.name])]
        weight_map = {piece.key: where[piece.key] for piece in needed}
        used = {file: shards[file] for file in sorted(set(weight_map.values()))}
        total = sum(piece.size for piece in needed)
        metadata = {"checkpoint": checkpoint, "total_size": total, "shards": used}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)
        name = index_name(None if level == len(needs) - 1 else level)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return {"checkpoint": checkpoint, "rows": [name for name, _ in level_rows(model)]}


def _groups(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Put as many pieces together as a file may hold, in order."""
    groups: list[list[Piece]] = []
    held = 0
    for piece in pieces:
        if not groups or held + piece.size > limit:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.size
    return groups


def _tensor(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a model, also one that accelerate keeps on disk."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _write_shard(
    path: Path, pieces: list[Piece], model: Any, state: dict[str, torch.Tensor], checkpoint: str, bar: Any
) -> dict[str, Any]:
    """Write a safetensors file block by block; return its size and hash.

    `safetensors.save_file` wants all blocks of a file in memory at once, a second copy of the model.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "checkpoint": checkpoint}}
    begin = 0
    for piece in pieces:
        shape = [high - low for low, high in piece.box]
        header[piece.key] = {
            "dtype": NAMES[state[piece.name].dtype], "shape": shape, "data_offsets": [begin, begin + piece.size],
        }  # fmt: skip
        begin += piece.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            tensor = _tensor(model, piece.name, state[piece.name])
            block = tensor.detach()[tuple(slice(*side) for side in piece.box)].cpu().contiguous()
            write(_bytes(block))
            bar.update(piece.size)
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def _fingerprint(model: Any, state: dict[str, torch.Tensor]) -> str:
    """A text that the files of one checkpoint share, and those of no other: of everything that is in them."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(_tensor(model, name, tensor).detach().cpu().contiguous()))
    return digest.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def block_name(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """The name of a block; see `parse_block`."""
    if box == tuple((0, size) for size in shape):
        return name
    return f"{name}[{','.join(f'{low}:{high}' for low, high in box)}]"


def blocks_of(shape: tuple[int, ...], needs: list[tuple[int, ...] | None]) -> list[tuple[int, Box]]:
    """Cut a tensor into the blocks that its levels add.

    Args:
        shape: Of the tensor.
        needs: For each level the leading part that its row needs, None for nothing. What none of them needs is one
            level more.

    Returns:
        Level and box of every block, neighbours that the same rows need as one block.
    """
    needs = [*needs, shape]
    cuts = [sorted({0, *(need[dim] for need in needs if need is not None)}) for dim in range(len(shape))]
    sides = [list(pairwise(at)) for at in cuts]

    def users(cell: Box) -> tuple[int, ...]:
        return tuple(i for i, need in enumerate(needs) if need is not None and inside(cell, need))

    cells = [(users(cell), cell) for cell in product(*sides)]
    for dim in reversed(range(len(shape))):  # merge neighbours along the last dimension first: they are contiguous
        cells.sort(key=lambda entry: (entry[0], entry[1][:dim], entry[1][dim + 1 :], entry[1][dim]))
        merged: list[tuple[tuple[int, ...], Box]] = []
        for who, cell in cells:
            if merged:
                same, before = merged[-1]
                joined = (*before[:dim], (before[dim][0], cell[dim][1]), *before[dim + 1 :])
                behind = (*before[:dim], (before[dim][1], cell[dim][1]), *before[dim + 1 :])
                if same == who and behind == cell:
                    merged[-1] = who, joined
                    continue
            merged.append((who, cell))
        cells = merged
    return sorted((who[0], cell) for who, cell in cells)


def inside(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box lies within the leading part of this shape."""
    return all(high <= size for (_, high), size in zip(box, shape, strict=True))


def row_bytes(folder: Path, config: Any) -> dict[str, int]:
    """Row of the frontier -> bytes of the weight files that loading it fetches from a copy of a folder.

    Args:
        folder: Of a saved model.
        config: The config that lies there.
    """

    def size(level: int | None) -> int:
        return sum(shard["size"] for shard in read_index(folder / index_name(level))["shards"].values())

    if config.levels is None:
        everything = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return {row.name: everything for row in config.frontier}
    levels = {name: level for level, name in enumerate(config.levels["rows"])}
    return {row.name: size(levels.get(row.name)) for row in config.frontier}
