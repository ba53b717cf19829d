"""Memory and time of a conversion: estimated before it starts from the config alone, and measured around it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeling_flextron import FlextronConfig, count_parameters, flops_per_token
from modeling_flextron.subnetwork import bytes_per_value

from ..measuring.memory import forget_peak, process_bytes
from .moments import MOMENT_TOKENS
from .orders import RANKINGS
from .rows import LOSS_CHUNK, ROW_SAMPLES, TRIED
from .sensitivity import SENSITIVITY_TOKENS

GIB = 2**30
STATES = 3  # of all tokens that are walked with: before a layer, between its halves, behind it
SQUARES = 3  # [K, K] in float64 while corrections are fitted, or losses predicted


@dataclass(frozen=True)
class ConversionPlan:
    """An estimate; the calibration may have fewer samples than it was allowed, and rows fewer rivals.

    Args:
        weights: Bytes of the weights in the dtype of the result, which exist once; none of them when they lie in files.
        disk: Bytes of files: of the weights, when they lie there, and of second moments, when they are kept.
        passes: Bytes of the largest forward pass, or of the largest tensor, of which permuting makes a copy.
        forward_tokens: Step -> tokens that its forward passes read, at most.
        seconds: Of the forward passes at the speed of matrix products on the device, at most.
    """

    weights: int
    passes: int
    disk: int
    forward_tokens: dict[str, int]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The numbers, memory in GiB."""
        parts = asdict(self)
        gib = {name: round(parts.pop(name) / GIB, 3) for name in ("weights", "passes", "disk")}
        return {"peak_gib": round((self.weights + self.passes) / GIB, 3), **gib, **parts}

    def __str__(self) -> str:
        tokens = ", ".join(f"{step} {count:,}" for step, count in self.forward_tokens.items() if count) or "none"
        return (
            f"Expected peak memory {(self.weights + self.passes) / GIB:.2f} GiB beside Python and its libraries"
            f" (weights {self.weights / GIB:.2f}, passes {self.passes / GIB:.2f}), {self.disk / GIB:.2f} GiB of files"
            f" beside the result. Forward tokens, at most: {tokens}."
            f" Rough estimate of the time that they take: {self.seconds / 60:.1f} minutes, from the speed of one matrix"
            " product just now; the algebra of orders and corrections, and reading and writing files, come on top."
        )


def plan_conversion(
    config: FlextronConfig,
    *,
    dtype: torch.dtype | str | None,
    device: str,
    calibrated: bool,
    budgets: int,
    max_samples: int,
    sequence_length: int,
    batch_size: int,
    search_evaluations: int,
    order: str,
    corrections: float,
    uniform: bool = True,
    offloaded: bool = False,
    keeps_moments: bool = False,
    block_steps: int = 0,
) -> ConversionPlan:
    """Estimate what `convert` will take.

    Args:
        config: Of the elastic model that it will make.
        dtype: Of the result; None for that of the config.
        device: Where it runs.
        calibrated: Whether there is text; without, no pass is made.
        budgets: Number of rows.
        max_samples, sequence_length, batch_size, search_evaluations, order, corrections, block_steps, uniform: As in
            `convert`.
        offloaded, keeps_moments: Whether weights lie in files, and whether second moments are kept.
    """
    built, size = config.built, bytes_per_value(dtype or config.dtype)
    length = min(sequence_length, config.max_position_embeddings)
    drops, anchors = config.num_hidden_layers - config.choices("depth")[-1], len(config.anchors())
    candidates = sum(config.num_hidden_layers - anchors - i for i in range(drops))
    ranked = max(1, -(-max_samples // batch_size) // 16) * batch_size * length
    few = min(ROW_SAMPLES, max_samples) * length
    names = RANKINGS if order == "auto" else [order]
    moments, held_out = min(max_samples * length, MOMENT_TOKENS), -(-max_samples // 8) * length
    ordered = any(name in RANKINGS[1:] for name in names)
    walks = 1 + any(len(config.choices(axis)) > 1 for axis in ("hidden", "depth"))
    tokens = {
        "importance": max_samples * length,
        "orders": ordered * moments + (len(names) * budgets * held_out if order == "auto" else 0),
        "layer ranking": ranked * (1 + drops + candidates // 2) if drops else 0,
        "rows": budgets * TRIED * few * uniform,
        "search": budgets * search_evaluations * few,
        # A pass forward and one backward, which costs two.
        "sensitivity": 3 * min(moments, SENSITIVITY_TOKENS) if corrections or not uniform else 0,
        "sizes of layers": 0 if uniform else moments,
        # One way to fit serves all rows that keep layers and channels; the other runs the parent and the row.
        "corrections": moments + budgets * (2 * walks * moments + 3 * held_out) if corrections else 0,
        "blocks": 3 * budgets * block_steps * batch_size * length,
    }
    batch = min(batch_size, max_samples) * length
    largest = size * max(config.vocab_size, config.intermediate_size) * config.hidden_size
    layer = batch * (size * (4 * config.hidden_size + 3 * config.intermediate_size) + 2 * 4 * config.intermediate_size)
    logits = 3 * 4 * config.vocab_size * min(LOSS_CHUNK, batch)
    algebra, read = 0, (config.intermediate_size, built.heads[0] * config.head_dim)
    states = STATES * size * moments * config.hidden_size
    if ordered:  # the moments, their inverse, and the matrix
        algebra = (4 + 8) * max(read) ** 2 + 8 * max(read) * config.hidden_size
    if corrections or not uniform:
        algebra = max(algebra, SQUARES * 8 * max(read) ** 2)
    kept = 4 * config.num_hidden_layers * sum(size**2 for size in read) if ordered and keeps_moments else 0
    if not calibrated:
        tokens, layer, logits, algebra, states, kept = dict.fromkeys(tokens, 0), 0, 0, 0, 0, 0
    seconds = 0.0
    if calibrated:
        work = flops_per_token(config, built, length // 2) * sum(tokens.values())
        seconds = work / product_speed(dtype if isinstance(dtype, torch.dtype) else torch.float32, device)
    weights = size * count_parameters(config, built)
    return ConversionPlan(
        weights=0 if offloaded else weights,
        passes=max(largest, states + max(layer, logits, algebra)),
        disk=kept + (weights if offloaded else 0),
        forward_tokens=tokens,
        seconds=round(seconds, 1),
    )


def product_speed(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a matrix product of 1024 rows, the best of three."""
    left, right = (torch.ones(1024, 1024, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)[0, 0].item()  # as layers do it; `item` waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds[1:])  # the first one warms up


@contextmanager
def measured(device: str) -> Iterator[dict[str, float | None]]:
    """Measure a block: `seconds`, and `peak_gib`, by how much memory on the device grew; None where it is not told."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    before, start, found = process_bytes("status", "VmRSS"), time.perf_counter(), dict[str, float | None]()
    yield found
    peak = process_bytes("status", "VmHWM")
    grown = None if peak is None or before is None else peak - before
    grown = torch.cuda.max_memory_allocated(device) if on_gpu else grown
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["peak_gib"] = None if grown is None else round(grown / GIB, 3)
