"""Load a model: of the stored tensors only those, and only the parts of them, that its budget needs.

A checkpoint of whole tensors is loaded by transformers as it lies there. For a budget, and of a checkpoint in levels,
transformers is handed lazy parts of the tensors instead (`level_reader.py`), as a state dict: devices, dtypes,
quantization and what is said of missing tensors are the same for both.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files, resolve_revision

from .adapters import fit_adapter, name_default_targets, read_adapter
from .budgets import parse_budget, resolve
from .checkpoint import undisturbed
from .config_files import where_in_repo
from .configuration_flextron import FlextronConfig
from .errors import invalid, refuse_misspelt
from .fit import fit
from .level_blocks import AGAIN, DTYPES
from .level_reader import empty_model, read_index, stored_tensors
from .permutation import Permutation, read_permutation
from .subnetwork import is_routed
from .switching import quantization_method

HUB_DEFAULTS = {
    "cache_dir": None, "force_download": False, "local_files_only": False, "proxies": None, "revision": None,
    "subfolder": "", "token": None,
}  # fmt: skip

# Some parts of transformers ask by the name of a class what it is: the Trainer, which labels label smoothing shifts;
# `transformers serve`; model cards. Registering with the Auto classes does not reach these tables.
MODEL_MAPPING_NAMES["flextron"] = "FlextronModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["flextron"] = "FlextronForCausalLM"
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["flextron"] = "FlextronForSequenceClassification"


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords of `from_pretrained` that say where files are: `revision`, `token`, `cache_dir` and the like."""
    return {key: kwargs[key] for key in HUB_DEFAULTS if key in kwargs}


