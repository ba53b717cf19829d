"""How long a sub-network takes on a device: measured for each choice once, predicted for every sub-network.

The lookup table of Flextron (arXiv 2406.10260, figure 3): the time of a network is the sum of what its parts take,

    T = rest(h) + sum over kept layers of [ mlp(h, m) + heads(h, a) - layer(h) ]

with hidden size h, MLP m and heads a of the layer; mlp(h, m) is a layer with that MLP and all heads, heads(h, a) one
with those heads and the full MLP, layer(h) one with both full, and rest(h) everything outside the layers. Each entry
comes from timing the whole network with one choice changed in all layers, so that caches, kernels and Python are
those of real use. What the sum leaves out is measured too: the error on random sub-networks is part of the table.

Times are seconds; a decoding step makes one token for each sequence of the batch.
"""

import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import cached_file, logging

from .checkpoint import write_file_beside
from .drafting import LENGTHS, Watch, constant, share_draft
from .errors import invalid, require_int
from .subnetwork import Cost, SubNetwork, random_subnetwork, smallest_subnetwork

logger = logging.get_logger(__name__)
MODES = ("decode", "prefill")
FOLDER = "latency"
REMEDY = "Measure again with `flextron measure`."
_PIECES = 5  # of what `generate` writes with drafts, for one measurement


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and -1e6 < value < 1e6  # seconds; what is below zero is noise


CONDITIONS = {  # by which a table is found, and what they must be
    "kind": (_is_name, "It is a kind of device."),
    "dtype": (_is_name, "It is the name of a dtype."),
    "batch": (_is_count, "It is a number of sequences."),
    "context": (_is_count, "It is a number of tokens."),
}


