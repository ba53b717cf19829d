"""How long a sub-network takes on a device: measured for each choice once, predicted for every sub-network.

How it is measured: `flextron_trainer/measuring/latency.py`.

The lookup table of Flextron (arXiv 2406.10260, figure 3): the time of a network is the sum of what its parts take,

    T = rest(h) + sum over kept layers of [ mlp(h, m) + heads(h, a) - layer(h) ]

with hidden size h, MLP m and heads a of the layer; mlp(h, m) is a layer with that MLP and all heads, heads(h, a) one
with those heads and the full MLP, layer(h) one with both full, and rest(h) everything outside the layers. The error of
the sum on random sub-networks is part of the table.

Times are seconds; a decoding step makes one token for each sequence of the batch.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import cached_file, logging

from .errors import invalid
from .subnetwork import Cost, Shape, SubNetwork

logger = logging.get_logger(__name__)
MODES = ("decode", "prefill")
LENGTHS = (1, 2, 4, 8)  # of drafts, in tokens
REMEDY = "Measure again with `flextron measure`."


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and -1e6 < value < 1e6  # seconds; what is below zero is noise


CONDITIONS = {  # by which a table is found, and what they must be
    "kind": (_is_name, "It is a kind of device."),
    "dtype": (_is_name, "It is the name of a dtype."),
    "batch": (_is_count, "It is a number of sequences."),
    "context": (_is_count, "It is a number of tokens."),
}


def device_name(kind: str) -> str:
    """Name of the processor of this machine."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or kind


class HasTables(Shape, Protocol):
    """A config that lists latency tables, and the folder or repo in which they are."""

    base_model_type: str
    latency_tables: dict[str, dict[str, Any]]
    name_or_path: Any
    _read_at: dict[str, Any] | None


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of the parts of a model on one device.

    Args:
        device: Name of the processor.
        conditions: `kind` (`"cpu"`, `"cuda"`), `threads`, `dtype`, `attention`, `batch`, `context`, `rounds`, `date`
            and library `versions`.
        shape: The choices of the model on every axis, its vocabulary, head size and family, and the number of `layers`
            that it was measured with.
        costs: Mode (`"decode"`, `"prefill"`) -> hidden size -> `rest` and `layer` in seconds, and `mlp` and `heads`
            from choice to seconds.
        spread: Mode -> median over all measurements of (upper - lower quartile) / median.
        errors: Mode -> `median` and `worst` relative error on random sub-networks, and those `points`.
        drafting: Of speculative decoding (`drafting.py`), which needs batch 1: `loop`, the seconds that `generate` adds
            to a decoding step, and `more`, those by which a cycle with so many drafted tokens is longer than a token
            and its draft.
    """

    device: str
    conditions: dict[str, Any]
    shape: dict[str, Any]
    costs: dict[str, dict[str, dict[str, Any]]]
    spread: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)

    def cost(self, mode: str = "decode") -> Cost:
        """Seconds: for a token with `"decode"`, for the context with `"prefill"`."""
        costs = self.costs[mode]

        def layer(hidden: int, mlp: int, heads: int) -> float:
            row = costs[str(hidden)]
            return row["mlp"][str(mlp)] + row["heads"][str(heads)] - row["layer"]

        return Cost(lambda hidden: costs[str(hidden)]["rest"], layer)

    def predict(self, subnetwork: SubNetwork, mode: str = "decode") -> float:
        """Seconds that a sub-network takes; see `cost`."""
        return self.cost(mode)(subnetwork)

    @classmethod
    def load(cls, path: str | os.PathLike, config: HasTables | None = None) -> "LatencyTable":
        """Read a table, and check that it is one of `config`'s model.

        Raises:
            ValueError: the file is not a table, or one of another model; the message names file and field.
        """
        text = Path(path).read_bytes()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid(str(path), text, f"A latency table is JSON: {error!r}.", REMEDY) from None
        check_table(str(path), content, None if config is None else len(config.built.layers))
        table = cls(**content)
        if config is not None:
            for key, value in shape_of(config).items():
                stored = table.shape.get(key)
                if not (set(value) <= set(stored or ()) if isinstance(value, list) else value == stored):
                    rule = f"It was measured on a model with `{key}` {stored}, and this one has {value}."
                    raise invalid(f"{path}['shape'][{key!r}]", stored, rule, REMEDY)
        return table


def check_table(file: str, content: Any, layers: int | None = None) -> None:
    """Refuse what is no latency table; the error names file and field.

    Older versions wrote no number of `layers`.
    """

    def require(holds: bool, place: Iterable[str], value: Any, rule: str) -> None:
        if not holds:
            raise invalid(file + "".join(f"[{key!r}]" for key in place), value, rule, REMEDY)

    known, needed = {field.name for field in fields(LatencyTable)}, {"device", "conditions", "shape", "costs"}
    whole = isinstance(content, dict) and needed <= set(content) <= known
    require(whole, (), content, f"A latency table has the fields {', '.join(sorted(known))}.")
    for key in set(content) - {"device"}:
        require(isinstance(content[key], dict), (key,), content[key], "It maps names to values.")
    require(_is_name(content["device"]), ("device",), content["device"], "It is the name of the processor.")
    for key, (is_right, rule) in CONDITIONS.items():
        value = content["conditions"].get(key)
        require(is_right(value), ("conditions", key), value, rule)
    shape = content["shape"]
    for axis in ("hidden", "mlp", "heads"):
        sizes = shape.get(axis)
        right = isinstance(sizes, list) and sizes and all(map(_is_count, sizes))
        require(bool(right), ("shape", axis), sizes, "It lists sizes.")
    layers = shape.get("layers", layers)
    require(layers is None or _is_count(layers), ("shape", "layers"), layers, "It is a number of layers.")
    for mode, hidden in product(MODES, map(str, shape["hidden"])):
        keys = [("rest",), ("layer",), *((axis, str(size)) for axis in ("mlp", "heads") for size in shape[axis])]
        times = {key: _at(content, "costs", mode, hidden, *key) for key in keys}
        for key, seconds in times.items():
            require(is_seconds(seconds), ("costs", mode, hidden, *key), seconds, "It is a number of seconds.")
        rest, layer = times.pop(("rest",)), times["layer",]
        mlp, heads = (times[axis, str(max(shape[axis]))] for axis in ("mlp", "heads"))
        # Such networks were timed as they are, so that noise explains none of these.
        for key, seconds in [*times.items(), (("layer",), mlp + heads - layer)]:
            takes = not layers or rest + layers * seconds > 0
            rule = f"{layers} layers of {seconds} s and the rest of {rest} s take some time."
            require(takes, ("costs", mode, hidden, *key), times[key], rule)
    if drafting := content.get("drafting"):
        more, lengths = drafting.get("more"), set(map(str, LENGTHS))
        right = set(drafting) == {"loop", "more"} and isinstance(more, dict) and set(more) == lengths
        require(right, ("drafting",), drafting, f"It has `loop`, and `more` for {LENGTHS} tokens.")
        for key, seconds in {"loop": drafting["loop"], **more}.items():
            require(is_seconds(seconds) and seconds >= 0, ("drafting", key), seconds, "It is a number of seconds.")


def check_tables(tables: Any) -> None:
    """Refuse what a config cannot list as its tables: file -> entry."""
    if not isinstance(tables, dict):
        raise invalid("latency_tables", tables, "It maps files to devices.", "Pass None for no tables.")
    for file, entry in tables.items():
        right = isinstance(file, str) and re.fullmatch(r"latency/[\w-]+\.json", file) and isinstance(entry, dict)
        if not right or set(entry) != {"device", *CONDITIONS}:
            rule = f"A table is a file 'latency/NAME.json' with device, {', '.join(CONDITIONS)}."
            raise invalid("latency_tables", {file: entry}, rule, "Write it with `flextron measure`.")
        for key, (is_right, rule) in {"device": (_is_name, "It is a name."), **CONDITIONS}.items():
            if not is_right(entry[key]):
                raise invalid(f"latency_tables[{file!r}][{key!r}]", entry[key], rule, REMEDY)


def _at(value: Any, *keys: str) -> Any:
    """The value in nested dicts; None where they do not go so far."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def shape_of(config: HasTables) -> dict[str, Any]:
    """The choices and sizes that a table must have in common with a model."""
    axes = {axis: list(config.choices(axis)) for axis in ("hidden", "mlp", "heads")}
    return axes | {"vocab_size": config.vocab_size, "head_dim": config.head_dim, "family": config.base_model_type}


