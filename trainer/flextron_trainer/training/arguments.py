"""`FlextronTrainingArguments`: the ordinary `TrainingArguments` and what elastic training adds to them."""

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from modeling_flextron.errors import invalid, is_number, require_int

from ..blockwise import INPUTS, PARAMETERS
from ..losses import CHUNK_SIZE
from .sampling import SAMPLERS

logger = logging.get_logger(__name__)
STAGES = ("elastic", "blocks", "router", "joint")
# What some stages alone read; arguments that begin with router_ are as the first of these.
STAGES_OF = {"latency_weight": ("router", "joint"), "block_parameters": ("blocks",), "block_inputs": ("blocks",)}
METHODS = ("surrogate", "gumbel", "token")
COSTS = ("parameters", "latency")
# What the base class offers and elastic training cannot honour, where it is set: why, and what to do instead.
REFUSED = {
    "label_smoothing_factor": ("The losses of elastic training have no label smoothing.", "Leave it at 0."),
    "use_liger_kernel": ("Its kernels take the place of layers of stock models, not of ours.", "Leave it out."),
    "auto_find_batch_size": (
        "A run that begins anew after an error would go on from the weights and routers that the failed one left.",
        "Ask `trainer.plan()` or `flextron train --plan` what fits, and pass `per_device_train_batch_size`.",
    ),
    "deepspeed": (
        "Its engine steps after every backward pass, of which a step has one for each sub-network.",
        "Shard with FSDP2 instead.",
    ),
    "ddp_static_graph": ("Every step trains other sub-networks, and so other parameters.", "Leave it out."),
    "bf16_full_eval": ("It rounds the weights that are trained, for good.", "Pass bf16=True: it evaluates so, too."),
    "fp16_full_eval": ("It rounds the weights that are trained, for good.", "Pass fp16=True: it evaluates so, too."),
}
# Matters of a machine or an account, not of what was trained.
OF_THE_MACHINE = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "use_cpu", "resume_from_checkpoint",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
}  # fmt: skip


