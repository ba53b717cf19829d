"""Stock architectures: how each writes what our decoder holds, read in both directions.

`convert` (parent -> ours) and `extract` (ours -> stock) use the same tables: one of config fields, one of weight
names, and the order in which query heads are stored. Which axis of the sub-network a dimension of a weight belongs
to is a property of our decoder, in `axes`.
"""

import copy
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .errors import invalid
from .subnetwork import SubNetwork


@dataclass(frozen=True)
class Family:
    """A stock architecture.

    Args:
        fields: Our config field -> the field of the stock config, where the value is the same.
        weights: Our tensor name -> the stock name; `{i}` stands for the layer. A bias or weight that a model
            does not have is simply absent from it.
    """

    fields: dict[str, str]
    weights: dict[str, str]


_SHARED_FIELDS = (
    "vocab_size hidden_act max_position_embeddings initializer_range use_cache pad_token_id bos_token_id eos_token_id"
    " tie_word_embeddings rope_parameters head_dim attention_dropout attention_bias mlp_bias"
)
_PROJECTIONS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
_LAYER_NORMS = "model.layers.{i}.input_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"
_LLAMA_WEIGHTS = (
    "model.embed_tokens.weight",
    *_LAYER_NORMS,
    *(f"model.layers.{{i}}.{name}.{kind}" for name in _PROJECTIONS.split() for kind in ("weight", "bias")),
    "model.norm.weight",
    "lm_head.weight",
)

FAMILIES = {
    "llama": Family(
        fields={name: name for name in _SHARED_FIELDS.split()} | {"norm_eps": "rms_norm_eps"},
        weights={name: name for name in _LLAMA_WEIGHTS},
    ),
}

_AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "down_proj": ("hidden", "mlp"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
}


def axes(name: str) -> tuple[str, ...]:
    """What each dimension of one of our tensors counts: `hidden`, `mlp`, `heads`, `kv_heads` or `vocab`."""
    *_, module, kind = name.split(".")
    return _AXES[module][:1] if kind == "bias" else _AXES[module]


def layer_of(name: str) -> int | None:
    """The layer number in a tensor name of ours."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def family_of(model_type: str) -> Family:
    """The tables of a family.

    Raises:
        ValueError: the architecture is not supported.
    """
    if model_type not in FAMILIES:
        rule = f"The supported families are {', '.join(FAMILIES)}."
        raise invalid("parent", model_type, rule, "Use a parent of one of these architectures.")
    return FAMILIES[model_type]


def stock_name(family: Family, name: str, layer: int | None = None) -> str:
    """The stock name of one of our tensors, at stock layer `layer` (default: the same layer)."""
    ours = layer_of(name)
    template = name if ours is None else name.replace(f"layers.{ours}.", "layers.{i}.", 1)
    return family.weights[template].format(i=ours if layer is None else layer)


def stored_heads(heads: int, kv_heads: int) -> list[int]:
    """For each stored position, the head that a stock model has there.

    Stock models are group-major, head `g * R + r`; ours are rank-major, position `r * G + g`, so that the leading
    positions hold the same number of heads of every group.
    """
    ranks = heads // kv_heads
    return [group * ranks + rank for rank in range(ranks) for group in range(kv_heads)]


def head_rows(order: list[int], head_dim: int) -> torch.Tensor:
    """Indices of the rows (or columns) of the heads in `order`."""
    return (torch.tensor(order)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def fits_stock(subnetwork: SubNetwork) -> bool:
    """Whether a stock class can hold a sub-network: the same sizes in every layer, and heads that divide `hidden`."""
    return subnetwork.uniform and subnetwork.hidden % subnetwork.heads[0] == 0


def stock_config(config, subnetwork: SubNetwork) -> PreTrainedConfig:
    """The config of the stock model that computes what a sub-network computes.

    Raises:
        ValueError: no stock config has these sizes.
    """
    family = family_of(config.base_model_type)
    if not fits_stock(subnetwork):
        rule = f"`{config.base_model_type}` has the same sizes in every layer, and a head count that divides `hidden`."
        legal = [heads for heads in config.choices("heads") if subnetwork.hidden % heads == 0]
        remedy = f"Use one of {legal} heads in every layer, or save these sizes as a Flextron model."
        raise invalid("budget", subnetwork.to_dict(), rule, remedy)
    heads = subnetwork.heads[0]
    values = {theirs: copy.deepcopy(getattr(config, ours)) for ours, theirs in family.fields.items()}
    return AutoConfig.for_model(
        config.base_model_type,
        **values,
        hidden_size=subnetwork.hidden,
        intermediate_size=subnetwork.mlp[0],
        num_hidden_layers=len(subnetwork.layers),
        num_attention_heads=heads,
        num_key_value_heads=config.kv_heads(heads),
        dtype=config.dtype,
    )


@torch.no_grad()
def extract(model, subnetwork: SubNetwork) -> PreTrainedModel:
    """Copy a sub-network into a stock model of the parent's family.

    Args:
        model: A `FlextronForCausalLM`.
        subnetwork: What to copy; the stock class must be able to hold it.

    Returns:
        The stock model in the dtype and on the device of `model`, in evaluation mode.
    """
    config, family = model.config, family_of(model.config.base_model_type)
    with no_init_weights():
        stock = AutoModelForCausalLM.from_config(stock_config(config, subnetwork), dtype=model.dtype)
    position: dict[int | None, int] = {layer: i for i, layer in enumerate(subnetwork.layers)}
    heads = subnetwork.heads[0]
    kv_heads = config.kv_heads(heads)
    sizes = {"hidden": subnetwork.hidden, "mlp": subnetwork.mlp[0], "vocab": config.vocab_size}
    sizes |= {"heads": heads * config.head_dim, "kv_heads": kv_heads * config.head_dim}
    stored = stored_heads(heads, kv_heads)
    group_major = head_rows([stored.index(head) for head in range(heads)], config.head_dim)

    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = layer_of(name)
        if layer is not None and layer not in position:
            continue
        for dim, axis in enumerate(axes(name)):
            tensor = tensor.narrow(dim, 0, sizes[axis])
            if axis == "heads" and kv_heads < heads:
                tensor = tensor.index_select(dim, group_major.to(tensor.device))
        tensors[stock_name(family, name, position.get(layer))] = tensor.clone(memory_format=torch.contiguous_format)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    missing, unexpected = stock.load_state_dict(tensors, strict=False, assign=True)
    stock.tie_weights()
    assert not unexpected and all(name in stock._tied_weights_keys for name in missing), (missing, unexpected)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.to(model.device).eval()