def device_name(kind: str) -> str:
    """What the processor of this machine is called."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or kind


def context_length(config: Any, context: int | None, made: int) -> int:
    """How many tokens to read before `made` more: `context`, or when that is None 512, or as many as there is room for.

    Raises:
        ValueError: it is not positive, or the model has too few positions.
    """
    context = min(512, config.max_position_embeddings - made) if context is None else context
    require_int("context", context)
    if context + made > config.max_position_embeddings:
        rule = f"The model has {config.max_position_embeddings} positions, and tokens it makes need {made}."
        raise invalid("context", context, rule, "Pass fewer tokens.")
    return context


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

    @property
    def file_name(self) -> str:
        """Where it is kept in a repository."""
        parts = f"{self.device} {self.conditions['dtype']} batch {self.conditions['batch']}"
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in parts.lower()).split()
        if not self.device.isascii():  # and may differ from others in the letters that are left out
            words.append(hashlib.sha256(self.device.encode(errors="backslashreplace")).hexdigest()[:8])
        return f"{FOLDER}/{'-'.join(words)}.json"

    @property
    def summary(self) -> dict[str, Any]:
        """What a config lists of it."""
        return {"device": self.device, **{key: self.conditions[key] for key in CONDITIONS}}

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON."""
        with write_file_beside(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any = None) -> "LatencyTable":
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

    # ------------------------------------------------------------------------------------------- measuring

    @classmethod
    def measure(
        cls,
        model: Any,
        *,
        batch: int = 1,
        context: int | None = None,
        rounds: int = 15,
        checks: int = 10,
        seed: int = 0,
        progress: str | os.PathLike | None = None,
    ) -> "LatencyTable":
        """Time every choice of a model where it is.

        Args:
            model: A `FlextronForCausalLM` with all its sizes in memory, on its device and in its dtype.
            batch: Sequences at the same time.
            context: Tokens that are read in `"prefill"`, and that are in the cache in `"decode"`; None for 512, or as
                many as the model has room for.
            rounds: How often each network is timed; every round times all of them in a random order.
            checks: Random sub-networks whose time is predicted and measured.
            seed: Of the order, the tokens and the random sub-networks.
            progress: File in which the rounds are kept while they are measured; a later call with the same model and
                conditions goes on there.

        Raises:
            ValueError: a number is not positive, or the context is longer than the model allows.
        """
        for name, value in (("batch", batch), ("rounds", rounds), ("checks", checks)):
            require_int(name, value)
        config, kind = model.config, model.device.type
        context = context_length(config, context, made=1)
        conditions: dict[str, Any] = {
            "kind": kind, "threads": torch.get_num_threads() if kind == "cpu" else None,
            "dtype": str(model.dtype).removeprefix("torch."), "attention": config._attn_implementation,
            "batch": batch, "context": context,
        }  # fmt: skip
        generator = random.Random(seed)
        random_ones = [random_subnetwork(config, generator) for _ in range(checks)]
        networks = list(dict.fromkeys([*_probes(config).values(), *random_ones]))
        device = device_name(kind)
        rows = _Rounds(
            progress, {"device": device, **conditions, "shape": shape_of(config), "seed": seed}, len(networks)
        )
        run = _Runner(model, batch, context, seed)
        todo = range(len(rows.done), rounds)
        was_training = model.training
        model.eval()
        try:
            for _ in logging.tqdm(todo, desc=f"Timing {len(networks)} networks", unit="round"):
                rows.add(run.round(networks, generator) | {"drafting": run.drafting()})
        finally:
            model.train(was_training)

        times = {mode: {n: [r[mode][i] for r in rows.done] for i, n in enumerate(networks)} for mode in MODES}
        median = {mode: {n: statistics.median(t) for n, t in times[mode].items()} for mode in MODES}
        table = cls(
            device,
            conditions | {"rounds": len(rows.done), "date": time.strftime("%Y-%m-%d"), "versions": _versions()},
            shape_of(config) | {"layers": len(config.built.layers)},
            {mode: _costs(config, median[mode]) for mode in MODES},
            {mode: statistics.median(map(_spread, times[mode].values())) for mode in MODES},
            drafting=_drafting([r.get("drafting", {}) for r in rows.done], median["decode"][config.built]),
        )
        for mode in MODES:
            pairs = [(table.predict(network, mode), median[mode][network]) for network in random_ones]
            errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
            points = [
                {"subnetwork": network.to_dict(), "predicted": predicted, "measured": measured}
                for network, (predicted, measured) in zip(random_ones, pairs, strict=True)
            ]
            table.errors[mode] = {"median": statistics.median(errors), "worst": max(errors), "points": points}
        rows.forget()
        return table


def check_table(file: str, content: Any, layers: int | None = None) -> None:
    """Refuse what is no latency table.

    Args:
        file: Where it was read.
        content: What was read there.
        layers: Of the model, for tables of older versions, which do not say.

    Raises:
        ValueError: what is wrong with it; the message names file and field.
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
            require(_is_time(seconds), ("costs", mode, hidden, *key), seconds, "It is a number of seconds.")
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
            require(_is_time(seconds) and seconds >= 0, ("drafting", key), seconds, "It is a number of seconds.")


def check_summary(file: Any, entry: Any) -> None:
    """Refuse what cannot be the entry of a table in a config.

    Raises:
        ValueError: what is wrong with it.
    """
    right = isinstance(file, str) and re.fullmatch(r"latency/[\w-]+\.json", file) and isinstance(entry, dict)
    if not right or set(entry) != {"device", *CONDITIONS}:
        rule = f"A table is a file 'latency/NAME.json' with device, {', '.join(CONDITIONS)}."
        raise invalid("latency_tables", {file: entry}, rule, "Write it with `flextron measure`.")
    for key, (is_right, rule) in {"device": (_is_name, "It is a name."), **CONDITIONS}.items():
        if not is_right(entry[key]):
            raise invalid(f"latency_tables[{file!r}][{key!r}]", entry[key], rule, REMEDY)


def _at(value: Any, *keys: str) -> Any:
    """What nested dicts hold; None where they do not go so far."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def shape_of(config: Any) -> dict[str, Any]:
    """What a table must have in common with a model."""
    axes = {axis: list(config.choices(axis)) for axis in ("hidden", "mlp", "heads")}
    return axes | {"vocab_size": config.vocab_size, "head_dim": config.head_dim, "family": config.base_model_type}


