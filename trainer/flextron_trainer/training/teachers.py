"""Teachers: which ones a model can learn from, and their hidden states of a batch."""

from typing import Any

import torch
from transformers.utils import logging

from modeling_flextron.errors import invalid
from modeling_flextron.families import FAMILIES

from ..data import check_tokens, known_tokenizer
from ..losses import Teacher

logger = logging.get_logger(__name__)
SAME = "Teach with the parent, or with another model of the same tokenizer."


def prepare_teacher(teacher: Any, model: Any, tokenizer: Any, device: torch.device) -> Any:
    """Check a teacher and put it on the device of the run, unless it was put somewhere already.

    Args:
        teacher, model, tokenizer: as in `check_vocabulary`.

    Raises:
        ValueError: it has another tokenizer or an unknown architecture, or is the model itself.
    """
    check_vocabulary(teacher, model, tokenizer)
    check_architecture("teacher", teacher)
    if teacher is model:
        remedy = "Pass teacher='self' to learn from the full network of the same step."
        raise invalid("teacher", type(teacher).__name__, "It is the model that is trained.", remedy)
    # On another GPU it was put on purpose, and some quantized models refuse to be moved.
    placed = teacher.device.type != "cpu" or getattr(teacher, "hf_quantizer", None) is not None
    return (teacher if placed else teacher.to(device)).eval()


def check_architecture(argument: str, teacher: Any) -> None:
    """Refuse a teacher whose hidden states and output layer are not known to make its logits.

    Raises:
        ValueError: an unknown architecture.
    """
    if teacher.config.model_type not in (*FAMILIES, "flextron"):
        rule = f"The supported families are {', '.join(FAMILIES)}."
        raise invalid(argument, teacher.config.model_type, rule, "Teach with the parent.")


def check_documents(teacher: Any) -> None:
    """Refuse a teacher that would not keep apart the documents in a batch of several rows.

    Raises:
        ValueError: a stock model with flash attention.
    """
    kind = str(teacher.config._attn_implementation)
    if "flash" in kind and teacher.config.model_type in FAMILIES:
        rule = "A stock teacher keeps the documents of a block apart in batches of one row only with it."
        remedy = "Use batches of 1 and `gradient_accumulation_steps`, or load the teacher with 'sdpa'."
        raise invalid("attn_implementation", kind, rule, remedy)


@torch.no_grad()
def read_by_teacher(teacher: Any, inputs: dict[str, Any], vocab_size: int, padding: int | None) -> Teacher:
    """Run a teacher on a batch.

    Args:
        teacher: As `prepare_teacher` returned it; an elastic one runs at its current budget.
        inputs: Of the model that it teaches.
        vocab_size: Tokens of that model.
        padding: Its id of padding.

    Returns:
        Hidden states and output weights, where the inputs are.

    Raises:
        ValueError: text with tokens that the teacher does not have.
    """
    here = inputs["input_ids"].device
    kept = ("input_ids", "attention_mask", "position_ids")
    inputs = {key: inputs[key].to(teacher.device) for key in kept if key in inputs}
    if teacher.config.vocab_size < vocab_size:
        inputs = readable(inputs, teacher.config.vocab_size, padding)
    if teacher.config.model_type == "flextron":
        inputs["flextron_budget"] = teacher.subnetwork
    states = teacher.base_model(**inputs, use_cache=False).last_hidden_state
    weight = teacher.get_output_embeddings().weight[:, : states.shape[-1]]
    return Teacher(states.to(here), weight.to(here))


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
    theirs = known_tokenizer(teacher.name_or_path) if hasattr(tokenizer, "get_added_vocab") else None
    if theirs is None:
        if sizes[0] != sizes[1]:
            logger.warning(
                f"The teacher has {sizes[0]} tokens and the model {sizes[1]}: the first {min(sizes)} are compared. That"
                " their tokenizers are the same was not checked, because one of them is not known."
            )
        return
    check_tokens("teacher", teacher.name_or_path, theirs, tokenizer, SAME)


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
