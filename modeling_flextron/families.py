"""Stock architectures: how each writes what our decoder holds, read in both directions.

`convert` (parent -> ours) and `extract` (ours -> stock) use the same tables: config fields, weight names, and the
order in which query heads are stored. Which axis of the sub-network a dimension of a weight belongs to is a property
of our decoder, in `axes`. A new LLaMA-like family is one more entry of `FAMILIES`; docs/families.md shows one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import invalid


@dataclass(frozen=True)
class Family:
    """A stock architecture.

    Args:
        fields: Our config field -> the stock field with the same value.
        modules: Our module -> the stock one; `{i}` stands for the layer. Modules that a model does not have are
            simply absent from it. q, k and v projections with one stock name are one fused projection.
        constants: Our config fields that have the same value in every model of the family.
        supported: Stock config field -> the one value of it that our decoder computes.
        transposed: Stock modules whose weights are `[in, out]`.
        fused_by_head: Whether the rows of a fused projection are `[head, (q, k, v), head_dim]` instead of
            `[(q, k, v), head, head_dim]`.
        heads_divide_hidden: Whether the stock config refuses other head counts.
        partial_rotary: Whether the stock class heeds a `partial_rotary_factor`.
    """

    fields: dict[str, str]
    modules: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    supported: dict[str, Any] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    fused_by_head: bool = False
    heads_divide_hidden: bool = False
    partial_rotary: bool = False

    @property
    def own_head_dim(self) -> bool:
        """Whether the size of a head is a field of its own, not hidden / heads."""
        return "head_dim" in self.fields


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_PARTS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm"
_LAYER = f"{_PARTS} mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm".split()
_LLAMA_MODULES = _same("model.embed_tokens model.norm lm_head")
_LLAMA_MODULES |= {name: name for name in (f"model.layers.{{i}}.{module}" for module in _LAYER)}
_SHARED = _same(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size initializer_range use_cache"
    " pad_token_id bos_token_id eos_token_id tie_word_embeddings hidden_act max_position_embeddings attention_dropout"
)
_ROTARY = _SHARED | _same("rope_parameters")
_LLAMA_LIKE = _ROTARY | _same("num_key_value_heads head_dim") | {"norm_eps": "rms_norm_eps"}
_WINDOWS = _same("sliding_window layer_types")

FAMILIES = {
    "llama": Family(
        fields=_LLAMA_LIKE | _same("attention_bias mlp_bias"), modules=_LLAMA_MODULES, heads_divide_hidden=True
    ),
    "mistral": Family(fields=_LLAMA_LIKE | _same("sliding_window"), modules=_LLAMA_MODULES),
    "qwen2": Family(
        fields=_LLAMA_LIKE | _WINDOWS,
        modules=_LLAMA_MODULES,
        constants={"attention_bias": True, "attention_output_bias": False},
    ),
    "qwen3": Family(
        fields=_LLAMA_LIKE | _WINDOWS | _same("attention_bias"), modules=_LLAMA_MODULES, constants={"qk_norm": True}
    ),
    "gpt2": Family(
        fields=_SHARED
        | {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
            "attention_dropout": "attn_pdrop",
            "residual_dropout": "resid_pdrop",
            "embedding_dropout": "embd_pdrop",
        },
        modules={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers.{i}.input_layernorm": "transformer.h.{i}.ln_1",
            "model.layers.{i}.self_attn.q_proj": "transformer.h.{i}.attn.c_attn",
            "model.layers.{i}.self_attn.k_proj": "transformer.h.{i}.attn.c_attn",
            "model.layers.{i}.self_attn.v_proj": "transformer.h.{i}.attn.c_attn",
            "model.layers.{i}.self_attn.o_proj": "transformer.h.{i}.attn.c_proj",
            "model.layers.{i}.post_attention_layernorm": "transformer.h.{i}.ln_2",
            "model.layers.{i}.mlp.up_proj": "transformer.h.{i}.mlp.c_fc",
            "model.layers.{i}.mlp.down_proj": "transformer.h.{i}.mlp.c_proj",
            "model.norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        constants={
            "norm_type": "layer",
            "gated_mlp": False,
            "learned_positions": True,
            "attention_bias": True,
            "mlp_bias": True,
            "padding_is_trained": True,
        },
        supported={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        transposed=frozenset({"c_attn", "c_proj", "c_fc"}),
    ),
    "gpt_neox": Family(
        fields=_ROTARY
        | {
            "norm_eps": "layer_norm_eps",
            "attention_bias": "attention_bias",
            "parallel_residual": "use_parallel_residual",
            "residual_dropout": "hidden_dropout",
            "embedding_dropout": "hidden_dropout",
        },
        modules={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers.{i}.input_layernorm": "gpt_neox.layers.{i}.input_layernorm",
            "model.layers.{i}.self_attn.q_proj": "gpt_neox.layers.{i}.attention.query_key_value",
            "model.layers.{i}.self_attn.k_proj": "gpt_neox.layers.{i}.attention.query_key_value",
            "model.layers.{i}.self_attn.v_proj": "gpt_neox.layers.{i}.attention.query_key_value",
            "model.layers.{i}.self_attn.o_proj": "gpt_neox.layers.{i}.attention.dense",
            "model.layers.{i}.post_attention_layernorm": "gpt_neox.layers.{i}.post_attention_layernorm",
            "model.layers.{i}.mlp.up_proj": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
            "model.layers.{i}.mlp.down_proj": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "lm_head",
        },
        constants={"norm_type": "layer", "gated_mlp": False, "mlp_bias": True, "padding_is_trained": True},
        fused_by_head=True,
        partial_rotary=True,
    ),
}

_AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "embed_positions": ("positions", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "o_correction": ("hidden", "heads"),
    "down_correction": ("hidden", "mlp"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "down_proj": ("hidden", "mlp"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "score": ("labels", "hidden"),
    "router": ("targets", "hidden"),
}
MODULES = tuple(_AXES)  # the last part of the name of every module of ours that has weights
ELASTIC = ("hidden", "mlp", "heads", "kv_heads", "targets")
_FUSED = ("q_proj", "k_proj", "v_proj")
_LAYER_NUMBER = re.compile(r"(?<=\blayers\.)\d+")


def axes(name: str) -> tuple[str, ...]:
    """Name what each dimension of one of our tensors counts: an axis of `ELASTIC`, or what never shrinks."""
    *_, module, kind = name.split(".")
    output, *inputs = _AXES[module]
    if kind in ("up", "down"):  # of `corrections.LowRankCorrection`
        return (output, "rank") if kind == "up" else ("rank", *inputs)
    return (output,) if kind == "bias" else (output, *inputs)


def is_shared(name: str) -> bool:
    """Whether the parent has the tensor of this name too: it is neither of a router nor of a correction."""
    return not {"router", "corrections"} & {*name.split(".")}


def layer_of(name: str) -> int | None:
    """The layer number in the name of a module or tensor of ours."""
    found = _LAYER_NUMBER.search(name)
    return None if found is None else int(found[0])


def at_layer(name: str, number: int | str) -> str:
    """A name with another layer number."""
    return _LAYER_NUMBER.sub(str(number), name)


def family_of(model_type: str, argument: str = "parent") -> Family:
    """The tables of a family; refuses an architecture, the value of `argument`, that is not supported."""
    if model_type not in FAMILIES:
        rule = f"The supported families are {', '.join(FAMILIES)}."
        raise invalid(argument, model_type, rule, "Use a parent of one of these architectures.")
    return FAMILIES[model_type]


# ------------------------------------------------------------------------------------------------------ names


def _template(name: str) -> tuple[str, str]:
    """Module, with `{i}` for the layer, and kind (`weight` or `bias`) of one of our tensors."""
    module, _, kind = name.rpartition(".")
    return at_layer(module, "{i}"), kind


def stock_name(family: Family, name: str, layer: int | None = None) -> str:
    """The stock name of one of our tensors, at stock layer `layer` (default: the same layer)."""
    module, kind = _template(name)
    return f"{family.modules[module]}.{kind}".format(i=layer_of(name) if layer is None else layer)


def by_stock_name(family: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """Stock names -> those of our tensors that each holds: one, or q, k and v."""
    result = defaultdict(list)
    for name in names:
        result[stock_name(family, name)].append(name)
    return dict(result)


# ---------------------------------------------------------------------------------------------------- tensors


def from_stock(family: Family, name: str, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of our tensor `name` in the stock tensor that holds it; heads stay in the parent's order."""
    module, kind = _template(name)
    stock = family.modules[module]
    if kind == "weight" and stock.rpartition(".")[2] in family.transposed:
        tensor = tensor.t()
    if list(family.modules.values()).count(stock) > 1:
        part = _FUSED.index(module.rpartition(".")[2])
        tensor = tensor.unflatten(0, (heads if family.fused_by_head else 1, 3, -1))[:, part].flatten(0, 1)
    return tensor


def to_stock(family: Family, stock: str, tensors: list[torch.Tensor], heads: int) -> torch.Tensor:
    """The stock tensor `stock` of ours: the reverse of `from_stock`, q, k and v in this order."""
    tensor = tensors[0]
    if len(tensors) > 1:
        groups = heads if family.fused_by_head else 1
        tensor = torch.stack([part.unflatten(0, (groups, -1)) for part in tensors], dim=1).flatten(0, 2)
    *_, module, kind = stock.split(".")
    tensor = tensor.t() if kind == "weight" and module in family.transposed else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def stored_heads(heads: int, kv_heads: int) -> list[int]:
    """For each stored position, the head that a stock model has there.

    Stock models are group-major, head `g * R + r`; ours are rank-major, position `r * G + g`, so that the leading
    positions hold the same number of heads of every group.
    """
    ranks = heads // kv_heads
    return [group * ranks + rank for rank in range(ranks) for group in range(kv_heads)]


def head_rows(order: Sequence[int] | torch.Tensor, head_dim: int) -> torch.Tensor:
    """Indices of the rows (or columns) of the heads in `order`."""
    heads = torch.as_tensor(order, device="cpu")
    return (heads[:, None] * head_dim + torch.arange(head_dim, device="cpu")).flatten()