def nearest(tables: dict[str, dict[str, Any]], kind: str, device: str, dtype: str | None) -> str:
    """The file of the table for a device: of the same name, else of the same kind, then of the dtype."""

    def distance(file: str) -> tuple:
        table = tables[file]
        return table["device"] != device, table["kind"] != kind, table["dtype"] != dtype, table["batch"], file

    return min(tables, key=distance)


def table_of(config: Any) -> LatencyTable | None:
    """The table whose device is nearest to that of this machine, among those that a config lists.

    Raises:
        ValueError: the table is broken, or one of another model.
        OSError: it is listed and cannot be found.
    """
    if not config.latency_tables:
        return None
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    here = device_name(kind)
    file = nearest(config.latency_tables, kind, here, str(config.dtype).removeprefix("torch."))
    table = LatencyTable.load(_beside(config, file), config)
    if table.device != here:
        logger.warning_once(f"Latency budgets use the table of {table.device}; this machine has {here}.")
    return table


def copy_tables(config: Any, folder: str | os.PathLike) -> None:
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


def _beside(config: Any, file: str) -> str:
    """Path of a file that lies beside the `config.json` that a config was read from."""
    commit = getattr(config, "_commit_hash", None)
    path = cached_file(config.name_or_path, file, revision=commit, _commit_hash=commit)
    assert path is not None  # it raises instead
    return path


def _probes(config: Any) -> dict[tuple, SubNetwork]:
    """The networks that tell the cost of every choice, by (hidden size, axis, choice)."""
    built, probes = config.built, {}
    few = tuple(sorted(config.anchors()))
    for hidden in config.choices("hidden"):

        def network(layers: tuple[int, ...], mlp=None, heads=None, hidden=hidden) -> SubNetwork:
            return SubNetwork(
                hidden,
                layers,
                tuple(min(mlp or size, size) for size in (built.mlp[layer] for layer in layers)),
                tuple(min(heads or size, size) for size in (built.heads[layer] for layer in layers)),
            )

        probes[hidden, "full", None] = network(built.layers)
        probes[hidden, "few", None] = network(few)
        for mlp in config.choices("mlp"):
            probes[hidden, "mlp", mlp] = network(built.layers, mlp=mlp)
        for heads in config.choices("heads"):
            probes[hidden, "heads", heads] = network(built.layers, heads=heads)
    return probes


def _costs(config: Any, median: dict[SubNetwork, float]) -> dict[str, dict[str, Any]]:
    """The entries of a table from the times of the probes."""
    probes, result = _probes(config), {}
    layers, few = len(config.built.layers), len(config.anchors())
    for hidden in config.choices("hidden"):
        full = median[probes[hidden, "full", None]]
        layer = (full - median[probes[hidden, "few", None]]) / (layers - few) if layers > few else full / layers
        result[str(hidden)] = {
            "rest": full - layers * layer,
            "layer": layer,
            **{
                axis: {
                    str(size): layer + (median[probes[hidden, axis, size]] - full) / layers
                    for size in config.choices(axis)
                }
                for axis in ("mlp", "heads")
            },
        }
    return result


def _drafting(rounds: list[dict[str, float]], decode: float) -> dict[str, Any]:
    """What a table has of drafting, from the measured rounds and the seconds of a decoding step."""
    if not all(rounds):
        return {}

    def median(seconds: Iterable[float]) -> float:
        return max(0.0, statistics.median(seconds))  # what is below is noise

    more = {str(n): median(r[str(n)] - n * r["draft"] - r["token"] for r in rounds) for n in LENGTHS}
    return {"loop": median(r["token"] - decode for r in rounds), "more": more}


