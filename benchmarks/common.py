"""What every benchmark shares: interleaved timing, the machine it ran on, and where results go."""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def machine(device: str) -> dict[str, object]:
    """Hardware and versions, for the result file."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: str, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, the variants of a round in random order.

    On a CPU it is process time, which other programs on the machine disturb least; on a GPU wall time around a
    synchronisation.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffle = random.Random(seed)
    for round_number in range(rounds + 2):  # the first two warm up
        order = list(variants)
        shuffle.shuffle(order)
        for name in order:
            gc.collect()
            gc.disable()
            start = clock()
            variants[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed = clock() - start
            gc.enable()
            if round_number >= 2:
                seconds[name].append(elapsed)
    return seconds


def against(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Per variant: the ratio to the reference in the same round (median and quartiles), and the median time."""
    result = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "ratio": round(middle, 4),
            "ratio_25": round(low, 4),
            "ratio_75": round(high, 4),
            "milliseconds": round(1e3 * statistics.median(times), 3),
        }
    return result


def save(name: str, result: dict[str, object]) -> Path:
    """Write a result file; call it again as more is measured, so that a stop loses nothing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
    return path
