"""Options and arguments that several verbs take, and how their values are read."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from .refusals import invalid

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a Flextron model.", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda; by default a GPU when there is one.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="0.5, 350M, 6GiB, fit, 25ms, auto:0.5, the name of a row, or the fields of a SubNetwork as JSON."
    ),
]
Boundaries = Annotated[
    bool | None,
    typer.Option(
        help="Keep documents in a sample apart: attention stops between them. Default: conversations.",
        show_default=False,
    ),
]
AssistantOnly = Annotated[
    bool | None,
    typer.Option(help="The loss is that of answers alone. Default: of conversations.", show_default=False),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that files of the parent or the tokenizer bring along.")
]
PRESETS = "the name of a file of hub_configs/, such as llama-3.2-1b, or the path of one."
DATA = (
    "'stdlib', a folder, a text, jsonl, csv or parquet file, a pattern such as 'text/*.jsonl', or a Hub dataset id;"
    " text, or conversations (`messages`, `prompt` and `completion`, `instruction` and `output`)."
)


json_output: ContextVar[TextIO | None] = ContextVar("json_output", default=None)  # where `--json` is asked for


def print_result(*then: str, tables: Any = None, **result: Any) -> None:
    """Print what ends a verb: tables for people and the commands to run next, or with `--json` one JSON line.

    Args:
        then: Commands that a person may want to run now; `command` makes them.
        tables: What rich prints for people in place of the result's own tables.
        result: What the JSON line holds. Whatever has entries of its own, such as one for each budget, is a table.
    """
    from rich.console import Console

    from ..files import strict_json

    if (output := json_output.get()) is not None:
        print(strict_json(result), file=output, flush=True)
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for part in tables_of(result) if tables is None else tables:
        console.print(part)
    for i, text in enumerate(then):
        console.print("next: " if i == 0 else "      ", text, sep="", soft_wrap=True)


def command(*words: object) -> str:
    """A `flextron` command as it is typed."""
    return shlex.join(["flextron", *map(str, words)])


def as_datasets(sources: list[str]) -> list[str]:
    """Several datasets as they are typed behind a model: the first one, and `--dataset` for each of the others."""
    first, *more = sources
    return [first, *(word for source in more for word in ("--dataset", source))]


def tables_of(result: dict[str, Any]) -> Iterator[Any]:
    """A result as tables: its plain values, then one for each value that has entries, with a line for each of them."""
    from rich.table import Column, Table

    from ..tables import FittingTable, Values

    entries = {}
    for name, value in result.items():
        rows = list(value.values()) if isinstance(value, dict) else value
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            entries[name] = [{name: key, **row} for key, row in value.items()] if isinstance(value, dict) else rows
    plain = Table("", Column("", overflow="fold"), show_header=False)
    for name, value in result.items():
        if cell(value) and name not in entries:
            plain.add_row(as_words(name), cell(value))
    if plain.rows:
        yield plain
    for name, rows in entries.items():
        names = {key: None for row in rows for key, value in row.items() if cell(value)}
        columns = [key for key in names if key.removesuffix("_stderr") not in names or not key.endswith("_stderr")]
        shown = []
        for key in columns:
            values = ((row.get(key), row.get(f"{key}_stderr")) for row in rows)
            cells = [" ± ".join(filter(None, map(cell, pair))) for pair in values]
            numbers = all(isinstance(row.get(key), int | float | None) for row in rows)
            group, _, head = key.rpartition("/")
            shown.append(Values("" if key == name else as_words(head), cells, numbers, group))
        yield FittingTable(shown, as_words(name))


def as_words(name: str) -> str:
    return name.replace("_", " ")


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{as_words(str(key))} {cell(part)}" for key, part in value.items() if part)
    if isinstance(value, list | tuple):
        return " ".join(cell(part) for part in value)
    return str(value)


def parse_numbers(name: str, text: str | None) -> list[int | float] | None:
    """Parse `1,0.75,512`, the value of option `name`."""
    if text is None:
        return None
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise invalid(name, text, "They are numbers with commas between.", "Write for instance 1,0.5.") from None


def budget_value(text: str | None) -> Any:
    """A budget as typed: JSON fields, or the grammar's own text."""
    if not text or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise invalid("budget", text, f"It is not JSON: {error}.", 'Write for instance {"mlp": 96}.') from None


