"""Whether a teacher speaks of the same tokens as the model that it teaches, and what of a batch it can read."""

from typing import Any

import torch
from transformers.utils import logging

from modeling_flextron.errors import invalid

from ..data import load_tokenizer

logger = logging.get_logger(__name__)
SAME = "Teach with the parent, or with another model of the same tokenizer."


def check_vocabulary(teacher: Any, model: Any, tokenizer: Any) -> None:
    """Refuse a teacher of another tokenizer, where both are known.

    Their numbers of tokens may differ: some models are padded to round numbers, and tokens are added. Distillation
    compares the ids that both have.

    Args:
        teacher: A causal language model; its tokenizer is looked for where it was loaded from.
        model: What it is to teach.
        tokenizer: The `processing_class` of a trainer, or None.

    Raises:
        ValueError: the tokenizers mean different tokens by one id.
    """
    sizes = teacher.config.vocab_size, model.config.vocab_size
    theirs = _tokenizer_of(teacher) if hasattr(tokenizer, "get_added_vocab") else None
    if theirs is None:
        if sizes[0] != sizes[1]:
            logger.warning(
                f"The teacher has {sizes[0]} tokens and the model {sizes[1]}: the first {min(sizes)} are compared. That"
                " their tokenizers are the same was not checked, because one of them is not known."
            )
        return
    mine, others = _ordinary(tokenizer), _ordinary(theirs)
    for number in sorted(mine.keys() & others.keys()):
        if mine[number] != others[number]:
            rule = f"Token {number} is {others[number]!r} in its tokenizer and {mine[number]!r} in that of the model."
            raise invalid("teacher", teacher.name_or_path, rule, SAME)


def _tokenizer_of(teacher: Any) -> Any:
    try:
        return load_tokenizer(teacher.name_or_path) if teacher.name_or_path else None
    except ValueError:
        return None


def _ordinary(tokenizer: Any) -> dict[int, str]:
    """The tokens of a tokenizer without those that were added, which are renamed at will."""
    added = tokenizer.get_added_vocab()
    return {number: token for token, number in tokenizer.get_vocab().items() if token not in added}


def readable(inputs: dict[str, torch.Tensor], count: int, padding: int | None) -> dict[str, torch.Tensor]:
    """The inputs of a model as one with fewer tokens can read them: padding that it does not have is another token.

    Args:
        inputs: `input_ids`, and perhaps an `attention_mask`, which hides padding.
        count: Tokens of who reads.
        padding: The id of padding, for batches without a mask.

    Raises:
        ValueError: text with tokens that it does not have.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    unknown = ids >= count
    text = unknown if padding is None else unknown & (ids != padding)
    if mask is not None and mask.ndim == 2:
        text = text & mask.bool()
    if text.any():
        rule = f"It has {count} tokens, and the text has token {int(ids[text][0])}."
        raise invalid("teacher", f"{count} tokens", rule, SAME)
    return {**inputs, "input_ids": ids.masked_fill(unknown, 0)}
