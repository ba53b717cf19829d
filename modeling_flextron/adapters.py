"""Adapters of PEFT at every size: LoRA runs on the leading slices of its own two matrices.

`(B A)[:o, :i] = B[:o] A[:, :i]`, so one adapter serves every sub-network, and merging before slicing is the same as
after. PEFT puts its layers into the places of ours; it is not imported here, its layers are known by what they have.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F

from .errors import invalid
from .families import ELASTIC, axes

REMEDY = (
    "Merge it (`merge_and_unload()`), or load the model at this budget and train the adapter there; LoRA is sliced."
)
PART = re.compile(
    r"(?P<module>[\w.]+)\.(?P<part>lora_\w+|modules_to_save|base_layer)"
    r"(\.(?P<adapter>(?!weight$|bias$)\w+))?(\.(?P<kind>weight|bias))?"
)
NUMBER = re.compile(r"(?<=\blayers\.)\d+")


def is_narrowed(layer: Any, input: torch.Tensor, size: int | None) -> bool:
    """Whether a layer that replaced one of ours is asked for less than what was built."""
    if size is not None:
        return True
    replaced = getattr(layer, "base_layer", None) or getattr(layer, "token_adapter", None)
    width = getattr(replaced, "in_features", None)
    return width is not None and input.is_floating_point() and input.shape[-1] != width


def add_adapters(
    layer: Any, input: torch.Tensor, output: torch.Tensor, rows: slice, columns: slice, in_place: bool = False
) -> torch.Tensor:
    """Add what the active adapters of a LoRA layer make of `input` to the output of its base layer.

    Args:
        layer: A LoRA layer of PEFT, on a linear layer or an embedding.
        input: What the base layer got: `[..., columns]`, or ids.
        output: What it made of that, `[..., rows]`.
        rows: Output features, rows of B.
        columns: Input features, columns of A.
        in_place: Change `output` itself.
    """
    for name in () if layer.disable_adapters or layer.merged else layer.active_adapters:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            states = layer.lora_dropout[name](input).to(down.weight.dtype)
            bias = None if up.bias is None or columns.start else up.bias[rows]
            added = F.linear(F.linear(states, down.weight[:, columns]), up.weight[rows], bias)
        elif name in layer.lora_embedding_A:
            added = F.embedding(input, layer.lora_embedding_A[name].T) @ layer.lora_embedding_B[name][rows].T
        else:
            continue
        added = (added * layer.scaling[name]).to(output.dtype)
        output = output.add_(added) if in_place else output + added
    return output


def check_sliceable(layer: Any) -> None:
    """Refuse what replaced one of our layers, unless it is LoRA without variants.

    Raises:
        ValueError: another kind of adapter, a variant such as DoRA, or adapters chosen for each row of a batch.
    """
    kind = type(layer).__name__
    if not hasattr(layer, "lora_variant"):
        raise invalid("adapter", kind, "This kind runs at the built size alone.", REMEDY)
    variants = [layer.lora_variant[name] for name in layer.active_adapters if name in layer.lora_variant]
    if variants and not (layer.disable_adapters or layer.merged):
        raise invalid("adapter", type(variants[0]).__name__, "This variant of LoRA is not sliced.", REMEDY)
    if layer._forward_pre_hooks:  # how PEFT hands the names to its layers
        rule = "Adapters for each row of a batch run at the built size alone."
        raise invalid("adapter_names", kind, rule, "Call the model for the rows of each adapter in turn.")


def refuse_adapters(model: Any, argument: str, value: object, remedy: str) -> None:
    """Refuse what reads the weights of a model into which PEFT has put its layers.

    Raises:
        ValueError: the model has adapters.
    """
    if getattr(model, "peft_config", None):
        raise invalid(argument, value, "The model has adapters, which are no part of its weights.", remedy)


def fit_adapter(model: Any, tensors: dict[str, Any], prefix: str = "") -> None:
    """Cut an adapter of the whole family, in place, to a model that was loaded at a budget; leave any other one alone.

    Args:
        model: A `FlextronPreTrainedModel` with the layers of the adapter.
        tensors: Adapter tensors, under the names of the model or those of a file.
        prefix: What the names begin with.

    Raises:
        ValueError: the adapter is of another size that cannot be cut, or it cannot be told which layers are meant.
    """
    parts = {
        name: match
        for name in tensors
        if name.startswith(prefix) and (match := PART.fullmatch(name[len(prefix) :].removeprefix("base_model.model.")))
    }
    if not parts:
        return
    shapes = {
        match.group("module", "part", "kind"): tensor.shape
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (match := PART.fullmatch(name))
    }
    numbers = _layer_numbers(model, {int(at[0]) for name in parts if (at := NUMBER.search(name))})
    adapter = next((match["adapter"] for match in parts.values() if match["adapter"]), None)
    for name, tensor in {name: tensors.pop(name) for name in parts}.items():
        module, part, kind = parts[name].group("module", "part", "kind")
        if adapter and not parts[name]["adapter"]:  # PEFT adds it for layers that it finds in the model
            name = name.replace(f".{part}", f".{part}.{adapter}", 1)
        if at := NUMBER.search(module):
            if (number := numbers.get(int(at[0]))) is None:
                continue  # a layer that this model does not have
            module, name = NUMBER.sub(str(number), module), NUMBER.sub(str(number), name)
        tensors[name] = _leading(tensor, shapes.get((module, part, kind)), module, part, kind)


def _layer_numbers(model: Any, found: set[int]) -> dict[int, int]:
    """From the layer numbers in an adapter to those of the model; layers that it does not have are left out."""
    own = {layer: layer for layer in found}
    if model.stored is None or not found:
        return own
    stored = {layer: built for built, layer in enumerate(model.stored.layers)}
    if all(layer == built for layer, built in stored.items()) or max(found) == model.stored_depth - 1:
        return stored
    chosen = any(
        getattr(c, "layers_to_transform", None) is not None for c in getattr(model, "peft_config", {}).values()
    )
    if found == set(stored.values()) and not chosen:
        return own  # it has every layer, and was trained on a model of this depth
    rule = f"The model has the layers {list(stored)} of {model.stored_depth}; which of them are meant cannot be told."
    remedy = "Load it on the whole family, or on the model that it was trained on, with all layers adapted."
    raise invalid("adapter", f"layers {sorted(found)}", rule, remedy)


def _leading(tensor: torch.Tensor, shape: torch.Size | None, module: str, part: str, kind: str | None) -> torch.Tensor:
    """A tensor of an adapter, cut to a shape along elastic axes."""
    if shape is None or tensor.shape == shape:
        return tensor
    outputs, *inputs = axes(f"{module}.{kind or 'weight'}")
    dims = {
        "lora_A": ("rank", *inputs),
        "lora_B": (outputs,) if kind == "bias" else (outputs, "rank"),
        "lora_embedding_B": (*inputs, "rank"),
        "modules_to_save": (outputs, *inputs),
        "base_layer": (outputs, *inputs),  # PEFT saves adapted embeddings whole
    }.get(part, ())
    if len(dims) != len(shape) or any(
        wanted != size and (wanted > size or axis not in ELASTIC)
        for axis, wanted, size in zip(dims, shape, tensor.shape, strict=True)
    ):
        rule = f"The model needs {list(shape)}, and that is no leading part of {list(tensor.shape)} for this kind."
        remedy = "Load it on the model that it was trained on, or on the whole family."
        raise invalid("adapter", f"{module}.{part}", rule, remedy)
    return tensor[tuple(slice(size) for size in shape)].clone()