def copy_tokenizer(source: str, output: Path, trust_remote_code: bool) -> None:
    """Save the tokenizer of `source` in `output`, if it has one."""
    from ..data import load_tokenizer

    try:
        load_tokenizer(source, trust_remote_code=trust_remote_code).save_pretrained(output)
    except ValueError as error:
        print(f"No tokenizer was copied: {error}", file=sys.stderr)


def fitting_length(length: int | None, config: Any) -> int:
    """Tokens of a sample: as asked for, and by default 1024 or as many as the model has positions for."""
    limit = config.max_position_embeddings
    if length is not None and config.learned_positions and length > limit:
        rule = f"The model has {limit} learned positions."
        raise invalid("sequence_length", length, rule, "Pass at most so many, or leave it out.")
    return length or min(1024, limit)


def packed(
    sources: list[str], tokenizer: Any, length: int, assistant_only: bool | None, document_boundaries: bool | None,
    num_proc: int | None = None, split: str = "train", streaming: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Blocks of what belongs together: name for the card -> those of a source.

    Conversations among them bring document boundaries to all, because a batch has them or has none.
    """
    from ..data import holds_conversations, load_text, pack
    from ..evaluation.quality import name_of

    if len(set(sources)) < len(sources):
        raise invalid("dataset", sources, "One is given twice.", "Give it once, with a larger weight.")
    texts = [load_text(source, split, streaming) for source in sources]
    chats = [holds_conversations(text) for text in texts]
    if document_boundaries is None:
        document_boundaries = any(chats)
    result: dict[str, Any] = {}
    for source, text, chat in zip(sources, texts, chats, strict=True):
        only = assistant_only if chat or not any(chats) else None
        name = name_of(source, answers=chat and only is not False)
        if name in result:
            name = source + name.removeprefix(name_of(source))
        result[name] = pack(text, tokenizer, length, num_proc, document_boundaries, only)
    return result


def device_or_default(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        rule = f"This machine cannot use it: {str(error).splitlines()[0]}."
        raise invalid("device", device, rule, "Leave it out, or pass cpu.") from None
    return device


def dtype_named(name: str) -> Any:
    """The dtype of torch with this name, or `"auto"`."""
    import torch

    dtype = getattr(torch, name, None)
    if name != "auto" and not isinstance(dtype, torch.dtype):
        raise invalid("dtype", name, "It is no dtype of torch.", "Pass auto, float32, bfloat16 or float16.")
    return dtype or name


def local_folder(model: str) -> Path:
    """The folder of a model, downloaded with all its weights when it is not one already."""
    from huggingface_hub import snapshot_download

    from ..hub import retried
    from ..models import reading

    if Path(model).is_dir():
        return Path(model)
    with reading("model", model):
        return Path(retried(lambda: snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])))


def must_be_a_model(folder: Path) -> None:
    """Refuse what is not the folder of a saved model."""
    if not (folder / "config.json").is_file():
        rule = "It is not the folder of a saved model."
        raise invalid("folder", str(folder), rule, "Pass the output of `flextron convert` or `flextron train`.")


def different_folders(source: str, output: Path, file: bool = False) -> None:
    """Refuse to write over what is read, and where a file is, unless `output` is one."""
    if output.is_file() and not file:
        raise invalid("output", str(output), "There is a file of this name.", "Pass the path of a folder.")
    if Path(source).exists() and output.exists() and output.samefile(source):
        raise invalid("output", str(output), "It is the folder that is read.", "Write to another folder.")
