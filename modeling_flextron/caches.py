"""Caches of keys and values: those of transformers, and those of engines that batch requests by pages.

An elastic model may skip layers, and one with a KV head for each query head runs fewer of them in a smaller
sub-network. What cannot be made to fit is refused.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils.generic import is_flash_attention_requested

from .errors import invalid
from .subnetwork import SubNetwork

PAGED = "paged|"  # begins the name of an attention function that reads the pages of an engine


def own_cache(cache: Any, config: Any) -> Cache | None:
    """A cache of transformers; None without one, and for that of an engine, which brings masks and positions along.

    Raises:
        ValueError: it is neither, or the attention function of `config` wants that of an engine.
    """
    paged = hasattr(cache, "update") and not isinstance(cache, Cache | dict)
    if config._attn_implementation.startswith(PAGED) and not paged:
        rule = "It is for `generate_batch` alone, and would let every token see all others here."
        raise invalid("attn_implementation", config._attn_implementation, rule, "Pass 'eager' or 'sdpa'.")
    if cache is None or paged:
        return None
    if isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache):
        return cache
    remedy = "Pass for instance `DynamicCache(config=model.config)`."
    raise invalid("past_key_values", type(cache).__name__, "It is a `Cache` of a decoder alone.", remedy)


def check_cache(cache: Cache, config: Any, subnetwork: SubNetwork, attention_mask: Any) -> None:
    """Refuse a cache from which a sub-network would read what is not its own.

    Raises:
        ValueError: another sub-network filled it; it cannot skip layers; or its empty end would be taken for keys.
    """
    kind = config._attn_implementation
    if kind == "flex_attention" and cache.is_compileable:
        rule = "This attention function asks a static cache for its length when that has grown already."
        remedy = "Load the model with `attn_implementation='sdpa'`, or use a dynamic cache."
        raise invalid("past_key_values", type(cache).__name__, rule, remedy)
    if attention_mask is None and is_flash_attention_requested(config) and cache.is_compileable:
        rule = f"It is all that tells {kind!r} where the tokens in a static cache end."
        raise invalid("attention_mask", None, rule, "Pass ones for the tokens so far, or use a dynamic cache.")
    if getattr(cache, "offloading", False) and len(subnetwork.layers) < config.num_hidden_layers:
        rule = "It brings layers back to the device in turn, and this sub-network skips some."
        remedy = "Use a cache without offloading, or load the model at this budget, where nothing is left to skip."
        raise invalid("past_key_values", f"{type(cache).__name__}(offloading=True)", rule, remedy)
    filled = {i for i, layer in enumerate(cache.layers) if layer.is_initialized}
    if not filled:
        return
    # Empty layers do not count: a static cache may have them before it is filled. A compiled graph cannot ask.
    if filled != set(subnetwork.layers) and not torch.compiler.is_compiling():
        holding = [i for i in sorted(filled) if cache.layers[i].get_seq_length() > 0]
        if holding and holding != list(subnetwork.layers):
            rule = f"It was filled by the layers {holding}, and this sub-network runs {list(subnetwork.layers)}."
            remedy = "Keep the depth, or start again with the whole text and a new cache."
            raise invalid("past_key_values", type(cache).__name__, rule, remedy)
    if config.kv_heads(1) > 1:
        return  # a parent with groups has the same KV heads at every budget
    needed = {heads: config.kv_heads(heads) for heads in set(subnetwork.heads)}
    for i, heads in zip(subnetwork.layers, subnetwork.heads, strict=True):
        keys = cache.layers[i].keys if i in filled else None
        if keys is not None and keys.ndim == 4 and keys.shape[1] != needed[heads]:
            rule = f"It holds {keys.shape[1]} KV heads in layer {i}, and this sub-network has {needed[heads]}."
            remedy = "Keep the number of heads, or start again with the whole text and a new cache."
            raise invalid("past_key_values", type(cache).__name__, rule, remedy)


def most_tokens(cache: Any, seen: int | torch.Tensor, length: int) -> float:
    """The most tokens that a text can have which had `seen` in a cache and has `length` more; no look at the device."""
    if isinstance(cache, Cache):
        return seen + length if isinstance(seen, int) else cache.get_max_length()
    return length if cache is None else math.inf  # an engine does not say


def fill_skipped(cache: Cache, kept: tuple[int, ...]) -> None:
    """Give skipped sliding layers of a cache empty states, because assisted decoding crops every layer."""
    for i, layer in enumerate(cache.layers):
        if i not in kept and layer.is_sliding and getattr(layer, "keys", None) is None:
            layer.keys = cache.layers[kept[0]].keys[:, :, :0]
            layer.values = cache.layers[kept[0]].values[:, :, :0]


def update_pages(cache: Any, key: torch.Tensor, value: torch.Tensor, attention: Any, options: dict[str, Any]):
    """Put keys and values `[1, G, S, E]` into the cache of an engine; those `[1, G, S', E]` that are read.

    Its pages have room for the same number of heads in every layer; zeros fill up what a sub-network does not have.

    Args:
        cache: Of continuous batching in transformers.
        attention: The module, whose config knows that number (of an engine it says it also where layers differ).
        options: Keywords of the attention function: of what is read, and for kernels that read pages the pages.
    """
    heads = key.shape[1]
    filling = (0, 0, 0, 0, 0, attention.config.num_key_value_heads - heads)
    key, value = nn.functional.pad(key, filling), nn.functional.pad(value, filling)
    key, value = cache.update(key, value, attention.layer_idx, kwargs=options)
    for pages in {"k_cache", "v_cache"} & options.keys():
        options[pages] = options[pages][:, :, :heads]
    return key[:, :heads], value[:, :heads]