def nearest(tables: dict[str, dict[str, Any]], kind: str, device: str, dtype: str | None) -> str:
    """The file of the table for a device: of the same name, else of the same kind, then of the dtype."""

    def distance(file: str) -> tuple:
        table = tables[file]
        return table["device"] != device, table["kind"] != kind, table["dtype"] != dtype, table["batch"], file

    return min(tables, key=distance)


def table_of(config: HasTables, kind: str | None = None) -> LatencyTable | None:
    """The table whose device is nearest to that of this machine, among those that a config lists.

    It is of a device of this `kind`; None means a GPU where there is one.

    Raises:
        ValueError: the table is broken, or one of another model.
        OSError: it is listed and cannot be found.
    """
    if not config.latency_tables:
        return None
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    here = device_name(kind)
    file = nearest(config.latency_tables, kind, here, str(config.dtype).removeprefix("torch."))
    table = LatencyTable.load(_beside(config, file), config)
    if table.device != here:
        logger.warning_once(f"Latency budgets use the table of {table.device}; this machine has {here}.")
    return table


def copy_tables(config: HasTables, folder: str | os.PathLike) -> None:
    """Put the tables that a config lists into another folder; what is not to be found is no longer listed."""
    for file in list(config.latency_tables):
        target = Path(folder) / file
        if not target.is_file():
            try:
                source = _beside(config, file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            except OSError as error:
                logger.warning(f"The latency table {file} is left out: {error}")
                del config.latency_tables[file]


def _beside(config: HasTables, file: str) -> str:
    """Path of a file that lies beside the `config.json` that a config was read from."""
    path = cached_file(config.name_or_path, file, **(config._read_at or {}))
    assert path is not None  # it raises instead
    return path
