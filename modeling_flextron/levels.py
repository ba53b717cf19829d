"""The level layout: one checkpoint cut into blocks, so that a size is a few files of it.

The rows of the frontier, smallest first, cut every tensor into blocks. A block belongs to the level of the first row
that needs it, and each level has its own shards: row k needs shards of the levels 0..k alone. An index for every row
names the blocks that it needs and where they are; `model.safetensors.index.json` names all of them.
`FlextronConfig.transformers_weights` says which index a budget needs, and transformers downloads what that names.

The name of a block says where it lies: `model.norm.weight[0:32]`, `...up_proj.weight[0:24,32:64]`. A tensor that no row
cuts keeps its own name, so a plain checkpoint is the special case of one block for each tensor, and the reader is the
same. It hands transformers lazy tensors that are put together from their blocks when they are read.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, combinations, pairwise, product
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import convert_file_size_to_int
from transformers.utils.logging import tqdm

from .errors import invalid
from .families import ELASTIC, axes, layer_of
from .frontier import held
from .subnetwork import SubNetwork

Box = tuple[tuple[int, int], ...]  # of every dimension where it begins and where it ends

LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
BLOCK = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<box>\d+:\d+(?:,\d+:\d+)*)\])?")
SHARD = re.compile(r"model(\.level\d+)?(-\d{5}-of-\d{5})?\.safetensors")
DTYPES = {  # of torch -> of safetensors
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip
AGAIN = "Download or export the checkpoint again; `flextron verify` looks at all of it."
BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


def index_name(level: int | None) -> str:
    """File name of the index of a level's row; None for that of everything."""
    return SAFE_WEIGHTS_INDEX_NAME if level is None else f"model.level{level}.safetensors.index.json"


def level_of(config: Any, wanted: SubNetwork) -> int | None:
    """The first level whose row contains a sub-network; None when only all levels together do."""
    rows = held(config.frontier)
    for level, name in enumerate(config.levels["rows"]):
        if rows[name].contains(wanted):
            return level
    return None


def check_levels(config: Any, levels: Any) -> None:
    """Refuse a description of levels that does not fit a config.

    Raises:
        ValueError: what is wrong with it.
    """
    remedy = "Write the checkpoint with `flextron export`, or pass None for a plain one."
    if not isinstance(levels, dict) or set(levels) != {"checkpoint", "rows"}:
        raise invalid("levels", levels, "It has the fields checkpoint, rows.", remedy)
    if not isinstance(levels["checkpoint"], str):
        raise invalid("levels['checkpoint']", levels["checkpoint"], "It is the text that its files share.", remedy)
    known = {row.name for row in config.frontier}
    rows = levels["rows"]
    if not isinstance(rows, list) or not all(isinstance(name, str) and name in known for name in rows):
        raise invalid("levels['rows']", rows, "They are names of rows of the frontier, smallest first.", remedy)
    if config.dtype is None:
        raise invalid("dtype", None, "Blocks of levels have one dtype.", remedy)


# ---------------------------------------------------------------------------------------------------- reading


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


