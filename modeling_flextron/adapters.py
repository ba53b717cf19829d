"""Adapters of PEFT: LoRA at every size, and in the order of the parent.

`(B A)[:o, :i] = B[:o] A[:, :i]`, so one adapter serves every sub-network, and merging before slicing is the same as
after. PEFT puts its layers into the places of ours.

An adapter that was trained on the parent has rows and columns in the parent's order. While it is loaded they are put
into ours (`permutation.py`), and from then on it is one of this model. What it was trained on is told by what PEFT
writes beside it: the class, and the name of the model.
"""

import functools
import re
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from .errors import invalid
from .families import ELASTIC, MODULES, at_layer, axes, layer_of
from .permutation import Permutation

REMEDY = "Merge it (`merge_and_unload()`), or train it on the model loaded at this budget; LoRA is sliced."
# What the dimensions of an adapter's tensor count: outputs and inputs of the layer it is on, or something of its own.
PARTS = {
    "lora_A": "rI", "lora_B": "Or", "lora_E": "rr", "lora_embedding_A": "rO", "lora_embedding_B": "Ir",
    "lora_magnitude_vector": "O", "hada_w1_a": "Or", "hada_w1_b": "rI", "hada_w2_a": "Or", "hada_w2_b": "rI",
    "ranknum": "", "ln_tuning_layers": "O", "trainable_tokens_delta": "rI", "modules_to_save": "OI", "base_layer": "OI",
}  # fmt: skip
WHOLE = (None, "base_layer", "modules_to_save")  # parts that are weights of the model
TUNED = {"ia3_l", *PARTS} - {*WHOLE}
WORD = r"(?!weight$|bias$)[^.]+"
PART = re.compile(
    rf"(?P<module>(?:[^.]+\.)*(?:{'|'.join(MODULES)}))(?:\.token_adapter)?"
    rf"(?:\.(?P<part>{WORD}))?(?:\.(?P<adapter>{WORD}))?(?:\.(?P<kind>\w+))?"
)


# --------------------------------------------------------------------------------------------------- running


class PeftLayers(NamedTuple):
    """PEFT's kinds of layers, to ask `isinstance`; without PEFT there are none.

    Args:
        sliceable: Those that run on leading slices.
        every: What all of them are.
        copies: The wrapper around copies of our own layers, which it trains as they are.
    """

    sliceable: tuple[Any, ...] = ()
    every: tuple[Any, ...] = ()
    copies: tuple[Any, ...] = ()


def peft_layers() -> PeftLayers:
    """PEFT's kinds of layers; none while nobody has imported PEFT, as no layer can be one of its own then."""
    return _peft_layers() if "peft" in sys.modules else PeftLayers()


@functools.cache
def _peft_layers() -> PeftLayers:
    try:
        from peft.tuners.lora import Embedding, Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
    except ImportError:  # something else of this name
        return PeftLayers()
    return PeftLayers((Linear, Embedding), (BaseTunerLayer,), (ModulesToSaveWrapper,))


def name_default_targets() -> None:
    """Let the config of an adapter without `target_modules` mean those of a stock LLaMA, whose names ours have.

    PEFT keeps them by type of model, in tables of its own; where it has not been imported there are none.
    """
    for name, table in vars(sys.modules.get("peft.utils", object)).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table.setdefault("flextron", table["llama"])


def kind_of(layer: Any) -> str:
    """Name a layer of PEFT for errors, such as `ia3.Linear`."""
    *_, package, _ = ("", *type(layer).__module__.split("."))
    return f"{package}.{type(layer).__name__}"


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
    if not isinstance(layer, peft_layers().sliceable):
        raise invalid("adapter", kind_of(layer), "This kind runs at the built size alone.", REMEDY)
    variants = [layer.lora_variant[name] for name in layer.active_adapters if name in layer.lora_variant]
    if variants and not (layer.disable_adapters or layer.merged):
        raise invalid("adapter", type(variants[0]).__name__, "This variant of LoRA is not sliced.", REMEDY)
    if layer._forward_pre_hooks:  # how PEFT hands them to its layers
        rule = "Adapters or scalings for each row of a batch (`adapter_names`, X-LoRA) run at the built size alone."
        raise invalid("adapter", kind_of(layer), rule, "Call the model for the rows of each adapter in turn.")


