"""NVIDIA's Minitron (`mcore_minitron` of nvidia-modelopt) on a LLaMA, on a CPU.

    FOLDER/minitron/bin/python benchmarks/peers/minitron.py PARENT OUT --calibration rows.npy --ratio 0.75 0.5

Megatron-Core runs the parent over the calibration rows, Minitron ranks neurons, heads and layers by their activations
and keeps the first. `--variant width` prunes MLP and heads, `mlp` the MLP only, `depth` layers, and the MLP for what is
left to cut. Heads: those of each KV group where heads share KV heads, otherwise heads with their KV heads.
"""

import contextlib
import os
import sys
import warnings

import torch
from shared import Parent, arguments, begin, mean_loss, write

warnings.filterwarnings("ignore")


def pretend_cuda() -> None:
    """Let Megatron-Core run in one process on a CPU; nothing numerical changes."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29556", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(environment)
    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    torch.distributed.all_gather_into_tensor = lambda to, x, group=None: to.copy_(x.reshape(to.shape))  # for scalars


pretend_cuda()
with contextlib.redirect_stdout(sys.stderr):
    import modelopt.torch.prune as mtp
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.transformer_config import TransformerConfig
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    parallel_state.initialize_model_parallel(1, 1)


@DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})  # modelopt knows only the fused one
class DynamicRMSNorm(_DynamicLayerNorm):
    def _setup(self, *, num_features):
        self._register_hparam("num_features", num_features)
        self._register_dynamic_attribute("weight", self._cut_to_active_features)
        self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)


def megatron(parent: Parent) -> GPTModel:
    """The parent in Megatron-Core."""
    c = parent.config
    off = ("bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion")
    config = TransformerConfig(
        num_layers=parent.layers, hidden_size=parent.hidden, ffn_hidden_size=parent.mlp, kv_channels=parent.head_dim,
        num_attention_heads=parent.heads, num_query_groups=parent.kv_heads, layernorm_epsilon=c["rms_norm_eps"],
        normalization="RMSNorm", activation_func=torch.nn.functional.silu, gated_linear_unit=True, hidden_dropout=0.0,
        attention_dropout=0.0, add_bias_linear=False, use_cpu_initialization=True, pipeline_dtype=torch.float32,
        persist_layer_norm=False, apply_rope_fusion=False, **dict.fromkeys(off, False),
    )  # fmt: skip
    theta = (c.get("rope_parameters") or c).get("rope_theta", 10000.0)
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), c["vocab_size"], c["max_position_embeddings"],
        position_embedding_type="rope", rotary_base=theta, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    missing = model.load_state_dict(to_megatron(parent), strict=False).missing_keys
    assert all("_extra_state" in key for key in missing), missing
    return model.eval()


OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
PLAIN = {
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
}


def to_megatron(parent: Parent) -> dict[str, torch.Tensor]:
    """Weights under Megatron's names: query, key and value fused by KV head, gate and up fused."""
    w = {"lm_head.weight": parent.weights["model.embed_tokens.weight"]} | parent.weights
    result = {theirs: w[ours] for ours, theirs in OUTSIDE.items()}
    for i in range(parent.layers):
        ours, theirs = f"model.layers.{i}.", f"decoder.layers.{i}."
        result |= {theirs + b: w[ours + a] for a, b in PLAIN.items()}
        groups = [w[f"{ours}self_attn.{x}_proj.weight"].unflatten(0, (parent.kv_heads, -1)) for x in "qkv"]
        result[theirs + "self_attention.linear_qkv.weight"] = torch.cat(groups, 1).flatten(0, 1)
        result[theirs + "mlp.linear_fc1.weight"] = torch.cat([w[f"{ours}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    return result


def from_megatron(model: GPTModel, depth: int, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Weights under the names of `LlamaForCausalLM`."""
    w = model.state_dict()
    result = {ours: w[theirs] for ours, theirs in OUTSIDE.items()}
    for i in range(depth):
        ours, theirs = f"model.layers.{i}.", f"decoder.layers.{i}."
        result |= {ours + a: w[theirs + b] for a, b in PLAIN.items()}
        fused = w[theirs + "self_attention.linear_qkv.weight"].unflatten(0, (kv_heads, -1))
        parts = fused.split([fused.shape[1] - 2 * head_dim, head_dim, head_dim], 1)
        result |= {f"{ours}self_attn.{x}_proj.weight": y.flatten(0, 1) for x, y in zip("qkv", parts, strict=True)}
        gate, up = w[theirs + "mlp.linear_fc1.weight"].chunk(2)
        result |= {ours + "mlp.gate_proj.weight": gate, ours + "mlp.up_proj.weight": up}
    return result


def logits(model: GPTModel, rows: torch.Tensor) -> torch.Tensor:
    length = rows.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # True: may not look there
    return model(rows, torch.arange(length).expand_as(rows), hidden)


def choices(parent: Parent, variant: str) -> list[dict[str, int]]:
    """What may be chosen beside the width of the MLP."""
    if variant == "mlp":
        return [{}]
    if variant == "depth":
        return [{"layers": n} for n in range(1, parent.layers + 1)]
    if parent.heads == parent.kv_heads:
        return [{"heads": n, "kv_heads": n} for n in range(1, parent.heads + 1)]
    return [
        {"heads": n, "kv_heads": parent.kv_heads} for n in range(parent.kv_heads, parent.heads + 1, parent.kv_heads)
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variant", choices=["width", "mlp", "depth"], default="width")
    options = parser.parse_args()
    parent, rows = begin(options)

    def calibrate(model: GPTModel) -> None:
        for batch in rows.split(32):
            logits(model, batch)

    names = {"mlp": "ffn_hidden_size", "heads": "num_attention_heads", "kv_heads": "num_query_groups"}
    space = {"megatron.core.models.gpt.GPTModel": {"ffn_hidden_size_divisor": 1, "hidden_size_divisor": 1}}
    for ratio in options.ratio:
        sizes = parent.uniform(ratio, options.grid, choices(parent, options.variant))
        target = {names.get(axis, "num_layers"): size for axis, size in sizes.items()}
        with contextlib.redirect_stdout(sys.stderr):
            model, _ = mtp.prune(
                megatron(parent), mode=[("mcore_minitron", space)], constraints={"export_config": target},
                dummy_input=None, config={"forward_loop": calibrate},
            )  # fmt: skip
        depth, kv_heads = sizes.get("layers", parent.layers), sizes.get("kv_heads", parent.kv_heads)
        weights = from_megatron(model, depth, kv_heads, parent.head_dim)
        loss = mean_loss(lambda batch, model=model: logits(model, batch), rows)
        write(
            options.out, parent, weights, sizes, distribution="nvidia-modelopt", ratio=ratio, loss=loss,
            peer=f"minitron-{options.variant}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
