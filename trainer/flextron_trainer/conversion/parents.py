"""Brings whatever may be a parent to one plain dense model: loads it, merges adapters, refuses anything else."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import CONFIG_NAME, extract_commit_hash, find_adapter_config_file

from modeling_flextron.errors import invalid
from modeling_flextron.families import family_of
from modeling_flextron.loading import hub_options

from ..models import file_of, load_stock, read_config, reading

# Config field -> the one value of it that our decoder computes, of any family; see `Family.supported`.
SUPPORTED = {"is_causal": True, "alibi": False, "num_local_experts": None, "num_experts": None}


def plain_parent(parent: Any, *, trust_remote_code: bool = False, **load_kwargs: Any) -> PreTrainedModel:
    """The dense model that a parent is.

    Args:
        parent: A model, which stays as it is, or one of PEFT, of which a copy is merged; or the Hub id or folder of a
            model, or of an adapter, whose base is loaded and merged with it.
        trust_remote_code, load_kwargs: For an id or a folder, as in `load_stock`; `revision` and `subfolder` are those
            of an adapter, which names the revision of its base.

    Raises:
        ValueError: none of these; elastic already; an architecture that is not supported; weights that are quantized or
            divided among devices; adapters that cannot be merged or do not fit.
    """
    if isinstance(parent, (str, os.PathLike)):
        return _loaded(os.fspath(parent), trust_remote_code, load_kwargs)
    if load_kwargs:
        raise invalid("load_kwargs", load_kwargs, "They are for a parent given as an id or a folder.", "Drop them.")
    adapted = hasattr(parent, "peft_config") and hasattr(parent, "get_base_model")
    model: Any = parent.get_base_model() if adapted else parent
    if not isinstance(model, PreTrainedModel):
        rule = "It is a causal language model of transformers, with or without adapters of PEFT, a Hub id or a folder."
        raise invalid("parent", type(parent).__name__, rule, "Pass one of these.")
    check_supported(model.config)
    _check_whole(model)
    if not adapted:
        if hasattr(model, "peft_config"):
            rule = "An adapter was put into it, whose weights would be lost."
            raise invalid("parent", type(model).__name__, rule, "Pass the folder of the adapter, or a PeftModel.")
        return model
    return _merged(copy.deepcopy(parent), name="")  # no longer that of its base


def adapter_of(source: str | os.PathLike, **hub: Any) -> Any:
    """The config of an adapter in a folder or on the Hub; None of anything else.

    Args:
        source: Folder or Hub id.
        hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: an adapter that does not say what it was trained on, or PEFT is not installed.
    """
    source = os.fspath(source)
    with reading("parent", source):
        if find_adapter_config_file(source, **hub) is None:
            return None
    try:
        from peft import PeftConfig
    except ImportError:
        rule = "It is an adapter, and what merges adapters is not installed."
        raise invalid("parent", source, rule, "Run `pip install peft`.") from None
    with reading("parent", source):
        config = PeftConfig.from_pretrained(source, **hub)
    if not config.base_model_name_or_path:
        rule = "It is an adapter, and its `adapter_config.json` does not name its base."
        raise invalid("parent", source, rule, "Write `base_model_name_or_path` into it, or pass a `PeftModel`.")
    return config


def place_of(source: str | os.PathLike, file: str, **hub: Any) -> str:
    """Find the source of a file of a parent: the parent itself, or the base of an adapter that has no such file."""
    adapter = adapter_of(source, **hub)
    if adapter is None or file_of(source, file, **hub) is not None:
        return os.fspath(source)
    return adapter.base_model_name_or_path


def commit_of(source: Any, **hub: Any) -> str | None:
    """The commit of a repo on the Hub that a parent is read from; None of a folder, and of a model in memory."""
    if not isinstance(source, str) or Path(source).is_dir():
        return None
    files = (file_of(source, file, **hub) for file in (CONFIG_NAME, "adapter_config.json"))
    return extract_commit_hash(next(filter(None, files), None), None)


def tensor_of(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a model, read from where it was put by a `device_map` if it is not in memory."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _loaded(source: str, trust_remote_code: bool, load_kwargs: dict[str, Any]) -> PreTrainedModel:
    hub = hub_options(load_kwargs)
    adapter, place, how = adapter_of(source, **hub), source, {**load_kwargs, "trust_remote_code": trust_remote_code}
    if adapter is not None:
        place = adapter.base_model_name_or_path
        how = {key: value for key, value in how.items() if key not in ("revision", "subfolder")}
        how |= {"revision": adapter.revision} if adapter.revision else {}
    config = read_config(place, **how)
    check_supported(config)  # before gigabytes are read
    if getattr(config, "quantization_config", None) is not None and "quantization_config" not in load_kwargs:
        raise _not_whole(source, f"Its config says {config.quantization_config}.")
    model = load_stock(place, **{"dtype": "auto", **how})
    _check_whole(model)
    if adapter is None:
        return model
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, source, **hub)
    found = adapted.load_adapter(source, "default", **hub)  # once more: only this says what did not fit
    if names := [*found.missing_keys, *found.unexpected_keys]:
        rule = f"Its tensors do not fit its base {place!r}: {', '.join(sorted(names)[:3])}."
        raise invalid("parent", source, rule, "Use the model that it was trained on.")
    return _merged(adapted, name=source)


def _merged(adapted: Any, name: str) -> PreTrainedModel:
    """The model of PEFT that is given, taken apart, with its active adapters in the weights, under another name."""
    kinds = ", ".join(str(getattr(config.peft_type, "value", "")) for config in adapted.peft_config.values())
    if any(parameter.is_meta for parameter in adapted.parameters()):
        rule = "Adapters are merged in memory, and parts of its base were offloaded."
        raise invalid("parent", type(adapted).__name__, rule, "Load it without a `device_map` that offloads.")
    try:
        merged = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        rule = f"Adapters of the kind {kinds} are not merged into weights ({error})."
        raise invalid("parent", type(adapted).__name__, rule, "Convert the base, or merge it on your own.") from error
    merged.name_or_path = name
    return merged


def check_supported(parent: PreTrainedConfig) -> None:
    """Refuse a parent that computes what our decoder does not.

    Raises:
        ValueError: an unsupported architecture, or an unsupported option of a supported one.
    """
    if parent.model_type == "flextron":
        rule = "It is elastic already."
        raise invalid("parent", "flextron", rule, "Convert its parent, or a model that it extracts.")
    for name, value in (SUPPORTED | family_of(parent.model_type).supported).items():
        found = getattr(parent, name, value)
        if found != value and (found or value):
            rule = f"A {parent.model_type} model is supported with `{name}={value}` alone."
            raise invalid(f"parent.config.{name}", found, rule, "Use a parent without this option.")


def _check_whole(model: PreTrainedModel) -> None:
    """Refuse weights that are not plain numbers of which sizes can be cut."""
    for name, tensor in model.state_dict().items():
        if type(tensor) is not torch.Tensor or not tensor.is_floating_point() or tensor.element_size() < 2:
            kind = type(tensor).__name__ if type(tensor) is not torch.Tensor else tensor.dtype
            raise _not_whole(type(model).__name__, f"Tensor {name!r} is of the kind {kind}.")


def _not_whole(parent: str, found: str) -> ValueError:
    rule = f"Sizes are cut from weights that are neither quantized nor divided among devices. {found}"
    remedy = "Convert it before that is done, or after `parent.dequantize()` where its quantizer offers this."
    return invalid("parent", parent, rule, remedy)
