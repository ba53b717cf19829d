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
from .subnetwork import SubNetwork, count_parameters, flops_per_token, kv_cache_bytes, weight_bytes

# With the package installed its classes are used, also for repos whose own copy of the code is older.
AutoConfig.register("flextron", FlextronConfig, exist_ok=True)
AutoModel.register(FlextronConfig, FlextronModel, exist_ok=True)
AutoModelForCausalLM.register(FlextronConfig, FlextronForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FlextronConfig, FlextronForSequenceClassification, exist_ok=True)

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
