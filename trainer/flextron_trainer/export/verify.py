"""Is a checkpoint in levels whole, and that of its config?"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.level_blocks import AGAIN, index_name
from modeling_flextron.level_reader import read_index, stored_tensors

from ..models import kind_of


def verify(folder: Path) -> dict[str, Any]:
    """Check the files of a checkpoint in levels.

    Args:
        folder: Where it lies.

    Returns:
        `checkpoint`; `rows`, the sizes that were checked; `files` and `bytes`, how much was read.

    Raises:
        ValueError: the folder has no levels, or its files do not fit together; the message names the file.
        OSError: a file is missing, truncated or damaged.
    """
    config = FlextronConfig.from_pretrained(folder)
    if config.levels is None:
        rule = "Its config describes no levels, and files of whole tensors come without hashes."
        raise invalid("folder", str(folder), rule, "Write what is to be kept or sent with `flextron export`.")
    kind = kind_of(config)
    shards: dict[str, dict[str, Any]] = {}
    sizes = held(config.frontier)
    rows = [(level, sizes[name]) for level, name in enumerate(config.levels["rows"])]
    for level, row in [*rows, (None, None)]:
        index = read_index(folder / index_name(level))
        small = FlextronConfig.from_pretrained(folder, flextron_budget=row)
        with torch.device("meta"):
            model = kind(small)
        files = sorted(set(index["weight_map"].values()))
        stored_tensors(model, [str(folder / file) for file in files], index)
        for file in files:
            known = shards.setdefault(file, index["shards"][file])
            if known != index["shards"][file]:
                raise invalid("index", index_name(level), f"Another index says something else of {file}.", AGAIN)
    with tqdm(total=sum(shard["size"] for shard in shards.values()), unit="B", unit_scale=True, desc="Hashing") as bar:
        for file, shard in shards.items():
            digest = hashlib.sha256()
            with open(folder / file, "rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != shard.get("sha256"):
                raise OSError(f"{folder / file} is damaged: its hash is not the one that its index says. {AGAIN}")
    total = sum(shard["size"] for shard in shards.values())
    return {
        "checkpoint": config.levels["checkpoint"],
        "rows": [*config.levels["rows"], "everything"],
        "files": len(shards),
        "bytes": total,
    }
