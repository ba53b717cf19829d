"""Measuring a latency table: every choice of a model is timed, in turns, on the device where it is.

What a table holds and predicts: `modeling_flextron/latency.py`.
"""

import hashlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM, LatencyTable, SubNetwork
from modeling_flextron.drafting import Watch, constant, share_draft
from modeling_flextron.errors import invalid, require_int
from modeling_flextron.latency import CONDITIONS, LENGTHS, MODES, device_name, is_seconds, shape_of
from modeling_flextron.subnetwork import random_subnetwork, smallest_subnetwork

from ..files import write_json
from ..models import write_config

logger = logging.get_logger(__name__)
FOLDER = "latency"
_PIECES = 5  # of what `generate` writes with drafts, for one measurement


def context_length(config: FlextronConfig, context: int | None, made: int) -> int:
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


def measure_latency(
    model: FlextronForCausalLM,
    *,
    batch: int = 1,
    context: int | None = None,
    rounds: int = 15,
    checks: int = 10,
    seed: int = 0,
    progress: str | os.PathLike | None = None,
) -> LatencyTable:
    """Measure the latency table of a model where it is: time every choice.

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
    rows = _Rounds(progress, {"device": device, **conditions, "shape": shape_of(config), "seed": seed}, len(networks))
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
    table = LatencyTable(
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


def measure_into(folder: Path, model: FlextronForCausalLM, **options: Any) -> LatencyTable:
    """Measure the table of a model and put it into the folder where the model is saved, beside those of other devices.

    Args:
        folder: Rounds are kept there, too, and a later call goes on with them.
        model: What is saved there.
        options: As of `measure_latency`.
    """
    table = measure_latency(model, progress=folder / FOLDER / ".rounds.json", **options)
    write_table(table, folder / file_of(table))
    config = FlextronConfig.from_pretrained(folder)
    config.latency_tables[file_of(table)] = entry_of(table)
    write_config(model, folder, config)
    return table


def file_of(table: LatencyTable) -> str:
    """Where a table is kept in a repository."""
    parts = f"{table.device} {table.conditions['dtype']} batch {table.conditions['batch']}"
    parts_of_name = "".join(c if c.isascii() and c.isalnum() else " " for c in parts.lower()).split()
    if not table.device.isascii():  # and may differ from others in the letters that are left out
        parts_of_name.append(hashlib.sha256(table.device.encode(errors="backslashreplace")).hexdigest()[:8])
    return f"{FOLDER}/{'-'.join(parts_of_name)}.json"


def entry_of(table: LatencyTable) -> dict[str, Any]:
    """The entry of a config that lists a table."""
    return {"device": table.device, **{key: table.conditions[key] for key in CONDITIONS}}


def write_table(table: LatencyTable, path: str | os.PathLike) -> None:
    """Write a table as JSON, as `LatencyTable.load` reads it."""
    write_json(path, asdict(table))


def _probes(config: FlextronConfig) -> dict[tuple, SubNetwork]:
    """The networks that tell the cost of every choice, by (hidden size, axis, choice)."""
    built, probes = config.built, dict[tuple, SubNetwork]()
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


def _costs(config: FlextronConfig, median: dict[SubNetwork, float]) -> dict[str, dict[str, Any]]:
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
    """The entry for drafting of a table, from the measured rounds and the seconds of a decoding step."""
    if not all(rounds):
        return {}

    def median(seconds: Iterable[float]) -> float:
        return max(0.0, statistics.median(seconds))  # what is below is noise

    more = {str(n): median(r[str(n)] - n * r["draft"] - r["token"] for r in rounds) for n in LENGTHS}
    return {"loop": median(r["token"] - decode for r in rounds), "more": more}


class _Runner:
    """Times decoding steps and prefills of the sub-networks of a model."""

    def __init__(self, model: FlextronForCausalLM, batch: int, context: int, seed: int):
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
            write_json(self.path, {"conditions": self.conditions, "rounds": self.done})

    def forget(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


def _round(kept: dict[str, Any], networks: int) -> dict[str, Any]:
    """A round that was kept.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    for times in (kept[mode] for mode in MODES):
        if len(times) != networks or not all(map(is_seconds, times)):
            raise ValueError(f"{len(times)} times of {networks} networks")
    if not isinstance(kept["drafting"], dict) or not all(map(is_seconds, kept["drafting"].values())):
        raise ValueError("times of drafting")
    return kept


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / middle


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
