"""Checks of what a `FlextronTrainer` is given, before anything is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from modeling_flextron import FlextronConfig
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.switching import runs_divided

from .arguments import FlextronTrainingArguments
from .sampling import check_weights

logger = logging.get_logger(__name__)
# Arguments of the base class that elastic training cannot honour: why, and what to do instead.
REFUSED_KEYWORDS = {
    "model_init": (
        "An elastic model is not drawn anew: it comes from a trained one, and training goes on from what it is.",
        "Pass the model, and build a trainer with a model of its own for every trial.",
    ),
    "compute_loss_func": (
        "The sub-networks learn from losses on hidden states, chunk by chunk, and never make all logits.",
        "Set `kd_weight`, `ce_weight` and `temperature`, or train one size with the plain Trainer.",
    ),
}


def check_arguments(args: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments of another class, and those of `Trainer` that elastic training cannot honour.

    Args:
        given: The other keywords of the trainer.

    Raises:
        ValueError: either of them.
    """
    for name, (rule, remedy) in REFUSED_KEYWORDS.items():
        if given.get(name) is not None:
            raise invalid(name, given[name], rule, remedy)
    if not isinstance(args, FlextronTrainingArguments):
        remedy = "Build a FlextronTrainingArguments; it takes every argument of TrainingArguments."
        raise invalid("args", type(args).__name__, "They carry the arguments of elastic training.", remedy)


def check_model(model: Any, args: FlextronTrainingArguments) -> None:
    """Refuse a model that cannot be trained at many sizes, or not in this stage, or not with these weights of rows.

    Raises:
        ValueError: it cannot.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "flextron":
        remedy = "Make it elastic first: `convert(model, calibration=...)`."
        raise invalid("model", type(model).__name__, "The trainer trains Flextron models.", remedy)
    if hasattr(model, "peft_config") and args.stage != "elastic":
        remedy = "Train the adapters with stage='elastic', or merge them first."
        raise invalid("stage", args.stage, "Routers and single layers learn on weights without adapters.", remedy)
    if runs_divided(model):
        remedy = (
            "Divide it with FSDP, as by `DistributedConfig(fsdp_size=...)`, or train each size as a `Trainer` does."
        )
        raise invalid("model", "tensor-parallel", "Each step trains sizes that such a plan cannot switch to.", remedy)
    if args.sampler == "weighted":
        check_weights(config, args.sampling_weights)


def check_output_layer(model: Any) -> None:
    """Refuse a model without an output layer over tokens.

    Raises:
        ValueError: it has none.
    """
    if model.get_output_embeddings() is None:
        rule = "The losses of elastic training are those of a language model."
        raise invalid("model", type(model).__name__, rule, "Train it at one budget with the plain Trainer.")


def check_saved_whole(model: Any, plugin: Any) -> None:
    """Refuse to push a sharded model whose whole weights `save_model` does not write.

    Args:
        plugin: The FSDP plugin of accelerate; None where transformers has divided the weights.

    Raises:
        ValueError: it has adapters, or the plugin writes parts.
    """
    if hasattr(model, "peft_config"):
        rule = "The weights under it are divided among processes."
        raise invalid("model", type(model).__name__, rule, "`save_model()`, and push that folder.")
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        rule = "`save_model` writes no whole weights then."
        raise invalid("fsdp_state_dict_type", str(plugin.state_dict_type), rule, "Set it to FULL_STATE_DICT.")


def check_finite(loss: torch.Tensor, name: str, subnetwork: Any, step: int) -> None:
    """Stop before the weights are touched by a loss that is no number.

    Raises:
        FloatingPointError: it is not finite.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"The loss of sub-network {name!r} ({subnetwork.to_dict()}) is {loss.item()} at step"
            f" {step}. Training stops here, before the weights are touched. Resume from the last"
            " checkpoint with a lower learning rate, or look for broken samples."
        )


def warn_about_untrained_sizes(config: FlextronConfig, args: FlextronTrainingArguments) -> None:
    """Say in the log which sizes elastic training will leave alone."""
    rows = len(held(config.frontier))
    weights = args.sampling_weights or [1.0]
    if weights[0] == 0 or args.sampler == "random":
        logger.warning(
            f"The full network is hardly among the sampled sub-networks (sampler={args.sampler!r}), so its"
            " quality will drop. Use sampler='sandwich', or give the first row of the frontier some weight."
        )
    if rows < 2:
        logger.warning("The frontier has a single row: nothing smaller is trained or evaluated by name.")
