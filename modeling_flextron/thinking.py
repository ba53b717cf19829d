"""Small thinks, large answers: a text whose budget changes where its thinking ends.

A reasoning model writes its thoughts, a token that ends them, and an answer. Which size writes the next token follows
from the tokens so far, so a call needs no state. The idea: Star Elastic (arXiv 2511.16664).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .caches import check_cache
from .errors import invalid
from .subnetwork import SubNetwork

PARTS = ("thinking", "answer")
ENDS = ("</think>", "[/THINK]", "</thinking>", "</seed:think>", "<|END_THINKING|>")  # of common chat templates
_EXAMPLE = 'Pass for instance {"thinking": 0.5, "answer": 1}'


def is_phased(budget: Any) -> bool:
    """Whether a budget is one for thinking and one for the answer, and not the sizes of a sub-network."""
    return isinstance(budget, Phases) or (isinstance(budget, Mapping) and any(part in budget for part in PARTS))


@dataclass(frozen=True, eq=False)  # every text has its own, as its thinking ends by itself
class Phases:
    """The sizes that write one text.

    Args:
        thinking, answer: The sub-networks of the two parts.
        end: The token that ends the thinking; what follows it is written by `answer`.
        begin: Tokens of the prompt, in which other ends may be.
    """

    thinking: SubNetwork
    answer: SubNetwork
    end: int
    begin: int = 0

    def behind(self, prompt: torch.Tensor | None, tokenizer: Any = None) -> "Phases | SubNetwork":
        """What writes the text behind a prompt: tokens or embeddings `[1, S, ...]`, or None.

        Returns:
            These phases, or the sub-network of the answer where the prompt ends with the end of its thinking. White
            space between only a tokenizer can tell.
        """
        if prompt is None or prompt.is_floating_point():
            return self
        ends = (prompt[0] == self.end).nonzero()
        rest = prompt[0, int(ends[-1]) + 1 :] if len(ends) else prompt[0]
        if len(ends) and (len(rest) == 0 or (tokenizer is not None and not tokenizer.decode(rest).strip())):
            return self.answer
        return replace(self, begin=prompt.shape[1])

    def at(self, ids: torch.Tensor) -> SubNetwork:
        """The sub-network that continues a text `[1, S]`."""
        return self.answer if (ids[:, self.begin :] == self.end).any() else self.thinking

    def must_read_again(self, ids: torch.Tensor, cache: Any, config: Any, attention_mask: Any) -> bool:
        """Whether the answer begins behind these tokens `[1, S]`, and cannot go on with what the thinking kept."""
        written = ids[0, self.begin :] == self.end
        if cache is None or not written[-1:].any() or written[:-1].any():
            return False
        try:
            check_cache(cache, config, self.answer, attention_mask)
        except ValueError:
            return cache.get_seq_length() == ids.shape[1] - 1  # else it was made of more than these tokens
        return False

    def keeps_kv_heads(self, config: Any) -> bool:
        """Whether both parts have as many KV heads in every layer that both run."""
        thinking, answer = (dict(zip(part.layers, part.heads, strict=True)) for part in (self.thinking, self.answer))
        both = thinking.keys() & answer.keys()
        return all(config.kv_heads(thinking[layer]) == config.kv_heads(answer[layer]) for layer in both)


def read_phases(model: Any, budget: Any, tokenizer: Any = None) -> Phases:
    """The phases that a budget such as `{"thinking": 0.5, "answer": 1}` means; `"end"` may name the token between.

    Raises:
        ValueError: a part is missing or means nothing here, or the token is not known.
    """
    if isinstance(budget, Phases):
        return budget
    if not set(PARTS) <= set(budget) <= {*PARTS, "end"}:
        rule = "It has a budget for `thinking` and one for the `answer`, and may have the `end` of the thinking."
        raise invalid("flextron_budget", budget, rule, f"{_EXAMPLE}.")
    end = budget.get("end")
    if isinstance(end, bool) or not isinstance(end, int):
        end = _end_of_thinking(budget, end, tokenizer)
    if not 0 <= end < model.config.vocab_size:
        rule = f"Its `end` is none of the {model.config.vocab_size} tokens of the model."
        raise invalid("flextron_budget", budget, rule, 'Pass the id of a token, such as "end": 151668.')
    return Phases(model.resolve_budget(budget["thinking"]), model.resolve_budget(budget["answer"]), end)


def _end_of_thinking(budget: Any, end: Any, tokenizer: Any) -> int:
    """The token that ends the thinking: `end`, or what a tokenizer or its chat template says."""
    remedy = f'{_EXAMPLE} beside `tokenizer=`, or with the token between, "end": ID.'
    if tokenizer is None:
        raise invalid("tokenizer", None, "Without it nobody knows which token ends the thinking.", remedy)
    vocabulary, template = tokenizer.get_vocab(), str(getattr(tokenizer, "chat_template", None) or "")
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    said = [fields[name].get("close") for name in ("reasoning_content", "thinking") if name in fields]
    texts = [end] if end is not None else [*said, *(text for text in ENDS if text in template)]
    for text in texts:
        if text in vocabulary:
            return vocabulary[text]
    if texts:
        rule = f"The thinking ends with {texts[0]!r}, which is no token of this tokenizer."
    else:
        rule = f"The chat template of this tokenizer has no end of thinking that is known, such as {ENDS[0]!r}."
    raise invalid("flextron_budget", budget, rule, remedy)


def refuse_company(each: Iterable[Phases], config: Any, given: Mapping[str, Any], *configs: Any) -> None:
    """Refuse what the size cannot change in: several tokens or texts at once, and a cache of one shape.

    Args:
        given: Keywords of `generate`, which go before
        configs: the generation configs, in this order.
    """

    def said(name: str) -> Any:
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    for name in ("draft_budget", "assistant_model", "prompt_lookup_num_tokens", "use_mtp"):
        if value := said(name):
            rule = "Drafted tokens would go beyond the end of the thinking, where the size changes."
            shown = "given" if name == "assistant_model" else value
            raise invalid(name, shown, rule, "Leave it out, or make one call for each part.")
    for name in ("num_beams", "num_return_sequences"):
        if (value := said(name)) not in (None, 1):
            rule = "Each of them would end its thinking elsewhere, and they run together."
            raise invalid(name, value, rule, "Leave it out; for several samples pass the prompt as often in the batch.")
    for name in ("cache_implementation", "past_key_values"):
        value = said(name)
        static = "static" in value if isinstance(value, str) else getattr(value, "is_compileable", False)
        if static and not all(phases.keeps_kv_heads(config) for phases in each):
            rule = "A static cache has one number of KV heads in a layer, and the two parts of the text differ in it."
            shown = value if isinstance(value, str) else type(value).__name__
            raise invalid(name, shown, rule, "Leave it out, or pass sizes with the same numbers of heads.")
