"""A model's own answers to prompts, as conversations to train on, and on from where a run stopped."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_flextron.errors import invalid, require_int

from .conversations import Messages, prompt_of, template_options, written
from .files import write_json

logger = logging.get_logger(__name__)


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    output: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    seed: int = 0,
    **sampling: Any,
) -> dict[str, int]:
    """Answer every prompt, in their order, with one line of JSON for each: `messages`, `finish_reason`, `tools`.

    A run that was stopped goes on behind the last batch that is whole, and then writes what it would have written; a
    line that is torn is written again.

    Args:
        model: What generates, on its device.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Rows of `messages`, whose last answer is left away, `prompt`, `instruction` or text; they can be read
            several times.
        output: File to write or to go on with.
        batch_size: Prompts in a batch, padded on the left.
        max_new_tokens: Of an answer. One that is cut there has `finish_reason` "length", and else "stop".
        seed: Of the draws: every batch has its own, from this one and its place.
        sampling: Arguments of `generate`, such as `do_sample` and `temperature`.

    Returns:
        `answers` in the file, of which `written` now, and how many of these are `cut` and `empty`.

    Raises:
        ValueError: a row asks for nothing, the template refuses it, or the file has answers to other prompts or was
            written with other settings.
    """
    require_int("batch_size", batch_size)
    require_int("max_new_tokens", max_new_tokens)
    settings = {"model": model.name_or_path, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed}
    for number, row in enumerate(prompts, start=1):  # before hours have passed
        _asked(tokenizer, row, number)
    done = _kept(output, {**settings, **sampling}, prompts)
    counts = {"answers": done, "written": 0, "cut": 0, "empty": 0}
    rows = islice(enumerate(prompts, start=1), done, None)
    total = len(prompts) if hasattr(prompts, "__len__") else None
    with output.open("a", encoding="utf-8") as file, tqdm(total=total, initial=done, desc="Answering") as bar:
        while batch := [_asked(tokenizer, row, number) for number, row in islice(rows, batch_size)]:
            torch.manual_seed(seed + counts["answers"])
            answers = _answers(model, tokenizer, [text for *_, text in batch], max_new_tokens, sampling)
            for (messages, beside, _), (answer, cut) in zip(batch, answers, strict=True):
                line: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": answer}]}
                line["finish_reason"] = "length" if cut else "stop"
                file.write(json.dumps(line | beside) + "\n")
                counts["cut"] += cut
                counts["empty"] += not answer.strip()
            file.flush()
            counts["answers"] += len(batch)
            counts["written"] += len(batch)
            bar.update(len(batch))
    if counts["empty"]:
        logger.warning(f"{counts['empty']} answers are empty; remove their rows before training on {output}.")
    return counts


def _asked(tokenizer: Any, row: Mapping[str, Any], number: int) -> tuple[Messages, dict[str, Any], str]:
    """The messages of a row, the columns beside them that the template reads, and the text that is to be continued."""
    at = f"prompts row {number}"
    messages, options = prompt_of(row, at), template_options(row, at)
    beside = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
    return messages, beside, written(tokenizer, messages, at, add_generation_prompt=True, **options)


@torch.no_grad()
def _answers(
    model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int, sampling: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """What a model writes behind texts, and whether it was cut there."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"].to(model.device), attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens, min_new_tokens=1, pad_token_id=tokenizer.pad_token_id, **sampling,
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end).flatten().to(ids)
    for new in ids:
        cut = len(new) == max_new_tokens and not torch.isin(new, ends).any()
        yield tokenizer.decode(new, skip_special_tokens=True).strip(), bool(cut)


def _kept(output: Path, settings: Mapping[str, Any], prompts: Iterable[Mapping[str, Any]]) -> int:
    """How many answers of an earlier run stay: all, or else those of whole batches; what is behind them is cut off."""
    beside = output.with_name(f".{output.name}.run.json")  # hidden, so that a folder of answers is one of rows alone
    lines = output.read_bytes().splitlines(keepends=True) if output.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if lines:
        before = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else "no known ones"
        if before != settings:
            rule = f"The answers in it were written with other settings: {before}."
            raise invalid("output", str(output), rule, "Write to another file, or go on with those settings.")
    count, rows = len(lines), enumerate(prompts, start=1)
    for place, line in enumerate(lines, start=1):
        number, row = next(rows, (place, None))
        if row is None or json.loads(line)["messages"][:-1] != prompt_of(row, f"prompts row {number}"):
            rule = f"Its answer {place} is one to another prompt."
            raise invalid("output", str(output), rule, "Write to another file.")
    if next(rows, None) is not None:
        count -= count % settings["batch_size"]
    with output.open("ab") as file:
        file.truncate(sum(map(len, lines[:count])))
    write_json(beside, settings)
    return count