class LoadingMixin(PreTrainedModel):
    """`from_pretrained` and `load_adapter` of a model that may be smaller than what is stored."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        name_default_targets()
        self._permutation: Permutation | None = None
        self.register_load_state_dict_pre_hook(fit_adapter)  # how PEFT loads one

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load as `PreTrainedModel.from_pretrained`; with `flextron_budget`, `flextron_context` beside a config, too.

        Only safetensors are read, and of a checkpoint in levels only those that the budget needs.

        Raises:
            ValueError: beside what other checks refuse, a folder into which something is saved at the same time.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        folder = "" if source is None else os.path.join(source, kwargs.get("subfolder") or "")
        with undisturbed(folder):
            config, kwargs = cls._config_to_load(source, config, kwargs)
            if source is None or (config.flextron_budget is None and config.levels is None):
                kwargs |= {"use_safetensors": True, "output_loading_info": True}
                model, info = super().from_pretrained(source, *args, config=config, **kwargs)
                refuse_blocks(info["unexpected_keys"])
                if source is not None and model.permutation is None:
                    hub = hub_options(kwargs)
                    model.permutation = read_permutation(model, model.name_or_path, **hub)
            else:
                model, info = cls._load_parts(source, config, *args, **kwargs)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.pre_quantized:
            model.config.forget_measurements()  # these are other weights
        return (model, info) if with_info else model

    @classmethod
    def _config_to_load(cls, source: Any, config: Any, kwargs: dict[str, Any]) -> tuple[FlextronConfig, dict[str, Any]]:
        """The config of a repo with the keywords that are for it, and the keywords that are left for loading."""
        refuse_misspelt(kwargs, "flextron_budget", "flextron_context")
        loading = {key: kwargs[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs}
        if isinstance(config, PreTrainedConfig):
            config.check_still_there(str(source), kwargs.get("subfolder") or "")
            config = copy.deepcopy(config)
            config._read_at = where_in_repo(kwargs) or config._read_at
            for key in ("flextron_budget", "flextron_context"):
                if key in kwargs:
                    setattr(config, key, kwargs.pop(key))
        else:
            kept = loading | hub_options(kwargs)
            ours = {key: value for key, value in kwargs.items() if key not in loading}
            config, rest = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **ours)
            kwargs = rest | kept
        # Budgets of memory are in bytes of the dtype that is loaded, and must mean the same before and after.
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        config.dtype = config.dtype if dtype in (None, "auto") else dtype
        config.validate()
        if parse_budget(config.flextron_budget).kind == "fit":
            found = fit(config, config.flextron_budget, kwargs.get("device_map"), kwargs.get("max_memory"))
            config.flextron_budget = found.to_dict()
        return config, kwargs

    @classmethod
    def _load_parts(cls, source: Any, config: FlextronConfig, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """A model and what was missing, from the parts of the stored tensors that `config` needs."""
        if quantization_method(config) is not None:
            rule = "The stored weights are quantized, and are not cut on disk."
            remedy = "Load all of them and `set_budget`, or quantize an unquantized checkpoint while loading it."
            raise invalid("flextron_budget", resolve(config, config.flextron_budget).to_dict(), rule, remedy)
        hub = HUB_DEFAULTS | {key: kwargs.pop(key) for key in HUB_DEFAULTS if key in kwargs}
        revision, where = hub["revision"], ("token", "local_files_only", "cache_dir")
        adapter, base, adapter_kwargs = maybe_load_adapters(source, hub, **(kwargs.pop("adapter_kwargs", None) or {}))
        hub["revision"] = resolve_revision(base, revision, **{key: hub[key] for key in where})
        files, index = find_files(base, config, kwargs.pop("variant", None), hub)
        if config.flextron_budget is not None:  # a latency budget is looked up beside a repo, which is not named below
            wanted = resolve(config, config.flextron_budget)
            config.flextron_budget = f"auto:{wanted.target}" if is_routed(wanted) else wanted.to_dict()
        empty = empty_model(cls, config)
        tensors = stored_tensors(empty, files, index)
        if kwargs.get("offload_folder") is not None:  # where each name is looked up
            tied = empty.all_tied_weights_keys.items()
            tensors |= {name: tensors[other] for name, other in tied if name not in tensors and other in tensors}
        if config.dtype is None:
            config.dtype = DTYPES[next(tensor.dtype for tensor in tensors.values() if tensor.dtype in DTYPES)]
        model, info = super().from_pretrained(
            None, *args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        model.config.name_or_path = model.name_or_path = model.base_model.name_or_path = str(base)
        model.permutation = read_permutation(model, base, **hub)
        if model.can_generate() and kwargs.get("generation_config") is None:
            hub_and_trust = {**hub, "trust_remote_code": kwargs.get("trust_remote_code")}
            model.adjust_generation_fn(None, False, None, base, **hub_and_trust)
        if adapter is not None:
            name = kwargs.get("adapter_name", "default")
            hub |= {"revision": revision}
            info = model.load_adapter(adapter, name, adapter_kwargs=adapter_kwargs, download_kwargs=hub).to_dict()
        return model, info

    @property
    def permutation(self) -> Permutation | None:
        """Where every unit was in the parent; None when that is not known."""
        return self.base_model._permutation

    @permutation.setter
    def permutation(self, permutation: Permutation | None) -> None:
        self.base_model._permutation = permutation

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # `load_adapter` makes PEFT's layers and then fills them, by this: only here are both known, layers and tensors.
        if expected_keys is not None:
            if model.permutation is None:  # in the middle of `from_pretrained`
                model.permutation = read_permutation(model, model.name_or_path, **(load_config.download_kwargs or {}))
            state_dict, checkpoint_files = read_adapter(state_dict, checkpoint_files), None
            fit_adapter(model, state_dict)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)


def find_files(
    source: Any, config: FlextronConfig, variant: str | None, hub: dict[str, Any]
) -> tuple[list[str], dict[str, Any] | None]:
    """The safetensors files of a checkpoint that a config needs, downloaded, and the index that named them.

    Raises:
        ValueError: the index is none of levels where the config has levels.
        OSError: something is missing, also in the cache where the Hub cannot be reached.
    """
    dot = f".{variant}" if variant else ""
    names = [SAFE_WEIGHTS_NAME.replace(".s", f"{dot}.s"), SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{dot}.json")]
    if config.levels is not None:
        names = [config.transformers_weights or SAFE_WEIGHTS_INDEX_NAME]
    try:
        path = first_file(source, names, hub)
        if not path.endswith(".json"):
            return [path], None
        index = None if config.levels is None else read_index(Path(path))  # before it is followed
        files, metadata = get_checkpoint_shard_files(source, path, **hub)
    except Exception as error:  # of transformers, or of the HTTP library of huggingface_hub where a connection breaks
        if isinstance(error, ValueError) or config.levels is None or os.path.isdir(source):
            raise
        call = f"from_pretrained({str(source)!r}, flextron_budget={config.flextron_budget!r})"
        hint = f"If files of this budget are not in the cache, `{call}` fetches them where the Hub can be reached."
        raise OSError(f"{error} {hint}") from error
    return files, index or metadata


def first_file(source: Any, names: list[str], hub: dict[str, Any]) -> str:
    """The path of the first of some files that there is; an `OSError` without any."""
    errors = []
    for name in names:
        try:
            path = cached_file(source, name, **hub)
            assert path is not None  # it raises instead
            return path
        except OSError as error:
            errors.append(error)
    raise errors[0]


def refuse_blocks(unexpected: Iterable[str]) -> None:
    """Refuse tensors that a model did not expect because they are blocks of levels, of which its config knows none."""
    for name in unexpected:
        if name.endswith("]"):
            rule = "Its files hold tensors in blocks, and `config.json` is of a checkpoint without levels."
            raise invalid("index", name, rule, AGAIN)