def check_layers(layers: Iterable[Any]) -> None:
    """Refuse fewer channels where PEFT has replaced whole layers of the decoder by some of these."""
    for layer in layers:
        if isinstance(layer, peft_layers().every):
            raise invalid("adapter", kind_of(layer), "This kind runs with all channels alone.", REMEDY)


def refuse_adapters(model: Any, argument: str, value: object, remedy: str) -> None:
    """Refuse what reads the weights of a model into which PEFT has put its layers."""
    if getattr(model, "peft_config", None):
        raise invalid(argument, value, "The model has adapters, which are no part of its weights.", remedy)


# --------------------------------------------------------------------------------------- whose adapter it is


def mark(model: Any) -> dict[str, Any]:
    """Make the fields of an adapter's config that mark it as in the order of this model; PEFT writes them."""
    conversion = None if model.permutation is None else model.permutation.conversion
    base = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "base_model_name_or_path": model.name_or_path or None, "auto_mapping": {**base, "permutation": conversion},
    }  # fmt: skip


def claim(model: Any, config: Any) -> None:
    """Mark the config of an adapter that is in the order of this model."""
    for key, value in mark(model).items():
        setattr(config, key, value)


def is_of_parent(model: Any, config: Any) -> bool | None:
    """Whether an adapter was trained on a stock model, not on one of this conversion; None when that cannot be told.

    Raises:
        ValueError: it was trained on a Flextron model of another conversion.
    """
    name, base = config.base_model_name_or_path or "", config.auto_mapping or {}
    if kind := base.get("base_model_class"):
        if not kind.startswith("Flextron"):
            return True
        if "permutation" not in base:  # as PEFT writes it
            return False
    elif name and name == model.name_or_path:
        return False
    elif name and name == model.config.parent_name and not Path(name).is_dir():
        return True
    else:
        base = _config_at(name, getattr(config, "revision", None))
        if base is None:
            return None
        if base.get("model_type") != "flextron":
            return True
    if base.get("permutation") != (None if model.permutation is None else model.permutation.conversion):
        rule = "It was trained on a Flextron model of another conversion, whose units have another order."
        raise invalid("adapter", name, rule, "Load it on the model that it was trained on.")
    return False


def _config_at(name: str, revision: str | None) -> dict[str, Any] | None:
    """The config of a model by its folder or Hub id, where there is one."""
    try:
        return PreTrainedConfig.get_config_dict(name, revision=revision)[0] if name else None
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------- loading


def read_adapter(tensors: dict[str, Any] | None, files: list[str] | None) -> dict[str, Any]:
    """The tensors of an adapter, as `load_adapter` has them: a dict, or files.

    Raises:
        ValueError: there are no safetensors.
    """
    if tensors is not None:
        return dict(tensors)
    for file in files or ():
        if not str(file).endswith(".safetensors") or not Path(file).is_file():
            remedy = "Save the adapter with PEFT as adapter_model.safetensors."
            raise invalid("adapter", str(file), "Only safetensors are read.", remedy)
    return {name: tensor for file in files or () for name, tensor in load_file(file).items()}


def part_dims(match: re.Match[str], shape: Iterable[int]) -> tuple[str, ...] | None:
    """Name what the dimensions of an adapter's tensor count, "" for what never shrinks; None for unknown parts.

    Args:
        match: Of `PART`, with the tensor's name.
        shape: Of the tensor.
    """
    outputs, *inputs = axes(f"{match['module']}.weight")
    letters = PARTS.get(match["part"] or "base_layer")
    if match["part"] == "ia3_l":
        letters = "rI" if next(iter(shape)) == 1 else "Or"
    if match["kind"] == "bias":
        letters = "O"
    if letters is None or (match["part"] == "lora_magnitude_vector" and outputs == "vocab"):
        return None
    return tuple(chain.from_iterable({"O": (outputs,), "I": inputs, "r": ("",)}[letter] for letter in letters))