class _Runner:
    """Times decoding steps and prefills of the sub-networks of a model."""

    def __init__(self, model: Any, batch: int, context: int, seed: int):
        self.model = model
        ids = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(model.config.vocab_size, (batch, context), generator=ids).to(model.device)

    @torch.inference_mode()
    def round(self, networks: list[SubNetwork], generator: random.Random) -> dict[str, list[float]]:
        """Seconds of every network in both modes, measured in a random order."""
        times = {mode: [0.0] * len(networks) for mode in MODES}
        order = list(range(len(networks)))
        generator.shuffle(order)
        for i in order:
            cache = DynamicCache(config=self.model.config)

            def prefill(network=networks[i], cache=cache):
                self.model(self.ids, past_key_values=cache, logits_to_keep=1, flextron_budget=network)

            def decode(network=networks[i], cache=cache):
                self.model(self.ids[:, :1], past_key_values=cache, flextron_budget=network)

            times["prefill"][i] = self._seconds(prefill)
            decode()  # warms up
            times["decode"][i] = statistics.median(self._seconds(decode) for _ in range(3))
        return times

    def drafting(self) -> dict[str, float]:
        """Seconds between two pieces of what `generate` writes, by what writes them.

        `token` is the full network and `draft` the smallest one, each alone; then both together, by the length of the
        drafts. What of them is kept does not matter. Nothing for several sequences, or without room for the tokens.
        """
        room = self.model.config.max_position_embeddings - _PIECES * (LENGTHS[-1] + 1)
        if len(self.ids) > 1 or room < 1:
            return {}
        ids, smallest = self.ids[:, :room], smallest_subnetwork(self.model.config)
        result = {"token": self._piece(ids), "draft": self._piece(ids, flextron_budget=smallest)}
        for length in LENGTHS:
            draft = share_draft(self.model, smallest, **constant(length))
            result[str(length)] = self._piece(ids, assistant_model=draft)
        return result

    def _piece(self, ids: torch.Tensor, **kwargs: Any) -> float:
        """Seconds between pieces, the median."""
        watch = Watch()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_PIECES * (LENGTHS[-1] + 1),
            eos_token_id=self.model.config.vocab_size,  # which is never written
            pad_token_id=0,
            streamer=watch,
            stopping_criteria=[lambda ids, scores: torch.full((1,), len(watch.sizes) > _PIECES, device=ids.device)],
            **kwargs,
        )
        times = watch.times[1:]  # the prompt is read before the first piece
        return statistics.median(after - before for before, after in pairwise(times))

    def _seconds(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class _Rounds:
    """Measured rounds, kept in a file while more are made."""

    def __init__(self, path: str | os.PathLike | None, conditions: dict[str, Any], networks: int):
        self.path, self.conditions, self.done = path and Path(path), conditions, list[dict[str, Any]]()
        if self.path and self.path.is_file():
            try:
                kept = json.loads(self.path.read_text(encoding="utf-8"))
                if kept["conditions"] == json.loads(json.dumps(conditions)):
                    self.done = [_round(each, networks) for each in kept["rounds"]]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                logger.warning(f"The rounds in {self.path} cannot be read, and are measured again: {error!r}")

    def add(self, times: dict[str, Any]) -> None:
        self.done.append(times)
        if self.path:
            with write_file_beside(self.path) as beside:
                kept = {"conditions": self.conditions, "rounds": self.done}
                beside.write_text(json.dumps(kept), encoding="utf-8")

    def forget(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


def _round(kept: dict[str, Any], networks: int) -> dict[str, Any]:
    """A round that was kept.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    for times in (kept[mode] for mode in MODES):
        if len(times) != networks or not all(map(_is_time, times)):
            raise ValueError(f"{len(times)} times of {networks} networks")
    if not isinstance(kept["drafting"], dict) or not all(map(_is_time, kept["drafting"].values())):
        raise ValueError("times of drafting")
    return kept


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / middle


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