class StoredTensor:
    """The leading part of a tensor in safetensors files, put together from its blocks when it is indexed.

    It has the three methods that transformers uses of a safetensors slice. A file is opened for every read: pages of a
    mapped tensor stay in memory until its mapping closes.
    """

    def __init__(self, blocks: list[Block], shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = shape, dtype
        self.box = tuple((0, size) for size in shape)
        self.parts = [(block, part) for block in blocks if (part := overlap(block.box, self.box))]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

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


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None when that is nothing."""
    common = tuple((max(low, start), min(high, end)) for (low, high), (start, end) in zip(a, b, strict=True))
    return common if all(low < high for low, high in common) else None


def volume(box: Box) -> int:
    """Numbers in a box."""
    return prod(high - low for low, high in box)


def parse_block(key: str) -> tuple[str, Box | None]:
    """The tensor and the box that the name of a block means; no box for a whole tensor.

    Raises:
        ValueError: it is no such name.
    """
    match = BLOCK.fullmatch(key)
    if match is None:
        raise invalid("tensor", key, "It is no name of a tensor or of a block.", AGAIN)
    if match["box"] is None:
        return match["name"], None
    low_high = (side.split(":") for side in match["box"].split(","))
    return match["name"], tuple((int(low), int(high)) for low, high in low_high)


def block_name(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """What a block is called; see `parse_block`."""
    if box == tuple((0, size) for size in shape):
        return name
    return f"{name}[{','.join(f'{low}:{high}' for low, high in box)}]"


def stored_tensors(model: Any, files: list[str], metadata: dict[str, Any] | None = None) -> dict[str, StoredTensor]:
    """The stored tensors that a model needs, each cut to the model's size, under the model's layer numbers.

    Args:
        model: A `FlextronPreTrainedModel`, usually still on the meta device; `model.stored` says which stored
            layers it keeps.
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
            total += prod(shape) * BYTES.get(dtype, 0)
            if (match := LAYER.search(name)) and int(match[2]) < model.stored_depth:  # else unexpected, as it is
                if int(match[2]) not in position:
                    continue
                name = LAYER.sub(f"{match[1]}layers.{position[int(match[2])]}.", name)
            blocks.setdefault(name, []).append(Block(file, key, box))
            dtypes.setdefault(name, dtype)
    if index is not None and total != index["total_size"]:
        rule = f"Its blocks have {total:,} bytes, and it says {index['total_size']}."
        raise invalid("index", index["checkpoint"], rule, AGAIN)
    found = {}
    for name, parts in blocks.items():
        whole = tuple(max(part.box[dim][1] for part in parts) for dim in range(len(parts[0].box)))
        aliases = (name, name.removeprefix(prefix), prefix + name)
        ours = next((alias for alias in aliases if alias in shapes), None)
        # What does not fit stays as it is: transformers then says which tensor that is. Only a budget takes parts.
        exact = ours is not None and shapes[ours] == whole
        fits = exact or (ours is not None and bool(model.stored) and _is_leading(axes(ours), shapes[ours], whole))
        if index is not None and ours is not None and not fits:
            rule = f"The files hold {whole} of it, and this model needs {shapes[ours]}."
            raise invalid("tensor", name, rule, AGAIN)
        found[name] = StoredTensor(parts, shapes[ours] if fits and ours is not None else whole, dtypes[name])
        _check_tiles(name, found[name])
    if index is not None:
        held = {name.removeprefix(prefix) for name in found}
        decoder = [name for name in stored_state(model) if model.base_model is model or name.startswith(prefix)]
        if lacking := [name for name in decoder if name.removeprefix(prefix) not in held]:
            raise invalid("index", index["checkpoint"], f"It does not name the tensor {lacking[0]!r}.", AGAIN)
    return found


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


# ---------------------------------------------------------------------------------------------------- writing


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


def stored_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model holds; of tied ones, one."""
    return {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _shapes_at(model: Any, subnetwork: SubNetwork) -> dict[str, tuple[int, ...]]:
    """The shapes that a model loaded at a sub-network has, under the layer numbers of the whole one."""
    config = deepcopy(model.config)
    config.flextron_budget = subnetwork.to_dict()
    with torch.device("meta"):
        small = type(model)(config)
    shapes = {}
    for name, tensor in stored_state(small).items():
        layer = layer_of(name)
        if layer is not None:
            name = name.replace(f"layers.{layer}.", f"layers.{subnetwork.layers[layer]}.", 1)
        shapes[name] = tuple(tensor.shape)
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
    """As many pieces together as a file may hold, in order."""
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
            "dtype": DTYPES[state[piece.name].dtype], "shape": shape, "data_offsets": [begin, begin + piece.size],
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
    if not isinstance(weight_map, dict) or not isinstance(shards, dict) or type(metadata.get("total_size")) is not int:
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
