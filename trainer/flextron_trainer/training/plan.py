"""Plans the memory of a training run on each device, by arithmetic alone: `flextron train --plan`.

Elastic training runs one sub-network after the other, the largest first, so the peak is the larger of two moments:
the end of the forward pass of the largest network, when there are no gradients yet (with gradient accumulation there
are, from the batch before), and that of the next one, when there are. The terms were checked against measured peaks
(`benchmarks/bench_memory.py`). An evaluation needs less, unless its batches are larger or metrics want all logits.
Not counted: the CUDA context (about 0.5 GiB), fragmentation, and what an optimizer other than Adam keeps.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeling_flextron import FlextronConfig, FlextronForCausalLM, SubNetwork
from modeling_flextron.corrections import parameters_beside
from modeling_flextron.frontier import held
from modeling_flextron.level_reader import empty_model
from modeling_flextron.subnetwork import bytes_per_value, count_parameters, flops_per_token, smallest_subnetwork

from ..blockwise import learning_parameters
from .arguments import FlextronTrainingArguments
from .sampling import draw

GIB = 2**30
LOGIT_ARRAYS = 4  # [chunk, vocabulary] in float32 at the same time: probabilities of both, slope, a product


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device; in stage `blocks` parameters, gradients and optimizer are those of one layer.

    Args:
        parameters: Weights, with their copies in bfloat16 under autocast.
        gradients: Of all weights, with the buckets of DDP.
        optimizer: Two moments of Adam in the dtype of the weights.
        activations: What the forward pass of the largest network keeps for its backward pass.
        teacher: Weights of the teacher and its hidden states; 0 for `"self"`, whose states count as activations.
        logits: Chunks of logits, and the gradient of the output layer, which exists before the backward pass.
        evaluation: What an evaluation needs beside weights, optimizer and teacher.
        overlap: What of the sum of all others is never there at the same time as the rest.
        available: What the device has; None when that is not known.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int
    logits: int
    evaluation: int
    overlap: int
    available: int | None

    @property
    def total(self) -> int:
        """The expected peak."""
        held = self.parameters + self.optimizer + self.teacher
        training = held + self.gradients + self.activations + self.logits - self.overlap
        return max(training, held + self.evaluation)

    def gib(self) -> dict[str, float | None]:
        """Every part and the total in GiB."""
        parts = {**asdict(self), "total": self.total}
        return {name: None if value is None else round(value / GIB, 3) for name, value in parts.items()}

    def __str__(self) -> str:
        names = ("parameters", "gradients", "optimizer", "activations", "teacher", "logits")
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names)
        text = f"Expected peak memory {self.total / GIB:.2f} GiB on each device ({parts}; {self.overlap / GIB:.2f}"
        text += f" of that never at the same time; evaluation {self.evaluation / GIB:.2f} beside the weights)"
        if self.available is None:
            return text + "."
        if self.total <= self.available:
            return f"{text}; the device has {self.available / GIB:.2f} GiB."
        return (
            f"{text}; the device has only {self.available / GIB:.2f} GiB. What helps, in this order: a smaller"
            " --per_device_train_batch_size with more --gradient_accumulation_steps (or --per_device_eval_batch_size),"
            " --activation_checkpointing, teacher='self', FSDP over several devices."
        )


def plan_memory(
    config: FlextronConfig,
    args: FlextronTrainingArguments,
    sequence_length: int,
    *,
    dtype: torch.dtype | str | None = None,
    teacher: Any = None,
    teacher_bytes: int = 0,
    adapter_bytes: int = 0,
    sharded: bool = False,
    metrics: bool = False,
) -> MemoryPlan:
    """The memory of a training run.

    Args:
        sequence_length: Tokens in a row.
        dtype: Of the weights before training; None for that of the config.
        teacher: The config of a separate teacher; None without one.
        teacher_bytes: Bytes of its weights on the training device; in stage `blocks` of the model itself, where it is
            in memory.
        adapter_bytes: Of adapters, which are trained alone; 0 where the weights are trained.
        sharded: Whether FSDP divides weights, gradients and optimizer among the processes.
        metrics: Whether evaluations compute all logits; what they keep of those until the end is not counted.
    """
    if args.stage == "blocks":
        return _plan_blocks(config, args, sequence_length, teacher_bytes)
    learns = args.stage != "router" and not adapter_bytes  # routers are small
    size, built = 4 if learns and args.float32_weights else bytes_per_value(dtype or config.dtype), config.built
    tokens = args.per_device_train_batch_size * sequence_length
    half = args.bf16 or args.fp16
    count = count_parameters(config, built) + parameters_beside(config, config.owners(), built)
    head = config.vocab_size * built.hidden
    share = args.world_size if sharded else 1
    wide = args.stage != "router" or args.router_method != "surrogate"  # else one layer's activations at a time
    weights = size * count + adapter_bytes
    gradients = weights if learns else adapter_bytes
    buckets = gradients if args.world_size > 1 and not sharded else 0
    copies = 2 * count if half and size == 4 and learns else 0  # of what learns autocast keeps the copies that it made
    first = _activations(config, built, tokens, size, half, args.activation_checkpointing, wide)
    logits = LOGIT_ARRAYS * 4 * min(args.loss_chunk_size, tokens) * config.vocab_size
    logits += 4 * head if learns else 0
    logits += size * tokens * built.hidden if wide else 0
    states = 0
    if teacher is not None:
        states = (2 if half else size) * tokens * teacher.hidden_size
        logits += 2 * config.vocab_size * teacher.hidden_size if half and size == 4 else 0
    overlap = 0
    if learns and args.gradient_accumulation_steps == 1:
        following = _activations(config, _second(config, args), tokens, size, half, args.activation_checkpointing, wide)
        overlap = min(gradients // share, first - following)
    return MemoryPlan(
        parameters=weights // share + copies,
        gradients=gradients // share + buckets,
        optimizer=2 * gradients // share,
        activations=first,
        teacher=teacher_bytes + states,
        logits=logits,
        evaluation=_evaluation(config, args, args.eval_batch_size * sequence_length, size, half, metrics),
        overlap=max(0, overlap),
        available=_available(args.device),
    )


def plan_operations(config: FlextronConfig, args: FlextronTrainingArguments, length: int, teacher: bool) -> float:
    """Floating-point operations of the matrix products of an optimizer step of stage `elastic`, in all processes.

    Three forward passes for every sub-network of the step, as a backward pass costs two, and one for the teacher.
    Recomputed activations come on top.

    Args:
        length: Tokens in a row.
        teacher: Whether the parent runs beside the model.
    """
    draws = [
        draw(config, args.sampler, args.subnetworks_per_step, seed=args.seed, step=i, weights=args.sampling_weights)
        for i in range(64)  # steps that differ by chance
    ]
    trained = sum(flops_per_token(config, each.subnetwork, length // 2) for step in draws for each in step) / len(draws)
    tokens = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length
    return tokens * (3 * trained + teacher * flops_per_token(config, config.built, length // 2))


def plan_run(
    model: Any, teacher: Any, args: FlextronTrainingArguments, sequence_length: int, sharded: bool, metrics: bool
) -> MemoryPlan:
    """`plan_memory` of a model, perhaps with adapters, and a teacher that are there already; None without a teacher."""
    own, adapters = 0, 0
    if teacher is not None and teacher.device.type == args.device.type:
        own = teacher.get_memory_footprint()
    if args.stage == "blocks":
        own = model.get_memory_footprint(return_buffers=False)  # of which one layer at a time learns
    if hasattr(model, "peft_config"):
        adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return plan_memory(
        model.config,
        args,
        sequence_length,
        dtype=model.dtype,
        teacher=None if teacher is None else teacher.config,
        teacher_bytes=own,
        adapter_bytes=adapters,
        sharded=sharded,
        metrics=metrics,
    )


def _plan_blocks(config: FlextronConfig, args: FlextronTrainingArguments, length: int, model_bytes: int) -> MemoryPlan:
    """The memory of one layer that learns. States of all tokens are on the host: in a file, or less than a limit."""
    model = empty_model(FlextronForCausalLM, config)
    layers = [list(layer.parameters()) for layer in model.model.layers]
    learning = [learning_parameters(layer, args.block_parameters) for layer in model.model.layers]
    largest, learns = (max(sum(p.numel() for p in each) for each in many) for many in (layers, learning))
    tokens, built = args.per_device_train_batch_size * length, config.built
    slices = max(p.numel() for p in layers[0])  # the gradient of a slice is padded with zeros
    states = 4 * 4 * tokens * built.hidden + 4 * built.hidden**2  # what is read, written and aimed at; the metric
    trained = 4 * (largest + 3 * learns)
    outside = bytes_per_value(config.dtype) * config.vocab_size * built.hidden
    return MemoryPlan(
        parameters=4 * largest,
        gradients=4 * learns,
        optimizer=8 * learns,
        activations=_activations(config, built, tokens, 4, args.bf16, False, False) + 4 * slices + states,
        teacher=model_bytes,
        logits=0,
        evaluation=0 if model_bytes else max(0, 2 * outside - trained),  # embeddings, as they are written at the end
        overlap=0,
        available=_available(args.device),
    )


def _evaluation(
    config: FlextronConfig, args: FlextronTrainingArguments, tokens: int, size: int, half: bool, metrics: bool
) -> int:
    """Bytes that a pass without gradients needs, beside the weights."""
    layer = _activations(config, config.built, tokens, size, half, False, False)
    logits = 2 * 4 * config.vocab_size * (tokens if metrics else min(args.loss_chunk_size, tokens))  # and their softmax
    return tokens * size * config.built.hidden + max(layer, logits)


def _second(config: FlextronConfig, args: FlextronTrainingArguments) -> SubNetwork:
    """The largest network that may run while there are gradients, without accumulation."""
    rows = list(held(config.frontier).values())
    if args.stage == "elastic" and args.sampler == "sandwich" and len(rows) > 1:
        if args.subnetworks_per_step == 2:
            return rows[-1]
        return rows[1] if len(rows) > 2 else config.built  # random sizes
    return config.built if args.subnetworks_per_step > 1 else smallest_subnetwork(config)


def _activations(
    config: FlextronConfig, subnetwork: SubNetwork, tokens: int, size: int, half: bool, checkpointed: bool, wide: bool
) -> int:
    """Bytes that the forward pass of a sub-network keeps for its backward pass."""
    product = 2 if half else size  # what matrix products read and write
    hidden, width = subnetwork.hidden, config.head_dim
    layers = []
    for mlp, heads in zip(subnetwork.mlp, subnetwork.heads, strict=True):
        query, kv = heads * width, config.kv_heads(heads) * width
        attention = 3 * query + 2 * kv  # q, k, v, and the output before and after its heads are brought together
        neurons = (4 if config.gated_mlp else 2) * mlp
        # A norm keeps its input in float32, the normalised one, and its result, of which autocast makes a copy.
        norms = 2 * hidden * (4 + 2 * size + (2 if half and size == 4 else 0))
        layers.append(tokens * (product * (attention + neurons) + norms))
    if not wide:
        return max(layers)
    if checkpointed:
        return tokens * size * hidden * len(layers) + max(layers)
    return sum(layers)


def _available(device: torch.device) -> int | None:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