def fit_adapter(model: Any, tensors: dict[str, Any], prefix: str = "", *_: Any) -> None:
    """Put an adapter, in place, into the order of a model and cut it to its size; leave any other tensor alone.

    Its tensors have, behind `prefix`, the names of the model, in which PEFT has put its layers, or those of a file.
    What torch tells a hook of `load_state_dict` beside these is not read.

    Raises:
        ValueError: the adapter is of another size that cannot be cut, or of a kind that cannot be put into another
            order, or it cannot be told on what it was trained or which layers are meant.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    parts = {
        name: match
        for name in tensors
        if name.startswith(prefix) and (match := PART.fullmatch(name[len(prefix) :].removeprefix("base_model.model.")))
    }
    for name in tensors:
        if name.startswith(prefix) and name not in parts and TUNED & set(name.split(".")):
            raise _no_module(name)
    named = {match["adapter"] for match in parts.values()} & set(configs)  # which a file does not do
    current = next(iter(named), list(configs)[-1])
    for adapter in named or {current}:
        own = {name: match for name, match in parts.items() if (match["adapter"] or current) == adapter}
        if any(match["part"] for match in own.values()):
            _fit(model, adapter, tensors, own, bool(named))


def _no_module(name: str) -> ValueError:
    remedy = "An adapter of a parent with other names is rewritten by `flextron_trainer.adapters.from_parent`."
    return invalid("adapter", name, "This model has no such module.", remedy)


def _fit(model: Any, adapter: str, tensors: dict[str, Any], parts: dict[str, re.Match[str]], named: bool) -> None:
    """`fit_adapter` for the tensors `parts` of one adapter; `named` says whether they have its name in theirs."""
    config = model.peft_config[adapter]
    shapes = {
        match.group("module", "part", "kind"): tensor.shape
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (match := PART.fullmatch(name)) and match["adapter"] in (None, adapter)
    }
    modules = {module for module, _, _ in shapes}
    dims = {name: part_dims(match, tensors[name].shape) for name, match in parts.items()}
    theirs = _needs_order(model, config, parts, dims)
    numbers = _layer_numbers(model, config, {n for n in map(layer_of, parts) if n is not None}, theirs)
    lora = (layer for layer in model.modules() if isinstance(layer, peft_layers().sliceable))
    variant = any(adapter in layer.lora_variant for layer in lora)
    for name, tensor in {name: tensors.pop(name) for name in parts}.items():
        match, counted = parts[name], dims[name]
        module, part, kind = match.group("module", "part", "kind")
        what = f"{module}.{part or kind}"
        if named and not match["adapter"] and part not in (None, "base_layer"):
            name = name.replace(f".{part}", f".{part}.{adapter}", 1)  # PEFT adds it for layers that it finds here
        if (layer := layer_of(module)) is not None:
            if layer not in numbers:
                continue  # this model does not have it
            module, name = at_layer(module, numbers[layer]), at_layer(name, numbers[layer])
        if part in TUNED and module not in modules:
            raise _no_module(what)
        if theirs:
            fitted = in_our_order(model.permutation, tensor, counted, module, what)
        else:
            # A file has a copy of one of our layers under its name, the state of a model all weights beside them.
            place = "modules_to_save" if part is None and not named else part
            other = part is None and named and kind == "weight"
            fitted = _leading(tensor, None if other else shapes.get((module, place, kind)), counted, what)
        if fitted.shape != tensor.shape and variant:
            rule = "This variant of LoRA is not the same on a part of its layer."
            raise invalid("adapter", what, rule, "Load it on the whole family, or merge it there.")
        tensors[name] = fitted
    if theirs:
        claim(model, config)


def _needs_order(model: Any, config: Any, parts: dict[str, re.Match[str]], dims: dict[str, Any]) -> bool:
    """Whether an adapter must be put into our order: it has that of the parent, and this is another one."""
    permutation = model.permutation
    weights = (m["module"] for m in parts.values() if m.group("part", "kind") == ("base_layer", "weight"))
    if any(layer_of(module) is not None for module in weights):
        return False  # the state of a whole model of ours
    rotated = permutation is not None and permutation.rotated
    if permutation is not None and not rotated:
        touched = chain.from_iterable(dims[n] or axes(f"{match['module']}.weight") for n, match in parts.items())
        if not permutation.moved & set(touched):
            return False
    theirs = is_of_parent(model, config)
    name = config.base_model_name_or_path
    if theirs and permutation is None:
        rule = "It was trained on a stock model, and this checkpoint does not know in which order that has its units."
        remedy = "Convert the parent again with this version, or train an adapter on this model."
        raise invalid("adapter", name, rule, remedy)
    if rotated and theirs is not False:
        rule = "The residual stream was rotated in the conversion: no channel is one of the parent's."
        remedy = "Merge it into the parent and convert that, or train an adapter on this model."
        raise invalid("adapter", name, rule, remedy)
    if theirs is None and permutation is not None:
        rule = "It cannot be told whether it was trained on this model or on its parent, which has another order."
        ours = repr(model.name_or_path) if model.name_or_path else "a folder into which this model was saved"
        parent = repr(model.config.parent_name) if model.config.parent_name else "the folder or id of the parent"
        remedy = f"Write which of them into its adapter_config.json, as `base_model_name_or_path`: {ours}, or {parent}."
        raise invalid("adapter", name, rule, remedy)
    return bool(theirs)


def _layer_numbers(model: Any, config: Any, found: set[int], theirs: bool) -> dict[int, int]:
    """From the layer numbers in an adapter to those of the model; layers that it does not have are left out."""
    built = {layer: layer for layer in model.built.layers}
    ways = [(len(built), built)]  # number of layers that the adapter was trained on, and where they are here
    if model.stored is not None:
        ways.insert(0, (model.stored_depth, {layer: i for i, layer in enumerate(model.stored.layers)}))
    if model.permutation is not None:
        root = (model.permutation.sizes["layers"], {layer: i for i, layer in enumerate(model.permutation.layers)})
        ways = [root] if theirs else [root, *ways]
    ways = [(depth, numbers) for depth, numbers in ways if max(found, default=-1) < depth]
    chosen = getattr(config, "layers_to_transform", None) is not None or any(
        layer_of(pattern) is not None for pattern in (getattr(config, "alpha_pattern", None) or {})
    )
    if not chosen:
        ways = [way for way in ways if found == set(range(way[0]))][:1] or ways
    places = [{number: way[number] for number in found if number in way} for _, way in ways]
    moved = chosen and any(place != {number: number for number in found} for place in places)
    if places and not moved and all(place == places[0] for place in places):
        return places[0]
    rule = f"It cannot be told which of this model's layers {list(built)} are meant: others were left out."
    remedy = "Load it on the whole family, or on the model that it was trained on, with all layers adapted."
    raise invalid("adapter", f"layers {sorted(found)}", rule, remedy)


def in_our_order(
    permutation: Permutation, tensor: torch.Tensor, dims: tuple[str, ...] | None, module: str, what: str
) -> torch.Tensor:
    """A tensor of an adapter of the parent in our order and size."""
    if dims is None:
        rule = "An adapter of this kind cannot be put into the order of this model."
        raise invalid("adapter", what, rule, "Merge it into the parent and convert that.")
    for axis, size in zip(dims, tensor.shape, strict=True):
        if axis in permutation.sizes and size != permutation.parent_size(axis):
            rule = f"It has {size} in `{axis}`, and the parent of this model has {permutation.parent_size(axis)}."
            raise invalid("adapter", what, rule, "Load it on the model that it was trained on.")
    return permutation.to_ours(tensor, dims, layer_of(module)).clone()


def _leading(tensor: torch.Tensor, shape: torch.Size | None, dims: tuple[str, ...] | None, what: str) -> torch.Tensor:
    """A tensor of an adapter, cut to a shape along elastic axes."""
    if shape is None or tensor.shape == shape:
        return tensor
    if (
        dims is None
        or len(dims) != len(shape)
        or any(
            wanted != size and (wanted > size or axis not in ELASTIC)
            for axis, wanted, size in zip(dims, shape, tensor.shape, strict=True)
        )
    ):
        rule = f"The model needs {list(shape)}, and that is no leading part of {list(tensor.shape)} for this kind."
        remedy = "Load it on the model that it was trained on, or on the whole family."
        raise invalid("adapter", what, rule, remedy)
    return tensor[tuple(slice(size) for size in shape)].clone()
