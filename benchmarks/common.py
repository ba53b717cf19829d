"""What every benchmark shares: timing and the machine (from the package), peak memory, and where results go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flextron_trainer.bench import against, interleaved, machine

__all__ = ["against", "interleaved", "machine", "peak_bytes", "save"]

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def peak_bytes(run: Callable[[], object], device: str, *models: torch.nn.Module) -> int:
    """Bytes of all tensors at the worst moment of `run()`, of which those of `models` are there before.

    On a CPU from the profiler's memory events, on a GPU from the allocator.
    """
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    current = highest = sum(t.numel() * t.element_size() for t in tensors.values())
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return current + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result file; call it again as more is measured, so that a stop loses nothing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
    return path
