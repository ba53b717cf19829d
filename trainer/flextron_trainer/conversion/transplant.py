"""Carry what an elastic model has learned to a variant of its parent: no second training.

The weights become `variant + (trained - base)`: those of the variant, in the order and the sizes of the elastic model,
and on top of them what training changed in the weights of the parent (a task vector, arXiv 2212.04089). Rows, routers
and corrections are those of the elastic model.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.adapters import refuse_adapters
from modeling_flextron.corrections import owner_number
from modeling_flextron.errors import invalid
from modeling_flextron.families import axes, family_of, from_stock, is_shared, layer_of, stock_name
from modeling_flextron.loading import hub_options
from modeling_flextron.permutation import Permutation
from modeling_flextron.subnetwork import AXES
from modeling_flextron.switching import quantization_method

from ..data import check_tokens, known_tokenizer
from ..models import load_elastic
from .convert import origin_of
from .parents import commit_of, place_of, plain_parent, tensor_of
from .sizes import family_config
from .weights import put_tensor, unfilled

logger = logging.get_logger(__name__)
# What a variant may have of its own, and the result then has. The rest says what is computed.
OWN = (
    "vocab_size", "max_position_embeddings", "rope_parameters", "norm_eps", "sliding_window", "pad_token_id",
    "bos_token_id", "eos_token_id", "use_cache", "initializer_range", "attention_dropout", "residual_dropout",
    "embedding_dropout",
)  # fmt: skip
COMPUTED = (
    "base_model_type", "hidden_act", "norm_type", "head_dim", "attention_bias", "attention_output_bias", "qk_norm",
    "mlp_bias", "gated_mlp", "parallel_residual", "learned_positions", "tie_word_embeddings",
)  # fmt: skip
SAME_BASE = "Pass a model that was trained on from the same base."


@torch.no_grad()
def transplant(
    elastic: str | os.PathLike | PreTrainedModel,
    variant: str | os.PathLike | PreTrainedModel,
    base: str | os.PathLike | PreTrainedModel | None = None,
    *,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    **load_kwargs: Any,
) -> FlextronForCausalLM:
    """Make an elastic model of a variant of the parent, with what an elastic model of the parent has learned.

    Args:
        elastic: An elastic model of the base, trained or not: a model, its folder or Hub id.
        variant: A model of the same shape as the base that was trained on from it, such as its instruct model; also an
            adapter. It may have more tokens or fewer: the difference goes to those that all three have, by number.
        base: What `elastic` was converted from; by default the Hub id that its config names.
        base_revision: Of a base on the Hub; by default of the one that the config names the commit that it names.
        trust_remote_code, load_kwargs: As in `convert`, for the variant; the former for the base as well.

    Returns:
        The elastic model of the variant in the dtype of `elastic`, without measured figures, with the variant's
        generation config. Tensors are read one by one, and added with more digits than they are stored with.

    Raises:
        ValueError: the order of units is not known, or was rotated; the base is not known; the three have different
            shapes, tied embeddings or tokenizers; or they have so little in common that one is no variant of the other.
    """
    model: Any = load_elastic(elastic) if isinstance(elastic, (str, os.PathLike)) else elastic
    order, name = _order_of(model), model.config.parent_name
    if base is None and "/" not in (name or ""):
        rule = f"The config of the elastic model does not say where that is, only its name: {name}."
        raise invalid("base", None, rule, "Pass its folder or Hub id.")
    if base is None:
        base, base_revision = name, base_revision or model.config.parent_revision
    load_base = {} if base_revision is None else {"revision": base_revision}
    dense = {
        "base": plain_parent(base, trust_remote_code=trust_remote_code, **load_base),
        "variant": plain_parent(variant, trust_remote_code=trust_remote_code, **load_kwargs),
    }
    configs = {name: family_config(each.config, {axis: [1] for axis in AXES}) for name, each in dense.items()}
    for name, config in configs.items():
        _check_shape(name, config, model.config, order)
    hub = hub_options(load_kwargs)
    _check_tokenizers(model.name_or_path, dense["variant"].name_or_path, hub)

    config = _config_of(model.config, configs["variant"])
    result, names = unfilled(config, model.dtype)
    trained = dict(model.state_dict(keep_vars=True))
    states = {who: dict(each.state_dict(keep_vars=True)) for who, each in dense.items()}
    squares = torch.zeros(5, dtype=torch.float64)
    for name in tqdm(names, desc="Transplanting", unit="tensor"):
        shared = _shared_name(name)
        source = trained[name]
        tensor = source.detach()
        if shared is not None:
            base_tensor, own = (
                _in_order(dense[who], states[who], shared, order, model.config) for who in ("base", "variant")
            )
            tensor, found = _carried(name, tensor, base_tensor, own)
            squares += found
        put_tensor(result, name, tensor.clone() if shared is None else tensor)
        if model is not elastic:  # loaded here: there is never a second copy
            source.data = source.new_empty(0)
    of_base, *others, changed, differing = squares.sqrt().tolist()
    shares = [part / min(of_base, other) for part, other in zip((changed, differing), others, strict=True)]
    _check_related(dense, shares)
    result.tie_weights()
    result.generation_config = copy.deepcopy(dense["variant"].generation_config)
    result.permutation = order
    config.parent_name, config.parent_license = origin_of(dense["variant"].name_or_path, **hub)
    config.parent_revision = commit_of(variant, **hub)
    made = {
        "base": model.config.parent_name, "trained_difference": shares[0], "variant_difference": shares[1],
        "runs": len(model.config.training_runs or ()),
    }  # fmt: skip
    config.conversion = {**(model.config.conversion or {"order": "unknown"}), "transplanted": made}
    config.validate()
    return result.eval()


def _order_of(elastic: Any) -> Permutation:
    """Where the units of an elastic model were in its parent, of one with which this can be undone."""
    if getattr(elastic.config, "model_type", None) != "flextron" or quantization_method(elastic.config) is not None:
        rule = "It is an elastic language model that is not quantized."
        raise invalid("elastic", type(elastic).__name__, rule, "Pass the output of `flextron convert` or `train`.")
    name = elastic.name_or_path or type(elastic).__name__
    refuse_adapters(elastic, "elastic", name, "Merge them first, with `merge_and_unload()`.")
    if elastic.permutation is None:
        rule = "It does not know in which order its units were in its parent."
        raise invalid("elastic", name, rule, "Convert the parent again with this version, and train that.")
    if elastic.permutation.rotated:
        rule = "Its residual stream was rotated for its own parent, and no channel is one of another's."
        raise invalid("elastic", name, rule, "Convert the base without `rotate`, and train that.")
    return elastic.permutation


def _check_shape(name: str, config: FlextronConfig, elastic: FlextronConfig, order: Permutation) -> None:
    """Refuse a stock model that is none of the shape that an elastic model was converted from."""
    found = {field: getattr(config, field) for field in COMPUTED} | Permutation.unsorted(config).sizes
    wanted = {field: getattr(elastic, field) for field in COMPUTED} | order.sizes
    differing = [
        f"{field} is {found[field]!r} and not {wanted[field]!r}" for field in wanted if found[field] != wanted[field]
    ]
    if not differing and [config.layer_types[layer] for layer in order.layers] != elastic.layer_types:
        differing = ["layer_types is another one"]
    if differing:
        rule = f"It is not of the shape that the elastic model was converted from: {', '.join(differing)}."
        raise invalid(name, config.base_model_type, rule, SAME_BASE)


def _check_tokenizers(elastic: str, variant: str, hub: Mapping[str, Any]) -> None:
    """Refuse a variant of another tokenizer, where both are known."""
    ours = known_tokenizer(elastic)
    theirs = known_tokenizer(place_of(variant, "tokenizer_config.json", **hub), **hub) if ours and variant else None
    if ours and theirs:
        check_tokens("variant", variant, theirs, ours, SAME_BASE)


def _config_of(elastic: FlextronConfig, variant: FlextronConfig) -> FlextronConfig:
    """The config of the elastic model, with what a variant has of its own, and no figures."""
    config = copy.deepcopy(elastic)
    for field in OWN:
        setattr(config, field, copy.deepcopy(getattr(variant, field)))
    config.levels, config.architectures = None, ["FlextronForCausalLM"]
    if variant.vocab_size != elastic.vocab_size:
        config.latency_tables = {}  # of another output layer
    config.forget_measurements()
    config.validate()
    return config


def _shared_name(name: str) -> str | None:
    """The tensor of ours that the parent has, too: of this name, or for which a row has a norm of its own."""
    if is_shared(name):
        return name
    number = owner_number(name)
    if number is None or "_correction." in name:
        return None
    return name.replace(f"corrections.{number}.", "")


def _in_order(
    model: PreTrainedModel, state: Mapping[str, Any], name: str, order: Permutation, config: FlextronConfig
) -> torch.Tensor:
    """Our tensor `name` of a stock model, in our order and sizes."""
    layer, family = layer_of(name), family_of(config.base_model_type)
    stock = stock_name(family, name, None if layer is None else order.layers[layer])
    tensor = tensor_of(model, stock, state[stock]).detach()
    return order.to_ours(from_stock(family, name, tensor, order.sizes["heads"]), axes(name), layer)


def _carried(
    name: str, trained: torch.Tensor, base: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`own + (trained - base)` where all three have entries, in the dtype of `trained`; and squares of the three.

    Sums have twice the digits of what is stored, so that without a difference the result is one of the others exactly.

    Returns:
        The sum; and the squares of base, trained, own, `trained - base` and `own - base`, added up.
    """
    if axes(name)[0] == "hidden" and len(trained) < len(own):  # a norm of a smaller row
        base, own = base[: len(trained)], own[: len(trained)]
    rows = min(map(len, (trained, base, own)))
    if axes(name)[0] != "vocab" and not trained.shape == base.shape == own.shape:
        rule = f"Tensor {name!r} is {tuple(own.shape)} of the variant, and {tuple(base.shape)} of the base."
        raise invalid("variant", name, rule, SAME_BASE)
    wide = torch.float32 if max(t.element_size() for t in (trained, base, own)) == 2 else torch.float64
    result, base = own.to(trained.device, wide, copy=True), base.to(trained.device, wide)[:rows]
    change = trained[:rows].to(wide) - base
    parts = (base, trained[:rows], result[:rows], change, result[:rows] - base)
    squares = torch.stack([part.double().square().sum().cpu() for part in parts])
    result[:rows] += change
    return result.to(trained.dtype).contiguous(), squares


def _check_related(dense: Mapping[str, PreTrainedModel], shares: list[float]) -> None:
    """Refuse models of which one was not trained on from the other: they differ by more than their own size."""
    for who, other, share in zip(("base", "variant"), ("elastic model", "base"), shares, strict=True):
        if not share < 1:
            rule = (
                f"It differs from the {other} by {share:.2f} of the size of the weights: neither comes from the other."
            )
            name = dense[who].name_or_path or type(dense[who]).__name__
            raise invalid(who, name, rule, "Pass the base that was converted, and a model that was trained on from it.")
