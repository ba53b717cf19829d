"""Text in, blocks of token ids out: for calibration and for training. Reading and caching are left to `datasets`."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from modeling_flextron.errors import invalid, require_int

from .losses import IGNORED

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text(source: str, split: str = "train", streaming: bool = False) -> Any:
    """Read a text dataset. What `pack` makes of it is kept on disk, and made anew only when files have changed.

    Args:
        source: A folder (its text files, one row each), a `.jsonl`, `.parquet`, `.csv` or plain text file, the id
            of a dataset on the Hub, or `"stdlib"` for the sources of Python's own standard library.
        split: Split of a Hub dataset.
        streaming: Read rows when they are asked for, for text that does not fit on the disk.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when it is streamed.

    Raises:
        ValueError: nothing to read there.
    """
    path = Path(source)
    if source == "stdlib":
        return _files_as_rows(Path(sysconfig.get_paths()["stdlib"]), "*.py", streaming)
    if path.is_dir():
        return _files_as_rows(path, "*", streaming)
    kind = FORMATS.get(path.suffix)
    if path.is_file() and kind is None:
        return _rows_of(path, [path], "replace", streaming)
    if not path.is_file() and source.startswith(("/", ".")):
        raise invalid("dataset", source, "There is no such file or folder.", "Check the path.")
    try:
        if path.is_file():
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        else:
            rows = datasets.load_dataset(source, split=split, streaming=streaming)
        next(iter(rows), None)  # of a stream nothing has been read yet
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        rule = f"There is no such file or folder, and the Hub gave no dataset of this name: {reason}."
        if path.is_file():
            rule = f"It cannot be read as {kind}: {reason}."
        raise invalid("dataset", source, rule, "Check the path, or the id and the split.") from error
    return rows


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: it has none.
    """
    problem = "its files are missing"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)  # or it asks on the terminal
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # for some families an empty one is made up
            return tokenizer
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
    raise invalid("tokenizer", str(source), f"There is none: {problem}.", "Save the parent's tokenizer there.")


def _files_as_rows(folder: Path, pattern: str, streaming: bool) -> Any:
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and "site-packages" not in path.parts]
    return _rows_of(folder, files, "strict", streaming)


def _rows_of(source: Path, files: list[Path], errors: str, streaming: bool) -> Any:
    """One row for each file that is text; by their sizes and times `datasets` knows whether it has read them before."""
    states = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    if next(_read(states, errors), None) is None:
        raise invalid(
            "dataset", str(source), "There is no text that could be read.", "Pass a text file, or a folder of them."
        )
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    features = datasets.Features({"text": datasets.Value("string")})
    return kind.from_generator(_read, features=features, gen_kwargs={"states": states, "errors": errors})


def _read(states: tuple[tuple[str, int, int], ...], errors: str) -> Iterator[dict[str, str]]:
    for path, _, _ in states:
        try:
            yield {"text": Path(path).read_text(encoding="utf-8", errors=errors)}
        except (UnicodeDecodeError, OSError):
            continue  # not text


def text_column(dataset) -> str:
    """The column of a dataset that holds its text.

    Raises:
        ValueError: no column does, or it is not clear which; or nothing is there.
    """
    if dataset.features:
        columns = list(dataset.features)
        types = {name: getattr(feature, "dtype", "") for name, feature in dataset.features.items()}
        strings = [name for name in columns if types[name] in ("string", "large_string")]
    else:  # of a stream
        first: dict[str, Any] = next(iter(dataset), {})
        columns, strings = list(first), [name for name, value in first.items() if isinstance(value, str)]
    if not columns:
        raise invalid("dataset", type(dataset).__name__, "It holds no rows.", "Pass some text.")
    if "text" in columns:
        return "text"
    if len(strings) != 1:
        rule = "One column must hold the text: one called 'text', or the only one of strings."
        raise invalid("dataset", columns, rule, "Rename the column to 'text'.")
    return strings[0]


def pack(
    dataset: Any, tokenizer, sequence_length: int, num_proc: int | None = None, document_boundaries: bool = False
) -> Any:
    """Tokenize a text dataset and cut it into blocks of equal length, documents joined by the end-of-text token.

    A block may hold the end of one document and the beginning of the next, and attention does not stop between them
    unless `document_boundaries` says so.

    Args:
        dataset: Rows of text, see `text_column`; of a streamed dataset blocks are made as they are read.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Tokens in a block; what is left at the end is dropped.
        num_proc: Processes to tokenize with.
        document_boundaries: Keep the documents of a block apart: `position_ids` that begin at 0 in every document,
            from which transformers makes masks, and no label for a document's first token, as nothing foretells it.
            What a block holds of a document that began before it is a document of its own, from position 0.

    Returns:
        A dataset, streamed if the text is, of `input_ids` and `labels`, equal but for boundaries, as a causal language
        model takes them.

    Raises:
        ValueError: the text is shorter than one block.
    """
    require_int("sequence_length", sequence_length, minimum=2)
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        rule = "It is a `datasets.Dataset`, streamed or not, with a column of text."
        raise invalid("dataset", dataset, rule, "Read a folder, a file or a Hub id with `load_text`.")
    if not callable(tokenizer):
        remedy = "Load it with `AutoTokenizer.from_pretrained`."
        raise invalid("tokenizer", tokenizer, "It is a Hugging Face tokenizer.", remedy)
    column = text_column(dataset)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return {"input_ids": [ids + separator for ids in tokenizer(rows[column], add_special_tokens=False).input_ids]}

    def cut(rows: dict[str, list]) -> dict[str, list]:
        ids = [token for row in rows["input_ids"] for token in row]
        stops = range(sequence_length, len(ids) + 1, sequence_length)
        blocks = [ids[stop - sequence_length : stop] for stop in stops]
        if not document_boundaries:
            return {"input_ids": blocks, "labels": blocks}
        places = [place for row in rows["input_ids"] for place in range(len(row))]
        positions = [_from_zero(places[stop - sequence_length : stop]) for stop in stops]
        labels = [
            [token if place else IGNORED for token, place in zip(block, within, strict=True)]
            for block, within in zip(blocks, positions, strict=True)
        ]
        return {"input_ids": blocks, "labels": labels, "position_ids": positions}

    if isinstance(dataset, datasets.IterableDataset):
        tokens = dataset.map(tokenize, batched=True, remove_columns=list(dataset.column_names or next(iter(dataset))))
        blocks = tokens.map(cut, batched=True)
        if next(iter(blocks), None) is None:
            rule = f"It ends before the first block of {sequence_length} tokens."
            remedy = "Pass more text or a smaller `sequence_length`."
            raise invalid("dataset", "a stream of text", rule, remedy)
        return blocks
    tokens = dataset.map(
        tokenize, batched=True, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing"
    )
    blocks = tokens.map(cut, batched=True, num_proc=num_proc, desc="Packing")
    if len(blocks) == 0:
        rule = f"It has {sum(map(len, tokens['input_ids'])):,} tokens, fewer than one block of {sequence_length}."
        raise invalid("dataset", f"{len(dataset)} rows of text", rule, "Pass more text or a smaller `sequence_length`.")
    return blocks


