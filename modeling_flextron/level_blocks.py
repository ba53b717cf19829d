"""The level layout: one checkpoint cut into blocks, so that a size is a few files of it.

The rows of the frontier, smallest first, cut every tensor into blocks. A block belongs to the level of the first row
that needs it, and each level has its own shards: row k needs shards of the levels 0..k alone. An index for every row
names the blocks that it needs and where they are; `model.safetensors.index.json` names all of them.
`FlextronConfig.transformers_weights` says which index a budget needs.

The name of a block says where it lies: `model.norm.weight[0:32]`, `...up_proj.weight[0:24,32:64]`. A tensor that no row
cuts keeps its own name.
"""

import re
from math import prod
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .errors import invalid
from .frontier import held
from .subnetwork import SubNetwork

Box = tuple[tuple[int, int], ...]  # of every dimension where it begins and where it ends

BLOCK = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<box>\d+:\d+(?:,\d+:\d+)*)\])?")
DTYPES = {  # of safetensors -> of torch
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
AGAIN = "Download or export the checkpoint again; `flextron verify` looks at all of it."


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
    """Refuse a description of levels that does not fit a config."""
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


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes have in common; None when there is none."""
    common = tuple((max(low, start), min(high, end)) for (low, high), (start, end) in zip(a, b, strict=True))
    return common if all(low < high for low, high in common) else None


def volume(box: Box) -> int:
    """Numbers in a box."""
    return prod(high - low for low, high in box)


def parse_block(key: str) -> tuple[str, Box | None]:
    """The tensor and the box that the name of a block means, or a `ValueError`; no box for a whole tensor."""
    match = BLOCK.fullmatch(key)
    if match is None:
        raise invalid("tensor", key, "It is no name of a tensor or of a block.", AGAIN)
    if match["box"] is None:
        return match["name"], None
    low_high = (side.split(":") for side in match["box"].split(","))
    return match["name"], tuple((int(low), int(high)) for low, high in low_high)
