"""The frontier of a model as a table for one machine, from its config and its indices: no weights are fetched."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_flextron import FlextronConfig
from modeling_flextron.budgets import SHARE, bytes_beside
from modeling_flextron.errors import invalid, is_number
from modeling_flextron.latency import LatencyTable, device_name, table_of
from modeling_flextron.level_blocks import index_name
from modeling_flextron.loading import HUB_DEFAULTS, first_file
from modeling_flextron.memory import in_units
from modeling_flextron.subnetwork import kv_cache_bytes, weight_bytes

from ..hub import retried
from ..models import reading
from ..publishing.card import figure_cell
from ..publishing.levels import row_bytes
from ..tables import FittingTable, Values

CONTEXTS = (1024, 4096, 16384)


def contexts_of(config: FlextronConfig, asked: Sequence[int] | None) -> list[int]:
    """Lengths of text for which memory is shown, as many as the model has positions for.

    Raises:
        ValueError: one that was asked for is no number of tokens, or more than the model has positions.
    """
    limit = config.max_position_embeddings
    for context in asked or ():
        if not 0 < context <= limit:
            raise invalid("context", context, f"The model has {limit} positions.", "Pass a number of tokens up to it.")
    return sorted({min(context, limit) for context in asked or CONTEXTS})


def sizes_here(
    source: str, config: FlextronConfig, kind: str, free: int, contexts: Sequence[int], dtype: torch.dtype | None = None
) -> list[dict[str, Any]]:
    """What every row of a frontier costs and does on a machine.

    Args:
        source: Folder or Hub id of the model, of which only the indices are fetched, and a latency table.
        config: Its config.
        kind: Of the device, such as `"cuda"`.
        free: Bytes of memory that are free there.
        contexts: Tokens of KV cache.
        dtype: In which the weights would be loaded; None for that of the config.

    Returns:
        For each row `name`, `parameters`, bytes of `download` and of `memory` (weights and KV cache) by context,
        `fits_tokens` (the longest context that fits into the share that `"fit"` takes; None for none), what was
        measured, and with a table of this very device `tokens_per_second`.
    """
    downloads, table, rows = _downloads(source, config), _table_of_this_device(config, kind), []
    for row in config.frontier:
        if (sub := row.subnetwork) is None:
            continue
        weights = weight_bytes(config, sub, dtype) + bytes_beside(config, sub, dtype)
        memory = {context: weights + kv_cache_bytes(config, sub, context, dtype) for context in contexts}
        entry = {"name": row.name, "parameters": row.parameters, "download": downloads.get(row.name), "memory": memory}
        entry["fits_tokens"] = max((context for context in contexts if memory[context] <= SHARE * free), default=None)
        entry |= {name: value for name, value in row.by_name.items() if is_number(value)}
        if table is not None:
            entry["tokens_per_second"] = table.conditions["batch"] / table.predict(sub)
        rows.append(entry)
    return rows


def table_of_sizes(rows: Sequence[dict[str, Any]]) -> FittingTable:
    """The rows of `sizes_here` as a table for people."""
    fixed = ("name", "parameters", "download", "memory", "fits_tokens", "tokens_per_second")
    figures = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in fixed]
    figures = [name for name in figures if not name.endswith("_stderr")]
    speed = any("tokens_per_second" in row for row in rows)
    heads = ["row", "parameters", "download", *(f"memory, {context:,} tokens" for context in rows[0]["memory"])]
    heads += ["fits now", *figures, *(["tokens/s"] if speed else [])]
    lines = []
    for row in rows:
        line = [row["name"], f"{row['parameters']:,}"]
        line.append("unknown" if row["download"] is None else in_units(row["download"]))
        line += map(in_units, row["memory"].values())
        line.append("no" if row["fits_tokens"] is None else f"{row['fits_tokens']:,} tokens")
        line += [figure_cell(row.get(name), row.get(f"{name}_stderr")) for name in figures]
        line += [f"{row['tokens_per_second']:,.1f}"] if speed else []
        lines.append(line)
    return FittingTable(
        [Values(head, cells, head != "row") for head, cells in zip(heads, zip(*lines, strict=True), strict=True)],
        "sizes",
    )


def _table_of_this_device(config: FlextronConfig, kind: str) -> LatencyTable | None:
    """The latency table that was measured on this kind of processor, where the model has one."""
    here = device_name(kind)
    listed = any(table["device"] == here and table["kind"] == kind for table in config.latency_tables.values())
    return table_of(config, kind) if listed else None


def _downloads(source: str, config: FlextronConfig) -> dict[str, int]:
    """Row -> bytes of weight files that loading it fetches, where that can be known."""
    if Path(source).is_dir():
        return row_bytes(Path(source), config)
    with reading("model", source):
        if config.levels is not None:
            levels = (*range(len(config.levels["rows"])), None)
            paths = [retried(partial(first_file, source, [index_name(level)], HUB_DEFAULTS)) for level in levels]
            return row_bytes(Path(paths[0]).parent, config)
        try:
            index = json.loads(Path(first_file(source, [SAFE_WEIGHTS_INDEX_NAME], HUB_DEFAULTS)).read_text())
            whole = index["metadata"]["total_size"]
        except OSError:  # one file, without an index
            whole = get_hf_file_metadata(hf_hub_url(source, SAFE_WEIGHTS_NAME)).size
    return {row.name: whole for row in config.frontier} if whole else {}
