"""An adapter that was trained on the parent, rewritten for the elastic model: its names, its order and its shapes."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronPreTrainedModel
from modeling_flextron.adapters import PART, WHOLE, in_our_order, mark, part_dims
from modeling_flextron.checkpoint import write_beside
from modeling_flextron.errors import invalid
from modeling_flextron.families import axes, family_of, from_stock, is_shared, layer_of, stock_name
from modeling_flextron.level_reader import empty_model
from modeling_flextron.permutation import read_permutation

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ON_LAYERS = ("LORA", "ADALORA", "IA3", "LOHA", "LN_TUNING", "TRAINABLE_TOKENS")
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
INSTEAD = "Merge it into the parent and convert that."


def from_parent(
    adapter: str | os.PathLike, elastic: FlextronPreTrainedModel | str | os.PathLike, output: str | os.PathLike
) -> Path:
    """Rewrite an adapter that was trained on the parent into one of the elastic model.

    `PeftModel.from_pretrained(elastic, adapter)` does this by itself where the parent's modules have the names of ours
    (not in GPT-2 and GPT-NeoX) and the adapter is one on layers (no prompt).

    Args:
        adapter: Folder or Hub id of the adapter.
        elastic: The model, its folder or its Hub id. The adapter gets the size that a model has been loaded at.
        output: Folder to write.

    Returns:
        `output`, for `PeftModel.from_pretrained`.

    Raises:
        ValueError: another kind of adapter, one of another model, or a model that does not know its permutation.
    """
    model: Any = _without_weights(elastic) if isinstance(elastic, (str, os.PathLike)) else elastic
    if model.permutation is None:
        rule = "It does not know in which order its parent has its units."
        raise invalid("elastic", model.name_or_path, rule, "Convert the parent again with this version.")
    settings = json.loads(Path(_file(adapter, CONFIG)).read_text(encoding="utf-8"))
    tensors = load_file(_file(adapter, WEIGHTS))
    kind = settings["peft_type"]
    if str((settings.get("auto_mapping") or {}).get("base_model_class")).startswith("Flextron"):
        rule = "It was trained on a Flextron model."
        raise invalid("adapter", str(adapter), rule, "Load it there as it is.")
    if kind in PROMPTS:
        settings |= {"token_dim": model.config.hidden_size, "num_layers": model.config.num_hidden_layers}
        if kind == "PREFIX_TUNING":
            tensors = {name: _prefix(model, tensor) for name, tensor in tensors.items()}
            heads = len(model.permutation.kv_heads[0])
            settings |= {"num_attention_heads": heads, "token_dim": heads * model.config.head_dim}
        else:
            tensors = {name: model.permutation.to_ours(tensor, ("", "hidden")) for name, tensor in tensors.items()}
    elif kind in ON_LAYERS:
        tensors, theirs = _rewritten(model, tensors)
        settings |= _settings(model, settings, tensors, theirs)
    else:
        raise invalid("adapter", kind, f"The kinds that are rewritten are {', '.join(ON_LAYERS + PROMPTS)}.", INSTEAD)
    settings |= mark(model)
    with write_beside(output) as folder:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(output)


def _file(adapter: str | os.PathLike, name: str) -> str:
    path = cached_file(adapter, name)
    assert path is not None  # it raises instead
    return path


def _without_weights(source: str | os.PathLike) -> FlextronPreTrainedModel:
    model = empty_model(FlextronForCausalLM, FlextronConfig.from_pretrained(source))
    model.permutation = read_permutation(model, source)
    return model


def _prefix(model: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Keys and values `[tokens, (layers, 2, KV heads, head_dim)]` that stand before those of every text."""
    permutation = model.permutation
    parts = tensor.unflatten(1, (permutation.sizes["layers"], 2, -1)).unbind(1)
    kept = [permutation.to_ours(parts[n], ("", "", "kv_heads"), i) for i, n in enumerate(permutation.layers)]
    if len({part.shape for part in kept}) > 1:
        rule = "Its layers have different numbers of KV heads, and a prefix has the same in all."
        raise invalid("elastic", model.name_or_path, rule, "Use a size whose layers agree.")
    return torch.stack(kept, dim=1).flatten(1)


