"""Conversations, prompts with completions, and instructions: rows to token ids, and which of these are answers.

The formats are those of TRL (https://huggingface.co/docs/trl/dataset_formats), and instructions those of Alpaca. The
tokenizer's chat template writes a conversation; nothing here knows what it looks like.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError

from modeling_flextron.errors import invalid

FORMATS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = list[dict[str, Any]]
Document = tuple[list[int], list[bool]]  # token ids, and which of them are learned


def chat_columns(columns: Iterable[str]) -> tuple[str, ...] | None:
    """The columns that hold conversations, of the first of `FORMATS` that is whole; None where there are none."""
    held = set(columns)
    return next((names for names in FORMATS if held.issuperset(names)), None)


def documents_of(tokenizer: Any, row: Mapping[str, Any], at: str, assistant_only: bool = True) -> list[Document]:
    """A row as a model sees it in use.

    A conversation is one document, in which the answers are what the template marks (`{% generation %}`), or else what
    it writes for an assistant's message behind the prompt for one, up to the end of that turn. Where it writes earlier
    turns otherwise as soon as others follow (Qwen3 drops their thoughts), every answer is the end of a document of its
    own. A prompt and a completion that are strings are one text without a template, which ends as every text does.

    Args:
        tokenizer: With a chat template, unless prompt and completion are strings.
        row: With the columns of one of `FORMATS`, and perhaps `tools` (a list, or one in JSON), which the template
            gets, and `chat_template_kwargs`. What is null within them and messages counts as left out, but for
            `content`.
        at: Which row it is, for messages.
        assistant_only: Learn answers; else every token.

    Raises:
        ValueError: the row is of no format, the template refuses it, or there is no answer to learn or an empty one.
    """
    names = chat_columns(row) or FORMATS[0]
    if any(row.get(name) is None for name in names):
        found = [name for name, value in row.items() if value is not None]
        rule = f"It has no {' and '.join(names)}."
        raise invalid(at, found, rule, "Keep rows of one format in a file, and drop those without a conversation.")
    if assistant_only and not getattr(tokenizer, "is_fast", False):
        rule = "Only a fast tokenizer says which characters its tokens are."
        raise invalid("tokenizer", type(tokenizer).__name__, rule, "Save it as a fast one, or learn all tokens.")
    if names == FORMATS[1] and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return [_continued(tokenizer, row["prompt"], row["completion"], at, assistant_only)]
    prompt, rest = _parts(row, names, at)
    messages, options = prompt + rest, template_options(row, at)

    def write(shown: Messages, asking: bool = False) -> str:
        return written(tokenizer, shown, at, add_generation_prompt=asking, **options)

    whole = write(messages)
    if not assistant_only:
        return [_encoded(tokenizer, whole, [(0, len(whole))])]
    answers = [i for i, one in enumerate(messages) if one["role"] == "assistant" and i >= len(prompt)]
    if not answers:
        rule = "No message of it is an assistant's, so that there is no answer to learn."
        raise invalid(at, messages, rule, "Drop the row, or learn all tokens: `assistant_only=False`.")
    for i in answers:
        if not messages[i].get("tool_calls") and not _text(messages[i].get("content")).strip():
            raise invalid(at, messages[i], "This answer is empty.", "Drop the row, or write an answer.")
    if MARK.search(tokenizer.get_chat_template(tools=options["tools"])):
        start = _shared(write(prompt, True), whole) if prompt else 0
        documents = [_marked(tokenizer, messages, whole, start, options)]
    else:
        documents = _told_apart(tokenizer, write, at, messages, whole, answers)
    if not any(any(learned) for _, learned in documents):
        rule = "The chat template has no answer in it that follows a message."
        raise invalid(at, messages, rule, "Put a user's message before the answer, or mark answers in the template.")
    return documents


def prompt_of(row: Mapping[str, Any], at: str) -> Messages:
    """The messages that ask for an answer: a row's own without a last answer, or its prompt, instruction or text."""
    if row.get("messages") is not None:
        asked = list(_messages(row["messages"], at))
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
    elif isinstance(row.get("prompt"), list):
        asked = _messages(row["prompt"], at)
    elif row.get("instruction") is not None:
        asked = [_instruction(row)]
    else:
        strings = [row[name] for name in ("prompt", "text") if isinstance(row.get(name), str)]
        asked = [{"role": "user", "content": text} for text in strings[:1] if text.strip()]
    if not asked:
        rule = "It asks for nothing: it has no `prompt`, `messages`, `instruction` or `text`, or an empty one."
        raise invalid(at, dict(row), rule, "Drop the row, or name the column.")
    return asked


