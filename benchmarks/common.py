"""What every benchmark shares: timing and the machine (from the package), text, peak memory, and where results go."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from flextron_trainer.data import load_text, pack
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.files import write_json
from flextron_trainer.measuring.bench import against, interleaved, machine

__all__ = [
    "add_run_options", "against", "interleaved", "machine", "peak_bytes", "run_settings", "save", "stdlib_blocks",
    "text_blocks", "write_json",
]  # fmt: skip

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def stdlib_blocks(
    length: int, documents: int | None = None, vocab_size: int = 1024
) -> tuple[Dataset, Dataset, Dataset, PreTrainedTokenizerFast]:
    """The sources of Python's standard library as blocks of tokens, and their tokenizer.

    Args:
        length: Tokens in a block.
        documents: How many files to train on; None for all that are not held out.
        vocab_size: Of the tokenizer.

    Returns:
        Blocks to train on, held-out ones for tables, others of other files for choices; tokenizer.
    """
    files = load_text("stdlib").shuffle(seed=0)
    few = len(files) // 20
    tokenizer = train_tokenizer(files.select(range(few, few + 400))["text"], vocab_size)
    stop = len(files) - few if documents is None else few + documents
    parts = (range(few, stop), range(few), range(stop, stop + few))
    train, held_out, choosing = (pack(files.select(part), tokenizer, length) for part in parts)
    return train, held_out.shuffle(seed=0), choosing.shuffle(seed=0), tokenizer


def text_blocks(path: Path, tokenizer: Any, length: int, seed: int = 0) -> torch.Tensor:
    """A text file as blocks of tokens `[N, length]`, in a random order."""
    ids = torch.tensor(tokenizer(path.read_text(errors="ignore"), verbose=False).input_ids)
    found = ids[: len(ids) // length * length].view(-1, length)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of a script that converts a parent and trains what comes of it."""
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.75, 0.5, 0.25])
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--test-blocks", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")


def run_settings(folder: str, steps: int, rate: float, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Training arguments of a short run on a CPU, of which nothing is saved on the way."""
    return {
        "output_dir": folder, "max_steps": steps, "learning_rate": rate, "warmup_steps": max(1, steps // 20),
        "per_device_train_batch_size": batch_size, "lr_scheduler_type": "cosine", "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000, "seed": seed,
    }  # fmt: skip


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


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result file; call it again as more is measured, so that a stop loses nothing."""
    path = folder / f"{name}.json"
    write_json(path, result)
    return path