def _from_zero(places: list[int]) -> list[int]:
    """The places of a block's tokens in their documents, of which the first begins with the block."""
    rest = next((i for i, place in enumerate(places) if place == 0), len(places))
    return [*range(rest), *places[rest:]]


def collator(tokenizer: Any = None) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Batches of rows with `input_ids` and, unless they are the same, `labels`, padded on the right.

    Where rows bring `position_ids`, those keep documents apart, and padding is a document of its own for each token.

    Args:
        tokenizer: Its padding token fills short rows; without one 0 does, which the mask and the labels hide.
    """
    padding = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0, "labels": IGNORED, "attention_mask": 0}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in padding}
        for row in rows:
            ids = torch.as_tensor(row["input_ids"])
            mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids)))
            columns["input_ids"].append(ids)
            columns["labels"].append(torch.as_tensor(row.get("labels", ids.masked_fill(mask == 0, IGNORED))))
            columns["attention_mask"].append(mask)
        batch = {
            name: pad_sequence(tensors, batch_first=True, padding_value=padding[name])
            for name, tensors in columns.items()
        }
        if "position_ids" in rows[0]:
            positions = [torch.as_tensor(row["position_ids"]) for row in rows]
            batch["position_ids"] = pad_sequence(positions, batch_first=True)
        if "position_ids" in batch or batch["attention_mask"].all():
            del batch["attention_mask"]  # attention is faster without one, and with one does not look at positions
        return batch

    return collate


def calibration_batches(
    data: Any, *, tokenizer, vocab_size: int, sequence_length: int, batch_size: int, max_samples: int
) -> list[torch.Tensor]:
    """Token batches `[B, S]` for calibration, read from the front of any kind of data.

    Args:
        data: Rows of text (strings, or dicts with a text column), rows with `input_ids`, tensors of ids `[S]`, or
            one tensor `[N, S]`; a list, a dataset, or a streamed one.
        tokenizer: For text.
        vocab_size: Of the parent; a larger id is refused.
        sequence_length: Tokens in a sample; shorter rows are joined.
        batch_size: Samples in a batch.
        max_samples: Read no more samples than this.

    Raises:
        ValueError: no data, data that cannot be read, or ids that the parent does not have.
    """
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        require_int(name, value)
    require_int("sequence_length", sequence_length, minimum=2)
    blocks: list[torch.Tensor] = []
    rest: list[int] = []
    for ids in _token_rows(data, tokenizer):
        rest.extend(ids)
        while len(rest) >= sequence_length and len(blocks) < max_samples:
            blocks.append(torch.tensor(rest[:sequence_length]))
            rest = rest[sequence_length:]
        if len(blocks) == max_samples:
            break
    if not blocks and len(rest) > 1:
        blocks = [torch.tensor(rest)]
    if not blocks:
        remedy = "Pass some text, or None to rank by the norms of the weights."
        raise invalid("calibration", data, "It holds no tokens.", remedy)
    samples = torch.stack(blocks)
    if samples.min() < 0 or samples.max() >= vocab_size:
        rule = f"The parent has {vocab_size} tokens, and the data has the ids {samples.min()} to {samples.max()}."
        raise invalid("calibration", data, rule, "Tokenize it with the parent's own tokenizer.")
    return list(samples.split(batch_size))


def _token_rows(data: Any, tokenizer) -> Iterator[list[int]]:
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, (Iterable, datasets.Dataset)):
        rule = "It is a collection of texts or token ids."
        raise invalid("calibration", data, rule, "Pass a list, or one dataset such as `dataset['train']`.")
    column = None
    for row in data:
        if isinstance(row, dict):
            if "input_ids" in row:
                row = row["input_ids"]
            else:
                column = column or (text_column(data) if hasattr(data, "column_names") else "text")
                row = row.get(column)
        if isinstance(row, str):
            if tokenizer is None:
                remedy = "Pass `tokenizer=`, or rows of `input_ids`."
                raise invalid("calibration", row, "Text needs a tokenizer.", remedy)
            row = tokenizer(row, add_special_tokens=False).input_ids
        if isinstance(row, torch.Tensor):
            row = row.flatten().tolist()
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise invalid("calibration", row, "A row is a text or a list of token ids.", "Pass rows of one of these.")
        yield row
