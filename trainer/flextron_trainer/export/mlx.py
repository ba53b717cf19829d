"""One size as a folder for mlx-lm (`mlx_lm.generate --model folder`), whose layers may differ; no mlx is needed for it.

It is written as mlx-lm's `openelm`, which has sizes for every layer: a LLaMA without biases, with norms of queries and
keys where the parent has them.
"""

import os
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from modeling_flextron import FlextronConfig
from modeling_flextron.checkpoint import write_beside
from modeling_flextron.errors import invalid
from modeling_flextron.extraction import stock_tensors
from modeling_flextron.families import layer_of
from modeling_flextron.subnetwork import SubNetwork, count_parameters, is_routed

from ..data import known_tokenizer
from ..files import write_json
from ..models import load_elastic, read_config

HELD = {
    "norm_type": "rms", "gated_mlp": True, "hidden_act": "silu", "parallel_residual": False, "learned_positions": False,
    "attention_bias": False, "attention_output_bias": False, "mlp_bias": False, "sliding_window": None,
    "rope_type": "default",
}  # fmt: skip
OUTSIDE = {"transformer.token_embeddings": "embed_tokens", "transformer.norm": "norm", "lm_head": "lm_head"}
# their module of a layer -> ours, one below the other
LAYER = {
    "attn_norm": "input_layernorm", "attn.qkv_proj": "q_proj k_proj v_proj", "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm", "attn.out_proj": "o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn.proj_1": "gate_proj up_proj", "ffn.proj_2": "down_proj",
}  # fmt: skip


def export_mlx(
    source: str | os.PathLike, output: str | os.PathLike, budget: Any = None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a sub-network as an `openelm` of mlx-lm, in the dtype of the checkpoint, with the tokenizer.

    Args:
        source: Folder or Hub id of a causal Flextron model.
        output: Folder to write.
        budget: Which size; its layers may differ.
        trust_remote_code: Run the code of its tokenizer, where it brings some.

    Returns:
        `parameters` and the `architecture` that mlx-lm will run.

    Raises:
        ValueError: the model has what `openelm` has not, or the budget is one of token routing.
    """
    config = read_config(source, "model", FlextronConfig)
    subnetwork = config.resolve(budget)
    if is_routed(subnetwork):
        raise invalid("budget", budget, "mlx-lm has one size for all tokens.", "Name a static budget, such as 0.5.")
    found = {**config.to_dict(), **(config.rope_parameters or {})}
    for name, value in HELD.items():
        if found[name] != value:
            rule = f"The models of mlx-lm whose layers may differ have {name} {value!r}."
            remedy = "Use `flextron export --dense`, with `--pad` where layers differ: mlx-lm reads most stock models."
            raise invalid(name, found[name], rule, remedy)
    model = load_elastic(source, flextron_budget=subnetwork.to_dict())
    with write_beside(output) as folder:
        save_torch_state_dict(openelm_tensors(model), folder)
        write_json(folder / "config.json", openelm_config(config, subnetwork))
        model.generation_config.save_pretrained(folder)
        if (tokenizer := known_tokenizer(source, trust_remote_code=trust_remote_code)) is not None:
            tokenizer.save_pretrained(folder)
    return {"parameters": count_parameters(config, subnetwork), "architecture": "openelm"}


def openelm_config(config: FlextronConfig, subnetwork: SubNetwork) -> dict[str, Any]:
    """The `config.json` that mlx-lm reads for a sub-network."""
    return {
        "model_type": "openelm",
        "vocab_size": config.vocab_size,
        "model_dim": subnetwork.hidden,
        "head_dim": config.head_dim,
        "num_transformer_layers": len(subnetwork.layers),
        "num_query_heads": list(subnetwork.heads),
        "num_kv_heads": [config.kv_heads(heads) for heads in subnetwork.heads],
        "ffn_multipliers": [mlp / subnetwork.hidden for mlp in subnetwork.mlp],
        "ffn_dim_divisor": 1,  # they are not rounded
        "ffn_with_glu": True,
        "normalize_qk_projections": config.qk_norm,
        "share_input_output_layers": config.tie_word_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_freq_constant": config.rope_parameters["rope_theta"],
        "max_context_length": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def openelm_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of all that is in memory, as mlx-lm names and joins them."""
    found: dict[tuple[int | None, str], torch.Tensor] = {
        (layer_of(name), name.split(".")[-2]): tensor for name, tensor in stock_tensors(model, model.built, model.built)
    }
    tensors = {f"{theirs}.weight": found[None, ours] for theirs, ours in OUTSIDE.items() if (None, ours) in found}
    for layer in range(len(model.built.layers)):
        for theirs, ours in LAYER.items():
            parts = [found[layer, module] for module in ours.split() if (layer, module) in found]
            if parts:  # else a norm that the parent does not have
                tensors[f"transformer.layers.{layer}.{theirs}.weight"] = torch.cat(parts)
    return tensors
