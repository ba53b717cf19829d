"""Flextron models for Hugging Face: one set of weights that runs at every smaller size."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_flextron import FlextronConfig
from .latency import LatencyTable
from .modeling_flextron import (
    FlextronForCausalLM,
    FlextronForSequenceClassification,
    FlextronModel,
    FlextronPreTrainedModel,
)
from .subnetwork import (
    SubNetwork,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    weight_bytes,
)

# With the package installed its classes are used, also for repos whose own copy of the code is older.
AutoConfig.register("flextron", FlextronConfig, exist_ok=True)
AutoModel.register(FlextronConfig, FlextronModel, exist_ok=True)
AutoModelForCausalLM.register(FlextronConfig, FlextronForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FlextronConfig, FlextronForSequenceClassification, exist_ok=True)

try:
    from peft import utils as peft_utils
except ImportError:
    pass
else:  # an adapter's config without `target_modules` means the same modules as for a stock LLaMA, whose names ours have
    for name, table in vars(peft_utils).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table.setdefault("flextron", table["llama"])

__all__ = [
    "FlextronConfig",
    "FlextronForCausalLM",
    "FlextronForSequenceClassification",
    "FlextronModel",
    "FlextronPreTrainedModel",
    "LatencyTable",
    "SubNetwork",
    "count_parameters",
    "flops_per_token",
    "kv_cache_bytes",
    "weight_bytes",
]
