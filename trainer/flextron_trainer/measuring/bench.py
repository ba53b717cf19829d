"""Measures what elasticity costs on a machine: sub-networks against stock models of one shape, in time and loading.

Every comparison is made between variants that run in the same rounds, in a random order, and is the median over rounds
of time / time of the reference in that round. Among the variants is a control, a second copy of the reference: how far
it is from 1 is how far other ratios can be believed.
"""

import datetime
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm
from transformers import DynamicCache

from modeling_flextron import count_parameters
from modeling_flextron.errors import require_int
from modeling_flextron.extraction import misfit
from modeling_flextron.frontier import held
from modeling_flextron.latency import device_name
from modeling_flextron.subnetwork import is_routed

from ..models import load_elastic
from .latency import context_length
from .loading import Load, fetched_bytes, measure_loads

STEPS = 16  # tokens that are decoded in a round
Variants = dict[str, tuple[Any, dict[str, Any]]]  # name -> model, and keywords of its forward pass
Ratios = dict[str, dict[str, float]]


# ----------------------------------------------------------------------------------------------------- timing


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions, for the result."""
    return {
        "device": device_name(torch.device(device).type),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, the variants of a round in random order.

    On one CPU thread it is process time, which other programs on the machine disturb least; otherwise wall time, on a
    GPU around a synchronisation.
    """
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffle = random.Random(0)
    for round_number in tqdm(range(rounds + warm_up), desc="Timing", unit="round", leave=False):
        order = list(variants)
        shuffle.shuffle(order)
        gc.collect()
        for name in order:
            gc.disable()
            start = clock()
            variants[name]()
            if on_gpu:
                torch.cuda.synchronize()
            elapsed = clock() - start
            gc.enable()
            if round_number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def against(seconds: dict[str, list[float]], reference: str) -> Ratios:
    """Per variant: the ratio to the reference in the same round (median and quartiles), and the median time."""
    result = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[name] = {
            "ratio": round(middle, 4),
            "ratio_25": round(low, 4),
            "ratio_75": round(high, 4),
            "milliseconds": round(1e3 * statistics.median(times), 3),
        }
    return result


def forward(model: Any, extra: dict[str, Any], ids: torch.Tensor) -> Callable[[], None]:
    """Reads a text."""

    def run() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1, **extra)

    return run


def decoding(model: Any, extra: dict[str, Any], ids: torch.Tensor, steps: int = STEPS) -> Callable[[], None]:
    """`steps` tokens one by one behind a context that is in the cache."""
    with torch.inference_mode():
        filled = model(ids, use_cache=True, logits_to_keep=1, **extra).past_key_values
        token = ids[:, -1:]

    def run() -> None:
        cache = DynamicCache(config=model.config)
        for layer, source in enumerate(filled.layers):
            if source.is_initialized:
                cache.update(source.keys, source.values, layer)
        with torch.inference_mode():
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True, **extra)

    return run


TASKS: dict[str, Callable] = {"prefill": forward, "decode": decoding}
OURS = ("family", "loaded")


# --------------------------------------------------------------------------------------------------- variants


def variants_of(model: Any, folder: str | os.PathLike, budget: Any) -> Variants:
    """The models of one size that are compared; the first is the reference.

    Args:
        model: The family, on its device and in its dtype.
        folder: Where it was loaded from.
        budget: The size.

    Returns:
        `native` and `control`, two stock models by `extract()`; `family`, the switchable model; `loaded`, one that was
        loaded at the budget. Where the stock class cannot hold the size, `loaded` is the reference, and `control` too
        is such a model.
    """
    subnetwork = model.resolve_budget(budget)
    loaded: tuple[Any, dict[str, Any]]
    loaded, family = (_loaded(model, folder, budget), {}), (model, {"flextron_budget": subnetwork})
    if is_routed(subnetwork) or misfit(model.config, subnetwork) is not None:
        return {"loaded": loaded, "control": (_loaded(model, folder, budget), {}), "family": family}
    copies: Variants = {name: (model.extract(subnetwork), {}) for name in ("native", "control")}
    return {**copies, "family": family, "loaded": loaded}


def _loaded(model: Any, folder: str | os.PathLike, budget: Any) -> Any:
    loaded = load_elastic(folder, flextron_budget=budget, dtype=model.dtype).to(model.device)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()  # nothing stays mapped from the file
    return loaded.eval()


def logits_difference(variants: Variants, ids: torch.Tensor) -> float:
    """Largest difference of the logits to those of the reference, relative to their size."""
    with torch.inference_mode():
        reference, *others = [model(ids, **extra).logits.float() for model, extra in variants.values()]
    return max((reference - other).abs().max().item() for other in others) / reference.abs().max().item()