@dataclass
class FlextronTrainingArguments(TrainingArguments):
    """Arguments of a `FlextronTrainer`.

    The learning rate, its schedule and `include_num_input_tokens_seen` have defaults of their own. Weight decay stays
    0, as in `TrainingArguments`: the weights outside the sub-network of a step get no gradient and must not decay
    either.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Count the tokens of all processes in logs and state: 'non_padding', 'all' or 'no'."},
    )
    stage: str = field(
        default="elastic",
        metadata={
            "help": "What is trained: 'elastic': the weights, at many sizes; 'blocks': the same layer by layer, each to"
            " what that of the full network writes, as a start; 'router': what picks sizes for a budget, with frozen"
            " weights; 'joint': both."
        },
    )
    sampler: str = field(
        default="sandwich",
        metadata={
            "help": "Sub-networks of a step: 'sandwich' (largest, smallest, random rows between), 'uniform' or"
            " 'weighted' rows of the frontier, 'random' (sizes drawn for every layer)."
        },
    )
    subnetworks_per_step: int = field(default=3, metadata={"help": "Sub-networks trained on every batch."})
    sampling_weights: list[float] | None = field(
        default=None, metadata={"help": "For 'weighted': one weight for each row of the frontier, largest first."}
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the KL divergence to the teacher."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross entropy, added to distillation (alone it is 1)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the distillation."})
    float32_weights: bool = field(
        default=True,
        metadata={
            "help": "Keep what is trained in float32 while it is trained, also under bf16: bfloat16 rounds small steps"
            " away. Without, the weights stay as they were loaded."
        },
    )
    loss_chunk_size: int = field(default=CHUNK_SIZE, metadata={"help": "Tokens whose logits exist at the same time."})
    block_parameters: str = field(
        default="all",
        metadata={
            "help": "Of stage 'blocks': 'all', or 'corrections': what rows own beside the shared weights, so that the"
            " full network stays exactly as it is."
        },
    )
    block_inputs: str | None = field(
        default=None,
        metadata={
            "help": "What a layer of a row reads in stage 'blocks': 'own', what the row's layers before wrote, or"
            " 'parent'. Default: 'own' where all is trained, 'parent' where corrections are."
        },
    )
    router_method: str = field(
        default="surrogate",
        metadata={
            "help": "How routers learn: 'surrogate' (from the losses of real slices, through a small network that"
            " predicts them) or 'gumbel' (through the model, with noise): one size for a budget in each layer;"
            " 'token': sizes for every token."
        },
    )
    router_budgets: list[float] | None = field(
        default=None,
        metadata={"help": "Fractions of the full cost that get a row each; default: those of the frontier."},
    )
    router_cost: str = field(
        default="parameters",
        metadata={
            "help": "What budgets limit: 'parameters' outside of embeddings, or 'latency' by the measured table."
        },
    )
    router_uniform: bool = field(
        default=False, metadata={"help": "Give all layers the same sizes, as stock classes do."}
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of routers; default: 0.1, and 0.01 of token routers."}
    )
    latency_weight: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the weight of |cost - budget|, fractions of the full cost, beside the loss: 6 standard"
            " deviations of the losses of sub-networks with 'surrogate', 0.5 nats with the others."
        },
    )

    def __post_init__(self):
        self._changed = dict(self._given())
        derived: dict[str, Any] = {
            "block_inputs": "own" if self.block_parameters == "all" else "parent",
            "router_learning_rate": 0.01 if self.router_method == "token" else 0.1,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, allowed in (
            ("stage", STAGES), ("sampler", SAMPLERS), ("router_method", METHODS), ("router_cost", COSTS),
            ("block_parameters", PARAMETERS), ("block_inputs", INPUTS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise invalid(name, getattr(self, name), f"It is one of {', '.join(allowed)}.", "Pick one of them.")
        require_int("subnetworks_per_step", self.subnetworks_per_step, minimum=2 if self.sampler == "sandwich" else 1)
        require_int("loss_chunk_size", self.loss_chunk_size)
        for name in ("kd_weight", "ce_weight", "router_learning_rate", "latency_weight"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise invalid(name, getattr(self, name), "It must be a number of at least 0.", "Pass a float.")
        if self.kd_weight == 0 and self.ce_weight == 0:
            rule = "With `kd_weight` 0 as well nothing would be learned."
            raise invalid("ce_weight", self.ce_weight, rule, "Give one of them a positive weight.")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise invalid("temperature", self.temperature, "It must be a positive number.", "Pass for instance 1.0.")
        if self.sampling_weights is not None and self.sampler != "weighted":
            rule = f"The sampler {self.sampler!r} does not use them."
            raise invalid("sampling_weights", self.sampling_weights, rule, "Pass sampler='weighted' as well.")
        if self.stage == "joint" and self.router_method == "surrogate":
            rule = "The surrogate learns from frozen weights, which stage 'joint' trains."
            raise invalid("router_method", "surrogate", rule, "Pass 'gumbel' or 'token', or stage='router'.")
        if self.router_method == "token" and (self.router_uniform or self.router_cost != "parameters"):
            name = "router_uniform" if self.router_uniform else "router_cost"
            rule = "Tokens choose in every layer on their own, and what they cost on average is counted in parameters."
            raise invalid(name, getattr(self, name), rule, "Leave it out, or pass another router_method.")
        if self.router_budgets is not None:
            budgets = self.router_budgets
            if not isinstance(budgets, (list, tuple)) or not budgets or not all(map(_fraction, budgets)):
                rule = "They are fractions of the full cost, larger than 0 and at most 1, each of them once."
                raise invalid("router_budgets", budgets, rule, "Pass for instance [0.75, 0.5].")
            if len(set(budgets)) != len(budgets):
                raise invalid("router_budgets", budgets, "Each of them gets one row.", "Drop the repeated ones.")
        self._refuse_what_cannot_be_honoured()
        self._refuse_what_other_stages_read(derived)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # those of layers that no size of a step has
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # which the base class would want to be told, though there is no other choice
        super().__post_init__()
        # Reentrant checkpoints forget every gradient but those of a layer's inputs, such as that of what tokens cost.
        given = self.activation_checkpointing_kwargs or {}
        if given.get("use_reentrant"):
            rule = "Reentrant checkpoints lose the gradients of routers."
            raise invalid("activation_checkpointing_kwargs", given, rule, "Leave out `use_reentrant`.")
        if self.activation_checkpointing:
            self.activation_checkpointing_kwargs = {**given, "use_reentrant": False}

    def _refuse_what_cannot_be_honoured(self) -> None:
        """Refuse what would be ignored, or would train something else, in silence."""
        for name, (rule, remedy) in REFUSED.items():
            if getattr(self, name):
                raise invalid(name, getattr(self, name), rule, remedy)
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer.endswith(("lomo", "_layerwise")):
            rule = "It changes weights inside of a backward pass, of which a step has one for each sub-network."
            raise invalid("optim", optimizer, rule, "Pass another one, such as 'adamw_torch'.")
        if self.label_names not in (None, ["labels"]):
            raise invalid("label_names", self.label_names, "The model takes its targets as `labels`.", "Rename them.")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise invalid("ACCELERATE_USE_DEEPSPEED", "true", *REFUSED["deepspeed"])

    def _refuse_what_other_stages_read(self, derived: dict[str, Any]) -> None:
        """Refuse what was given and would not be read in this stage; `derived` values are those of arguments copied."""
        for name, value in self._changed.items():
            stages = STAGES_OF.get("latency_weight" if name.startswith("router_") else name, STAGES)
            if self.stage not in stages and value != derived.get(name):
                rule = f"Stage {self.stage!r} does not read it."
                raise invalid(name, value, rule, f"Pass stage={stages[0]!r} as well, or leave it out.")

    @property
    def n_gpu(self) -> int:
        """At most 1: `DataParallel` cannot wrap these models."""
        if (found := super().n_gpu) > 1:
            logger.warning_once("Only one GPU of a process is used: launch one process for each with accelerate.")
        return min(1, found)

    def changed(self) -> dict[str, Any]:
        """The arguments that were given and differ from their defaults, without paths, tokens, logging and the like."""
        return dict(self._changed)

    def _given(self) -> Iterator[tuple[str, Any]]:
        # Before `TrainingArguments` fills in the rest, and without building a second one: that resets accelerate.
        for entry in fields(self):
            value, factory = getattr(self, entry.name), entry.default_factory
            default = entry.default if factory is MISSING else factory()
            if entry.name not in OF_THE_MACHINE and isinstance(value, (str, int, float, list)) and value != default:
                yield entry.name, getattr(value, "value", value)  # of an enumeration


def _fraction(value: object) -> bool:
    return is_number(value) and 0 < value <= 1  # type: ignore[operator]


class ArgumentParser(HfArgumentParser):
    """Refuses arguments in one sentence, where the base class prints all that there are and ends the process."""

    def error(self, message: str) -> Any:
        """Called with what is wrong.

        Raises:
            ValueError: always.
        """
        rule = "They are those of `FlextronTrainingArguments`."
        raise invalid("arguments", message, rule, "`flextron train --help` says where they are described.")
