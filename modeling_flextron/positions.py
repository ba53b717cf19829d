"""Which tokens see each other: padding, several documents in a row, and positions that a model does not have."""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from .errors import invalid

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def real_tokens(attention_mask: Any, seen: int | torch.Tensor, length: int) -> torch.Tensor | None:
    """Where the `length` tokens behind those `seen` before are no padding, `[B, length]`; None when that is unknown."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    if isinstance(seen, int):
        return attention_mask[:, seen : seen + length].bool()
    place = torch.arange(length, device=seen.device) + seen
    return attention_mask[:, place.to(attention_mask.device)].bool()


def check_positions(position_ids: torch.Tensor, limit: int, most: float, given: bool) -> None:
    """Refuse positions, `given` by a caller or counted, beyond a table of `limit`; a text has at most `most` tokens."""
    # To read positions makes a GPU wait, so that is left out where there cannot be too many.
    if is_tracing(position_ids) or (most <= limit and position_ids.device.type != "cpu"):
        return
    for position in map(int, position_ids.aminmax()):
        if not 0 <= position < limit:
            rule = f"The model has {limit} learned positions."
            remedy = "Cut the text into shorter pieces, or write fewer tokens."
            name, value = ("position_ids", position) if given else ("input_ids", f"{position + 1} tokens")
            raise invalid(name, value, rule, remedy)


def documents(
    position_ids: torch.Tensor | None, attention_mask: Any, cache: Cache | None, use_cache: bool | None
) -> torch.Tensor | None:
    """Where each token of a row with several documents is in its own; None where no row has more than one.

    Raises:
        ValueError: some row has, and a cache is to continue it, or padding is amid a document.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    if attention_mask is not None and (
        not isinstance(attention_mask, torch.Tensor) or attention_mask.shape[1:] != position_ids.shape[1:]
    ):
        return None
    if is_tracing(position_ids):  # which cannot ask whether there are several, and then a cache means one
        return None if cache is not None or use_cache else places_in_documents(position_ids, attention_mask)
    if cache is not None and cache.get_seq_length() != 0:
        return None
    places = places_in_documents(position_ids, attention_mask)
    if places is not None and cache is not None:
        rule = "These position ids say that a row holds several documents, of which a cache could continue only one."
        raise invalid("past_key_values", type(cache).__name__, rule, "Pass each document in a row of its own.")
    return places


def places_in_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Where each token of `[B, S]` is in its document, padding being a document of its own for each token.

    Positions that do not follow each other part documents, as in transformers where there is no mask; behind padding,
    which positions may count or not, a document begins at 0.

    Returns:
        None where no row has two documents.

    Raises:
        ValueError: a row has several, and padding amid one.
    """
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    position_ids, place = position_ids.expand_as(real), torch.arange(real.shape[1], device=real.device)
    behind = nn.functional.pad(~real[:, :-1], (1, 0))  # padding
    step = nn.functional.pad(position_ids.diff(dim=-1), (1, 0))
    inner = real & (real.cumsum(-1) > 1)
    parted = inner & torch.where(behind, position_ids == 0, step != 1)
    if not is_tracing(parted):
        if not parted.any():
            return None
        if (inner & behind & ~parted).any():
            rule = "A row with several documents is padded between them only."
            raise invalid("attention_mask", "padding amid a document", rule, "Pass that document in a row of its own.")
    return place - torch.where(parted | behind | ~real, place, 0).cummax(-1).values


def attention_masks(
    config: Any, hidden_states: torch.Tensor, attention_mask: Any, cache: Cache | None, places: torch.Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the mask of every kind of layer, and keywords of the attention function that documents need.

    Args:
        attention_mask: That of a caller, or a dict of masks as `generate` prepares them, which stays.
        places: `[B, S]` of `documents`, whose masks take the place of the caller's; None for one text in a row.
    """
    masks = attention_mask
    if not isinstance(masks, dict):
        known = (attention_mask, cache) if places is None else (None, None, places)
        masks = {kind: MASKS[kind](config, hidden_states, *known) for kind in dict.fromkeys(config.layer_types)}
    if places is None or not is_flash_attention_requested(config):
        return masks, {}
    # Where documents begin in all rows one after the other.
    (queries, keys), (longest, _) = prepare_fa_kwargs_from_position_ids(places.expand(len(hidden_states), -1))
    ends = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys, "max_length_q": longest, "max_length_k": longest}
    return masks, ends