def _modules(model: Any) -> dict[str, list[str]]:
    """Every module of the parent with weights -> ours that it holds; none for a layer that is not there."""
    family, here = family_of(model.config.base_model_type), {n: i for i, n in enumerate(model.permutation.layers)}
    modules: dict[str, list[str]] = {"score": ["score"]}  # of a classifier, which the tables leave out
    for name in model.state_dict():
        ours, _, kind = name.rpartition(".")
        if kind != "weight" or not is_shared(name) or ours == "score" or layer_of(name) not in (None, 0):
            continue
        for layer in range(model.permutation.sizes["layers"]) if layer_of(name) == 0 else (None,):
            held = modules.setdefault(stock_name(family, name, layer).removesuffix(".weight"), [])
            if layer is None:
                held.append(ours)
            elif layer in here:
                held.append(ours.replace("layers.0.", f"layers.{here[layer]}.", 1))
    return modules


def _rewritten(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of an adapter on layers under our names, and our modules that it is on -> those of the parent."""
    family, permutation, modules = family_of(model.config.base_model_type), model.permutation, _modules(model)
    result, theirs = dict[str, torch.Tensor](), dict[str, str]()
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        stock = max((module for module in modules if path.startswith(f"{module}.")), key=len, default=None)
        if stock is None:
            raise invalid("adapter", name, "The parent of this model has no such module.", "Use one of that parent.")
        rest = path.removeprefix(f"{stock}.")
        for module in modules[stock]:
            match = PART.fullmatch(f"{module}.{rest}")
            dims = None if match is None else part_dims(match, tensor.shape)
            if match is None or dims is None:
                raise invalid("adapter", name, "A tensor of this kind has no order of its own.", INSTEAD)
            view = tensor
            if match["part"] in WHOLE:
                view = from_stock(family, f"{module}.{match['kind']}", tensor, permutation.sizes["heads"])
            elif dims and dims[0] == axes(f"{module}.weight")[0]:  # of such rows q, k and v have a third each
                view = from_stock(family, f"{module}.bias", tensor, permutation.sizes["heads"])
            result[f"{PREFIX}{module}.{rest}"] = in_our_order(permutation, view, dims, module, name)
            theirs[module] = stock
    return result, theirs


def _settings(
    model: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor], theirs: dict[str, str]
) -> dict[str, Any]:
    """Rename the modules in an adapter's config for those in `tensors`; `theirs`: what the parent calls them."""
    adapted, inputs, whole = set[str](), set[str](), set[str]()
    for name, tensor in tensors.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        assert match is not None
        if match["part"] in WHOLE:
            whole.add(match["module"])
        elif ".token_adapter." not in name:
            adapted.add(match["module"])
        if match["part"] == "ia3_l" and tensor.shape[0] == 1:
            inputs.add(match["module"])
    targets = settings["target_modules"]
    if isinstance(targets, list):  # and not what PEFT ties to them by itself
        adapted = {module for module in adapted if any(_names(target, theirs[module]) for target in targets)}
    new: dict[str, Any] = {"target_modules": _short(model, adapted)}
    if settings.get("feedforward_modules"):
        new["feedforward_modules"] = _short(model, inputs)
    if settings.get("modules_to_save"):
        new["modules_to_save"] = _short(model, whole - adapted)
    if isinstance(tokens := settings.get("trainable_token_indices"), dict):
        new["trainable_token_indices"] = {
            name: ids
            for key, ids in tokens.items()
            for name in _short(model, (ours for ours, stock in theirs.items() if _names(key, stock)))
        }
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = {
            module: next((v for key, v in (settings.get(pattern) or {}).items() if _names(key, stock)), None)
            for module, stock in theirs.items()
        }
        new[pattern] = {
            name: value
            for value in set(values.values()) - {None}
            for name in _short(model, (module for module in values if values[module] == value))
        }
    # The targets say it all.
    rest = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules", "revision"))
    return {key: value for key, value in (new | rest | {"fan_in_fan_out": False}).items() if key in settings}


def _names(pattern: str, module: str) -> bool:
    """Whether PEFT finds a module by this entry of a config."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _short(model: Any, modules: Iterable[str]) -> list[str]:
    """Names of modules as an adapter's config lists them: one for all layers where every layer has it."""
    found: dict[str, set[str]] = {}
    for module in modules:
        found.setdefault(re.sub(r"^model\.(layers\.\d+\.)?", "", module), set()).add(module)
    everywhere = [{1}, {len(model.built.layers)}]
    return sorted(
        name
        for short, full in found.items()
        for name in ([short] if {len(full)} == everywhere[layer_of(min(full)) is not None] else full)
    )
