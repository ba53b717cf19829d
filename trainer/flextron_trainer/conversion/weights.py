"""Brings the weights of a parent into an elastic model, tensor by tensor, and sorts their units in place."""

import copy
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.errors import invalid
from modeling_flextron.families import axes, by_stock_name, family_of, from_stock, layer_of
from modeling_flextron.permutation import PARTS, Permutation

from .importance import Importance
from .parents import tensor_of
from .places import Place


@torch.no_grad()
def take(
    parent: PreTrainedModel,
    config: FlextronConfig,
    release: bool,
    place: Place | None = None,
    dtype: torch.dtype | str | None = None,
) -> FlextronForCausalLM:
    """An elastic model with the parent's weights in the parent's order, heads rank-major.

    Args:
        release: Empty each of the parent's tensors as soon as it is taken.
        place: Where the weights go; None for memory.
        dtype: Another one than that of the parent.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    family, start = family_of(config.base_model_type), Permutation.unsorted(config)
    elastic, names = unfilled(config, dtype or parent.dtype)
    theirs = dict(parent.state_dict(keep_vars=True))
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    for stock, ours in tqdm(by_stock_name(family, names).items(), desc="Converting", unit="tensor"):
        source = theirs.pop(stock, None)
        if source is None:
            rule = f"It has no tensor {stock!r}."
            raise invalid("parent", type(parent).__name__, rule, "Use an unmodified model of a supported family.")
        source = tensor_of(parent, stock, source)
        for name in ours:
            view = from_stock(family, name, source.detach(), config.num_attention_heads)
            tensor = start.to_ours(view, axes(name), layer_of(name))
            if place is not None:
                tensor = place(tensor if dtype is None else tensor.to(dtype))
            elif tensor is view and (len(ours) > 1 or not release or not view.is_contiguous()):
                tensor = view.clone(memory_format=torch.contiguous_format)
            put_tensor(elastic, name, tensor)
        if release:
            source.data = source.new_empty(0)
    if theirs:
        rule = f"It has tensors that the family does not: {', '.join(sorted(theirs)[:3])}."
        raise invalid("parent", type(parent).__name__, rule, "Use an unmodified model of a supported family.")
    elastic.tie_weights()
    elastic.generation_config = copy.deepcopy(parent.generation_config)
    elastic.permutation = start
    return elastic.eval()


def unfilled(config: FlextronConfig, dtype: torch.dtype) -> tuple[FlextronForCausalLM, list[str]]:
    """A model without values, and the names of the tensors that want some: a tied output layer has none of its own."""
    with no_init_weights():
        elastic = FlextronForCausalLM._from_config(config, dtype=dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return elastic, [name for name in elastic.state_dict() if name not in tied]


def put_tensor(elastic: FlextronForCausalLM, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor, which is not copied, into a model."""
    module, _, kind = name.rpartition(".")
    setattr(elastic.get_submodule(module), kind, torch.nn.Parameter(tensor))


def order_since(earlier: Permutation, later: Permutation) -> Permutation:
    """From one order of units to another: what to do with tensors that are in the `earlier` one."""
    parts: dict[str, Any] = {
        part: tuple(
            before.argsort()[order] for before, order in zip(getattr(earlier, part), getattr(later, part), strict=True)
        )
        for part in PARTS
    }
    return replace(later, hidden=earlier.hidden.argsort()[later.hidden], **parts)


@torch.no_grad()
def permute(
    elastic: FlextronForCausalLM, scores: Importance, place: Place | None = None, *, progress: bool = True
) -> None:
    """Sort every axis that can shrink by importance, one tensor at a time; the function stays the same.

    Args:
        place: Where the sorted ones go; None for memory.
        progress: Show a bar.
    """
    assert elastic.permutation is not None
    permutation = _sorted(elastic.config, elastic.permutation, scores)
    change = order_since(elastic.permutation, permutation)
    named = list(elastic.named_parameters())
    for name, parameter in tqdm(named, desc="Permuting", unit="tensor", disable=not progress):
        tensor = change.to_ours(parameter.data, axes(name), layer_of(name))
        parameter.data = tensor if place is None or tensor is parameter.data else place(tensor)
    elastic.permutation = permutation


def _sorted(config: FlextronConfig, start: Permutation, scores: Importance) -> Permutation:
    """The permutation by scores; axes that have one size stay in the order of the parent."""
    kv_heads = config.num_key_value_heads
    orders: dict[str, Any] = {}
    if len(config.choices("hidden")) > 1:
        orders["hidden"] = _descending(scores.hidden)
    if len(config.choices("mlp")) > 1:
        orders["mlp"] = tuple(map(_descending, scores.mlp))
    if len(config.choices("heads")) > 1:
        ranked = (ranked_heads(layer, kv_heads) for layer in scores.heads)
        orders["heads"] = tuple(torch.tensor(heads, device="cpu") for heads in ranked)
        if kv_heads == config.num_attention_heads:
            orders["kv_heads"] = orders["heads"]
    return replace(start, **orders, conversion="")


def _descending(scores: torch.Tensor) -> torch.Tensor:
    return scores.cpu().argsort(descending=True, stable=True)


def ranked_heads(scores: torch.Tensor, kv_heads: int) -> list[int]:
    """The parent's heads in stored order: the best of every group, then the second best of every group, ..."""
    if kv_heads == len(scores):  # MHA: heads are free to change places
        return scores.argsort(descending=True, stable=True).tolist()
    ranks = scores.view(kv_heads, -1).argsort(dim=1, descending=True, stable=True)
    heads = ranks + torch.arange(kv_heads)[:, None] * ranks.shape[1]
    return heads.T.flatten().tolist()
