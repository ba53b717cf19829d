"""The kernels of flash attention in plain products, for transformers to call on a CPU."""

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils


def attend(q, k, v, softmax_scale, causal, window_size) -> torch.Tensor:
    """Queries `[S, H, E]` on keys and values `[S', G, E]`; the last query is at the last key."""
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    far = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))  # of a key, behind the query if < 0
    hidden = (far > 0) & causal
    if window_size[0] >= 0:
        hidden |= far < -window_size[0]
    weights = torch.einsum("qhe,khe->hqk", q, k) * softmax_scale
    return torch.einsum("hqk,khe->qhe", weights.masked_fill(hidden, -torch.inf).softmax(-1), v)


def whole(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """`flash_attn_func`: `[B, S, H, E]`."""
    return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])


def parts(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """`flash_attn_varlen_func`: `[N, H, E]`, texts one after the other."""
    queries, keys = ([*map(int, ends)] for ends in (cu_seqlens_q, cu_seqlens_k))
    output = torch.zeros_like(q)
    for i in range(len(queries) - 1):
        own, read = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
        output[own] = attend(q[own], k[read], v[read], softmax_scale, causal, window_size)
    return output


def pages(
    q, k_cache, v_cache, k, v, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    """`flash_attn_with_kvcache`: one query `[B, 1, H, E]` of each text, its keys in pages `[pages, tokens, G, E]`."""
    output = []
    for row, length in enumerate(cache_seqlens.tolist()):
        page, place = block_table[row, length // k_cache.shape[1]], length % k_cache.shape[1]
        k_cache[page, place], v_cache[page, place] = k[row, 0], v[row, 0]
        used = block_table[row, : length // k_cache.shape[1] + 1].long()
        keys, values = (cache[used].flatten(0, 1)[: length + 1] for cache in (k_cache, v_cache))
        output.append(attend(q[row], keys, values, softmax_scale, causal, window_size))
    return torch.stack(output)


@pytest.fixture
def flash(monkeypatch):
    """Let transformers find these kernels; `model.config._attn_implementation = "flash_attention_2"` then uses them."""
    kernels = whole, parts, pages, utils._pad_input, utils._unpad_input
    options = utils._lazy_define_process_function(parts), utils._lazy_define_process_function(pages)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (kernels, options))
