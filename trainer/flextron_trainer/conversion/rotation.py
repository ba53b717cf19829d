"""Turn the residual stream so that few channels hold most of it (SliceGPT, arXiv 2401.15024, section 3).

The axis `hidden` keeps leading channels, and in a trained model what matters is spread over all of them. An RMS norm
without weights only looks at the length of the stream, which no rotation changes. So the weights of the norms go into
the matrices that read behind them, and all matrices that read or write the stream are turned into the eigenvectors of
its second moments. The full network stays the same function, but for rounding; its leading channels are worth more.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_flextron.errors import invalid

from ..layerwise import digest


@torch.no_grad()
def rotate(model: Any, batches: Sequence[torch.Tensor]) -> str:
    """Turn the residual stream of a model, in place, into the principal axes that it has on some text.

    Embeddings that are tied to the output are untied: the output has the weights of the last norm in it. What was made
    for the channels of the parent, such as an adapter, does not fit the result.

    Args:
        model: A `FlextronForCausalLM` at full size, its channels in any order.
        batches: Token ids `[B, S]`.

    Returns:
        A short text that tells this rotation from others.

    Raises:
        ValueError: its norms take the mean of the stream away, which depends on the axes.
    """
    decoder = model.model
    check_rotation(model.config)
    axes = principal_axes(model, batches)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(decoder.embed_tokens.weight.detach().clone())
    _turn_readers(decoder.norm, [model.lm_head], axes)
    _replace(decoder.embed_tokens, "weight", decoder.embed_tokens.weight.double() @ axes)
    for layer in tqdm(decoder.layers, desc="Rotating", unit="layer"):
        attention, mlp = layer.self_attn, layer.mlp
        _turn_readers(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], axes)
        _turn_readers(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], axes)
        for writer in (attention.o_proj, mlp.down_proj):
            _replace(writer, "weight", axes.T @ writer.weight.double())
            if writer.bias is not None:
                _replace(writer, "bias", axes.T @ writer.bias.double())
    return digest([("axes", axes)])


def check_rotation(config: Any) -> None:
    """Refuse a model whose norms depend on the axes; see `rotate`."""
    if config.norm_type != "rms":
        rule = "Layer norms take the mean over the channels away, which is another one after a rotation."
        raise invalid("rotate", True, rule, "Leave it out for models with layer norms.")


@torch.no_grad()
def principal_axes(model: Any, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[D, D]` float64, orthogonal: a column for each direction of the residual stream, what holds most of it first.

    States of all tokens count alike, before and behind every layer, relative to their size.

    Args:
        model: A `FlextronForCausalLM` at full size.
        batches: Token ids `[B, S]`.
    """
    size, device = model.config.hidden_size, model.device
    total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def observe(kind: str, layer: int, *activations: torch.Tensor) -> None:
        if kind == "layer":  # what enters it and what leaves it
            for states in activations:
                rows = torch.nn.functional.rms_norm(states.float(), (size,)).flatten(0, -2)
                total.add_(rows.T @ rows)

    for batch in tqdm(batches, desc="Principal axes", unit="batch"):
        model.model(batch.to(device), observe=observe, use_cache=False)
    return torch.linalg.eigh(total).eigenvectors.flip(1)


def _turn_readers(norm: Any, matrices: Iterable[nn.Linear], axes: torch.Tensor) -> None:
    """Turn the matrices that read what a norm writes, and take its weights into them."""
    for matrix in matrices:
        _replace(matrix, "weight", matrix.weight.double() * norm.weight.double() @ axes)
    norm.weight.data.fill_(1)


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    parameter: Any = getattr(module, name)
    parameter.data = value.to(parameter.dtype)