def parameter_bytes(*models: torch.nn.Module) -> int:
    """Bytes of the memory that holds the weights of models; what they share counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def switching(model: Any, budgets: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of `set_budget` (median), and the weight bytes that it and `share` add."""
    times, before = [], parameter_bytes(model)
    for budget in list(budgets) * 50:
        start = time.perf_counter()
        model.set_budget(budget)
        times.append(time.perf_counter() - start)
    after, shared = parameter_bytes(model), parameter_bytes(model, *(model.share(budget) for budget in budgets))
    model.set_budget(None)
    return {
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "set_budget_bytes": after - before,
        "share_bytes": shared - before,
    }


# --------------------------------------------------------------------------------------------------- the verb


def bench(
    folder: Path,
    budgets: Sequence[Any] | None = None,
    *,
    context: int | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 15,
    device: str = "cpu",
    dtype: Any = "auto",
) -> dict[str, Any]:
    """Measure a model where it will run.

    Args:
        folder: Of the model, in levels or plain.
        budgets: Sizes to measure; None for the rows of the frontier.
        context: Tokens that are read in a prefill, and in the cache while more are made; None for 512, or as many as
            the model has room for.
        batch_sizes: Sequences at the same time.
        rounds: How often everything is timed.
        device, dtype: Where and in which dtype it runs.

    Returns:
        `loading`: for every budget the medians of `measure_loads`, of loading it and of loading everything and then
        extracting it; `cost`: for every budget, batch and task the ratios of `against`; `speed`: tokens per second of
        every budget, and `slower`, as `tokens_per_second` returns them; `switching`; `machine`.

    Raises:
        ValueError: a number is not positive, the context is too long, or a budget means nothing here.
    """
    for name, value in (("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)):
        require_int(name, value)
    model = load_elastic(folder, dtype=dtype)
    context = context_length(model.config, context, made=STEPS)
    names: dict[str, Any] = dict(held(model.frontier))
    if budgets is not None:
        names = {str(budget): budget for budget in budgets}
    sizes = {name: model.resolve_budget(budget) for name, budget in names.items()}
    dtype = model.dtype
    del model  # its files are mapped, and could not be dropped from the cache of the system
    loads = loading(folder, names, rounds, device, dtype)

    model = load_elastic(folder, dtype=dtype).to(device).eval()
    ids = torch.randint(
        model.config.vocab_size, (max(batch_sizes), context), generator=torch.Generator().manual_seed(0)
    )
    texts = [ids[:size].to(device) for size in batch_sizes]
    cost = []
    for name in tqdm(names, desc="Against stock models"):
        cost += [{"budget": name, **row} for row in _cost(variants_of(model, folder, names[name]), texts, rounds)]
    largest_first = sorted(sizes, key=lambda name: -_cost_of(model.config, sizes[name]))
    at_budget = {name: (model, {"flextron_budget": sizes[name]}) for name in largest_first}
    speed, found = tokens_per_second(at_budget, texts, rounds)
    return {
        "model": str(folder),
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "context": context,
        "rounds": rounds,
        "loading": loads,
        "cost": cost,
        "speed": speed,
        "slower": found,
        "switching": switching(model, list(sizes.values())),
    }


def loading(
    folder: Path, budgets: dict[str, Any], rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Medians of `measure_loads` over rounds, for every budget and way to load it; empty where there is no `fork`."""
    if not hasattr(os, "fork"):
        return []
    source, threads, name_of_dtype = str(folder.absolute()), torch.get_num_threads(), str(dtype).removeprefix("torch.")
    ways = {
        (name, how): Load(source, budget, how, dtype=name_of_dtype, device=device, threads=threads)
        for name, budget in budgets.items()
        for how in ("budget", "slice")
    }
    return [
        {"budget": name, "how": how, "fetched_bytes": fetched_bytes(folder, budgets[name] if how == "budget" else None)}
        | row
        for (name, how), row in loads_of(ways, rounds).items()
    ]


def loads_of(ways: dict[Any, Load], rounds: int) -> dict[Any, dict[str, Any]]:
    """Medians and all seconds of ways to load, those of a round in random order."""
    shuffle = random.Random(0)
    order = [name for _ in range(rounds) for name in shuffle.sample(list(ways), len(ways))]
    results: dict[Any, list[dict[str, Any]]] = {name: [] for name in ways}
    for name, result in zip(order, measure_loads([ways[name] for name in order]), strict=True):
        results[name].append(result)
    return {name: _medians(rows) for name, rows in results.items()}


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = {key: [row[key] for row in rows] for key in rows[0]}
    result = {key: None if None in column else statistics.median(column) for key, column in values.items()}
    return result | {"all_seconds": [round(seconds, 4) for seconds in values["seconds"]]}


def tokens_per_second(
    budgets: Variants, texts: Sequence[torch.Tensor], rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How fast every budget is, all of them in the same rounds.

    Args:
        budgets: Name -> model and keywords, largest first.
        texts: Ids `[B, S]` to read, and to decode behind.
        rounds: How often each is timed.

    Returns:
        `budget`, `what`, `batch` and `tokens_per_second` of everything; and `budget`, `than`, `what`, `batch` and
        `ratio` of budgets that were slower than the next larger one in three quarters of the rounds.
    """
    speed, slower = [], []
    for ids in tqdm(texts, desc="Over budgets"):
        for what, task in TASKS.items():
            place = {"what": what, "batch": len(ids)}
            tokens = ids.numel() if task is forward else len(ids) * STEPS
            seconds = _timed(task, budgets, ids, rounds)
            for name, times in seconds.items():
                rate = round(tokens / statistics.median(times), 1)
                speed.append({"budget": name, **place, "tokens_per_second": rate})
            for larger, smaller in pairwise(seconds):
                ratios = against({name: seconds[name] for name in (larger, smaller)}, larger)[smaller]
                if ratios["ratio_25"] > 1:
                    slower.append({"budget": smaller, "than": larger, **place, "ratio": ratios["ratio"]})
    return speed, slower


def _timed(task: Callable, variants: Variants, ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """`interleaved` of a task on one text."""
    return interleaved({name: task(*pair, ids) for name, pair in variants.items()}, rounds, str(ids.device))


def _cost(variants: Variants, texts: Sequence[torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """The ratios of one budget, for every text and task."""
    reference, rows = next(iter(variants)), []
    for ids in texts:
        for what, task in TASKS.items():
            seconds = _timed(task, variants, ids, rounds)
            rows.append({"what": what, "batch": len(ids), "reference": reference, **against(seconds, reference)})
    return rows


def _cost_of(config: Any, subnetwork: Any) -> float:
    """Parameters by which budgets are ordered."""
    if is_routed(subnetwork):
        return subnetwork.target * config.parent_size()
    return count_parameters(config, subnetwork, embeddings=False)


# ----------------------------------------------------------------------------------------------------- tables


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Lay out what `bench` found for reading."""
    table = Table("budget", "loaded", "fetched", "read", "weights", "peak memory", "seconds", title="Loading, MB")
    for row in result["loading"]:
        how = "at the budget" if row["how"] == "budget" else "whole, then extract"
        cells = (row[key] for key in ("fetched_bytes", "read_bytes", "parameter_bytes", "peak_bytes"))
        sizes = ("?" if cell is None else f"{cell / 1e6:,.1f}" for cell in cells)
        table.add_row(row["budget"], how, *sizes, f"{row['seconds']:.2f}")
    yield table
    title = "Time / time of the stock model of that size (quartiles)"
    table = Table("budget", "task", "batch", "milliseconds", "control", *OURS, title=title)
    for row in result["cost"]:
        ratios = (
            f"{row[name]['ratio']:.3f} ({row[name]['ratio_25']:.2f} to {row[name]['ratio_75']:.2f})"
            for name in ("control", *OURS)
        )
        reference = f"{row[row['reference']]['milliseconds']:.2f}"
        note = "" if row["reference"] == "native" else " (no stock class: loaded)"
        table.add_row(row["budget"], row["what"], str(row["batch"]), reference + note, *ratios)
    yield table
    tasks = list(dict.fromkeys((row["what"], row["batch"]) for row in result["speed"]))
    table = Table("budget", *(f"{what}, batch {batch}" for what, batch in tasks), title="Tokens per second, one family")
    for name in dict.fromkeys(row["budget"] for row in result["speed"]):
        table.add_row(name, *(f"{row['tokens_per_second']:,.0f}" for row in result["speed"] if row["budget"] == name))
    yield table


def warnings(result: dict[str, Any]) -> Iterator[str]:
    """Sentences about what `bench` found that nobody would expect, or should not believe."""
    for row in result["slower"]:
        where = f"{row['what']}, batch {row['batch']}"
        yield f"{row['budget']} is slower than {row['than']} ({where}): {row['ratio']:.2f} times its time."
    for row in result["cost"]:
        if abs(row["control"]["ratio"] - 1) > 0.02:
            where = f"{row['budget']}, {row['what']}, batch {row['batch']}"
            yield f"{where}: the same against the same is {row['control']['ratio']:.2f}; distrust its other ratios."