def template_options(row: Mapping[str, Any], at: str) -> dict[str, Any]:
    """What a row says to the template beside its messages: `tools`, and `chat_template_kwargs`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise invalid(at, tools, f"Its `tools` are no JSON: {error}.", "Write them as a list.") from error
    return {"tools": _given(tools) or None, **_given(row.get("chat_template_kwargs") or {})}


def written(tokenizer: Any, messages: Messages, at: str, **options: Any) -> str:
    """What the tokenizer's chat template makes of messages.

    Raises:
        ValueError: there is no template, it is broken, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        rule = "It has no chat template, by which conversations are written."
        remedy = "Save one as chat_template.jinja beside it; `prompt` and `completion` that are strings need none."
        raise invalid("tokenizer", tokenizer.name_or_path, rule, remedy)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateSyntaxError as error:
        rule = f"Its chat template is broken in line {error.lineno}: {error.message}."
        raise invalid("tokenizer", tokenizer.name_or_path, rule, "Repair it, or take that of its parent.") from error
    except Exception as error:  # a template may fail in any way
        rule = f"The chat template refuses it: {type(error).__name__}: {error}."
        raise invalid(at, messages, rule, "Change the row, or the template.") from error


def _parts(row: Mapping[str, Any], names: tuple[str, ...], at: str) -> tuple[Messages, Messages]:
    """The messages of a row: those that are given, and those that may be learned."""
    if names == FORMATS[2]:
        return [_instruction(row)], [{"role": "assistant", "content": row["output"]}]
    *before, after = (_messages(row[name], at) for name in names)
    return [message for messages in before for message in messages], after


def _messages(value: Any, at: str) -> Messages:
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return [{key: _given(m[key]) for key in m if m[key] is not None or key == "content"} for m in value]
    rule = "Messages are a list of dicts, each with a `role` and mostly a `content`."
    raise invalid(at, value, rule, "Write it so, or make prompt and completion both strings.")


def _given(value: Any) -> Any:
    """A value without null entries: tables have every key of every row, and null where a row had none."""
    if isinstance(value, dict):
        return {name: _given(part) for name, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def _instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = [row["instruction"], row.get("input")]
    return {"role": "user", "content": "\n\n".join(part for part in parts if part)}


def _text(content: Any) -> str:
    """A message's text, which may come in parts."""
    return content if isinstance(content, str) else json.dumps(content) if content else ""


def _continued(tokenizer: Any, prompt: str, completion: str, at: str, assistant_only: bool) -> Document:
    if assistant_only and not completion.strip():
        raise invalid(at, completion, "This completion is empty.", "Drop the row, or write one.")
    text, end = prompt + completion, tokenizer.eos_token_id
    start = len(prompt) if assistant_only else 0
    ids, learned = _encoded(tokenizer, text, [(start, len(text))], add_special_tokens=True)
    if end is None:
        return ids, learned
    if ids[-1:] == [end]:  # of the tokenizer, which says that it has no characters
        ids.pop(), learned.pop()
    return [*ids, end], [*learned, True]


def _marked(tokenizer: Any, messages: Messages, whole: str, start: int, options: dict[str, Any]) -> Document:
    """Answers as the template marks them, but for those before character `start`."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    ids, behind = _encoded(tokenizer, whole, [(start, len(whole) + 1)])
    return ids, [bool(mark) and late for mark, late in zip(found["assistant_masks"], behind, strict=True)]


def _told_apart(
    tokenizer: Any, write: Callable[..., str], at: str, messages: Messages, whole: str, answers: list[int]
) -> list[Document]:
    """Answers as what is written for them behind the prompt for one; what nothing asked for is none."""
    answers = [i for i in answers if i]
    until = {i: write(messages[: i + 1]) for i in answers}
    if all(whole.startswith(text) for text in until.values()):
        wholes = [(whole, answers)]
    else:
        wholes = [(text, [i]) for i, text in until.items()]
    ends = [token for token in getattr(tokenizer, "added_tokens_encoder", {}) if token.strip()]
    documents = []
    for text, inside in wholes:
        spans = []
        for i in inside:
            start = _shared(write(messages[:i], True), text)
            if not text.startswith(write(messages[:i])) or not until[i][start:]:
                rule = "The chat template writes a prompt otherwise once it has an answer, so that none can be found."
                remedy = "Mark answers in it with {% generation %}, or learn all tokens: `assistant_only=False`."
                raise invalid(at, messages, rule, remedy)
            turn = until[i].rstrip()
            spans.append((start, len(turn) if turn.endswith(tuple(ends)) else len(until[i])))
        documents.append(_encoded(tokenizer, text, spans))
    return documents


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _encoded(tokenizer: Any, text: str, spans: list[tuple[int, int]], add_special_tokens: bool = False) -> Document:
    """Token ids of a text, and which of them have characters in one of some spans."""
    if spans == [(0, len(text))]:  # what every tokenizer can tell
        ids = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        return ids, [True] * len(ids)
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    learned = [any(first < end and last > start for start, end in spans) for first, last in found["offset_mapping"]]
    return list(found["input_ids"]), learned
