"""What every benchmark shares: timing and the machine (from the package), text, peak memory, and where results go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from flextron_trainer.data import load_text, pack
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.measuring.bench import against, interleaved, machine
from modeling_flextron.checkpoint import write_file_beside

__all__ = ["against", "interleaved", "machine", "peak_bytes", "save", "stdlib_blocks", "text_blocks", "write_json"]

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def stdlib_blocks(
    length: int, documents: int | None = None, vocab_size: int = 1024
) -> tuple[Dataset, Dataset, PreTrainedTokenizerFast]:
    """The sources of Python's standard library as blocks of tokens: to train on, held out; and their tokenizer.

    Args:
        length: Tokens in a block.
        documents: How many files to train on; None for all that are not held out.
        vocab_size: Of the tokenizer.
    """
    files = load_text("stdlib").shuffle(seed=0)
    few = len(files) // 20
    tokenizer = train_tokenizer(files.select(range(few, few + 400))["text"], vocab_size)
    stop = len(files) if documents is None else few + documents
    held_out = pack(files.select(range(few)), tokenizer, length).shuffle(seed=0)
    return pack(files.select(range(few, stop)), tokenizer, length), held_out, tokenizer


def text_blocks(path: Path, tokenizer: Any, length: int, seed: int = 0) -> torch.Tensor:
    """A text file as blocks of tokens `[N, length]`, in a random order."""
    ids = torch.tensor(tokenizer(path.read_text(errors="ignore"), verbose=False).input_ids)
    found = ids[: len(ids) // length * length].view(-1, length)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


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
    return write_json(RESULTS / f"{name}.json", result)


def write_json(path: Path, value: Any) -> Path:
    """Write a file at once, so that a stop leaves the one before."""
    with write_file_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")
    return path
