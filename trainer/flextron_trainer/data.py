"""Text and conversations in, blocks of token ids out: for calibration, training and evaluation.

Caching is left to `datasets`.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from transformers.utils import logging

from modeling_flextron.errors import invalid, require_int
from modeling_flextron.positions import places_in_documents

from .conversations import FORMATS, chat_columns, documents_of
from .hub import retried
from .losses import IGNORED
from .reading import content_columns
from .reading import load_text as load_text  # so that text is read and packed by one module

logger = logging.get_logger(__name__)
OPEN_BLOCKS = 64  # that a conversation may still go to


def load_tokenizer(source: str | os.PathLike, *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The tokenizer of a folder or Hub id, of a class of transformers unless its own code is asked for.

    Args:
        source: Folder or Hub id.
        trust_remote_code: Run the code that its files name, where they name some.
        hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: it has none that can be read.
    """
    problem = "its files are missing"
    try:
        load = partial(AutoTokenizer.from_pretrained, source, trust_remote_code=trust_remote_code, **hub)
        tokenizer = retried(load)
    except Exception as error:  # of damaged files every library raises its own
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        if not trust_remote_code:  # what was not needed here is not handed on to whoever loads a copy
            tokenizer.init_kwargs.pop("auto_map", None)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # for some families an empty one is made up
            return tokenizer
    remedy = "Save the parent's tokenizer there; one that brings its own code wants `trust_remote_code=True`."
    raise invalid("tokenizer", str(source), f"There is none: {problem}.", remedy)


def known_tokenizer(source: str | os.PathLike, **hub: Any) -> Any:
    """The tokenizer of a folder or Hub id; None where there is none, or no source."""
    try:
        return load_tokenizer(source, **hub) if source else None
    except ValueError:
        return None


def check_tokens(argument: str, source: str | os.PathLike, theirs: Any, ours: Any, remedy: str) -> None:
    """Refuse a tokenizer of which some id means another token than in ours.

    Tokens that were added count for nothing: they are renamed at will.

    Args:
        argument, source: Whose tokenizer it is, for the message.

    Raises:
        ValueError: some id does.
    """
    others, mine = _ordinary(theirs), _ordinary(ours)
    for number in sorted(mine.keys() & others.keys()):
        if mine[number] != others[number]:
            rule = f"Token {number} is {others[number]!r} in its tokenizer and {mine[number]!r} in that of the model."
            raise invalid(argument, str(source), rule, remedy)


def _ordinary(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    return {number: token for token, number in tokenizer.get_vocab().items() if token not in added}


def holds_conversations(dataset: Any) -> bool:
    """Whether the rows of a dataset are conversations, prompts with completions, or instructions."""
    return chat_columns(dataset.column_names or next(iter(dataset), {})) is not None


def tokens_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Texts as a model sees them in use, for training, calibration and evaluation alike.

    Each begins as `tokenizer(text)` does, so with a begin-of-text token where the tokenizer adds one, and ends with the
    end-of-text token if there is one.

    Raises:
        ValueError: a row that is no text.
    """
    for text in texts:
        if not isinstance(text, str):
            raise invalid("dataset", text, "Every row of its text column is a text.", "Drop the rows without one.")
    end, tokens = tokenizer.eos_token_id, tokenizer(texts, verbose=False).input_ids  # no warning of a long document
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in tokens]


def blocks_of(documents: Iterable[list[int]], length: int, rest: bool = False) -> Iterator[tuple[list[int], list[int]]]:
    """Documents, one behind the other, cut into blocks of `length` tokens.

    Args:
        documents: Token ids; read as they are needed.
        length: Tokens in a block.
        rest: Give what is left at the end, too, instead of dropping it.

    Yields:
        Token ids of a block, and the place of each in its document.
    """
    ids: list[int] = []
    places: list[int] = []
    for document in documents:
        ids.extend(document)
        places.extend(range(len(document)))
        whole = len(ids) - len(ids) % length
        for start in range(0, whole, length):
            yield ids[start : start + length], places[start : start + length]
        del ids[:whole], places[:whole]
    if rest and ids:
        yield ids, places


def whole_in_blocks(documents: Iterable[Any], length: int) -> Iterator[list[Any]]:
    """Documents, none of them cut, in blocks of at most `length` tokens: each where it leaves the least room.

    Args:
        documents: Anything with the lengths of documents, none larger than `length`; read as they are needed.
        length: Tokens in a block.

    Yields:
        The documents of a block; the last ones may be rather empty.
    """
    blocks: list[list[Any]] = []
    rooms: list[int] = []
    for document in documents:
        size = len(document)
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if not fitting and len(blocks) == OPEN_BLOCKS:
            fullest = min(range(len(rooms)), key=rooms.__getitem__)
            yield blocks.pop(fullest)
            rooms.pop(fullest)
        if not fitting:
            blocks.append([])
            rooms.append(length)
        place = min(fitting, key=rooms.__getitem__) if fitting else -1
        blocks[place].append(document)
        rooms[place] -= size
    yield from blocks


def pack(
    dataset: Any,
    tokenizer: Any,
    sequence_length: int,
    num_proc: int | None = None,
    document_boundaries: bool | None = None,
    assistant_only: bool | None = None,
) -> Any:
    """Tokenize text or conversations and make blocks of them.

    Text is cut into blocks of equal length, one document (see `tokens_of`) behind the other. A block may hold the end
    of one document and the beginning of the next, and attention does not stop between them unless
    `document_boundaries` says so.

    A conversation (see `documents_of`) is never divided among blocks, so that every answer is learned behind all that
    it answers. Blocks hold whole ones and may be shorter than `sequence_length`. One that is longer than a block is cut
    at its end: what is behind the cut is not learned, an answer that is cut through is learned up to there, and where
    the cut comes before the first answer begins, the conversation is left out. The log counts all of this.

    Args:
        dataset: Rows of text, or with the columns of a format of conversations, which then are read; of a streamed
            dataset blocks are made as they are read.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Tokens in a block; what is left behind the last document of text is dropped.
        num_proc: Processes to tokenize with.
        document_boundaries: Keep the documents of a block apart: `position_ids` that begin at 0 in every document,
            from which transformers makes masks, and no label for a document's first token, as nothing predicts it.
            What a block holds of a text that began before it is a document of its own, from position 0. None: of
            conversations, not of text.
        assistant_only: Labels for answers alone. None: of conversations, while text has none.

    Returns:
        A dataset, streamed if the text is, of `input_ids` and `labels`, of text equal but for boundaries, as a causal
        language model takes them. It is the same for any `num_proc`, streamed or not; a stream is read by one worker.

    Raises:
        ValueError: the text is shorter than one block, no answer begins within one, or a row cannot be used.
    """
    require_int("sequence_length", sequence_length, minimum=2)
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        rule = "It is a `datasets.Dataset`, streamed or not, with a column of text or those of conversations."
        raise invalid("dataset", dataset, rule, "Read a folder, a file or a Hub id with `load_text`.")
    if not callable(tokenizer):
        remedy = "Load it with `AutoTokenizer.from_pretrained`."
        raise invalid("tokenizer", tokenizer, "It is a Hugging Face tokenizer.", remedy)
    columns, streamed = content_columns(dataset), isinstance(dataset, datasets.IterableDataset)
    chat = columns in FORMATS
    if assistant_only and not chat:
        rule = "Text has no answers."
        raise invalid("assistant_only", assistant_only, rule, "Leave it out, or pass conversations.")
    apart = chat if document_boundaries is None else document_boundaries
    options: dict[str, Any] = {} if streamed else {"num_proc": num_proc, "desc": "Tokenizing"}
    before = list(dataset.column_names or next(iter(dataset)))
    if chat:
        read = partial(_conversations, tokenizer, sequence_length, assistant_only is not False)
        tokens = dataset.map(read, batched=True, with_indices=True, remove_columns=before, **options)
        blocks = partial(_blocks_of_conversations, length=sequence_length, apart=apart)
    else:
        read = partial(_texts, tokenizer, columns[0])
        tokens = dataset.map(read, batched=True, remove_columns=before, **options)
        blocks = partial(_blocks_of_text, length=sequence_length, apart=apart)
    first = next(blocks(tokens), None)
    if first is None:
        rule = f"It ends before the first block of {sequence_length} tokens."
        if chat:
            rule = f"No answer begins in the first {sequence_length} tokens of a conversation."
        remedy = "Pass more text or a smaller `sequence_length`." if not chat else "Pass a larger `sequence_length`."
        what = "conversations" if chat else "text"
        raise invalid("dataset", f"a stream of {what}" if streamed else f"{len(dataset)} rows of {what}", rule, remedy)
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in first})
    packed = type(dataset).from_generator(blocks, features=features, gen_kwargs={"tokens": tokens})
    if chat and not streamed:
        logger.warning(_counts(tokens, packed, sequence_length))
    return packed


def mixed(packed: Sequence[Any], shares: Sequence[float] | None = None, seed: int = 0) -> Any:
    """Mix blocks of several texts, drawn at random by `datasets.interleave_datasets` until all have been read.

    Args:
        packed: Of `pack`, with document boundaries all, or none; all stored, or all streamed. One alone stays as it is.
        shares: Of the blocks, one for each, in any unit; blocks have about the same number of tokens. None: equal. What
            is short for its share is read again.
        seed: Of the draws.

    Raises:
        ValueError: shares that are none.
    """
    if shares is not None and (len(shares) != len(packed) or min(shares) <= 0):
        rule = f"They are the shares of {len(packed)} datasets."
        raise invalid("weights", shares, rule, "Pass a positive number for each, with commas between.")
    if len(packed) == 1:
        return packed[0]
    shares = shares or [1.0] * len(packed)
    parts = [share / sum(shares) for share in shares]
    return datasets.interleave_datasets(list(packed), parts, seed=seed, stopping_strategy="all_exhausted")


def _texts(tokenizer: Any, column: str, rows: dict[str, list]) -> dict[str, list]:
    return {"input_ids": tokens_of(tokenizer, rows[column])}


def _conversations(
    tokenizer: Any, length: int, assistant_only: bool, rows: dict[str, list], numbers: list[int]
) -> dict[str, list]:
    """Documents of conversations, the whole ones and the beginnings of longer ones: ids, labels, targets left out."""
    found: dict[str, list] = {"input_ids": [], "labels": [], "unseen": []}
    for number, *values in zip(numbers, *rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        for ids, learned in documents_of(tokenizer, row, f"dataset row {number + 1}", assistant_only):
            labels = [id if one and i else IGNORED for i, (id, one) in enumerate(zip(ids, learned, strict=True))]
            kept = slice(length if any(label != IGNORED for label in labels[:length]) else 0)
            found["input_ids"].append(ids[kept])
            found["labels"].append(labels[kept])
            found["unseen"].append(
                sum(label != IGNORED for label in labels) - sum(label != IGNORED for label in labels[kept])
            )
    return found


def _blocks_of_text(tokens: Any, length: int, apart: bool) -> Iterator[dict[str, list[int]]]:
    documents = chain.from_iterable(rows["input_ids"] for rows in tokens.iter(1000))
    for ids, places in blocks_of(documents, length):
        if not apart:
            yield {"input_ids": ids, "labels": ids}
            continue
        positions = _from_zero(places)
        labels = [token if position else IGNORED for token, position in zip(ids, positions, strict=True)]
        yield {"input_ids": ids, "labels": labels, "position_ids": positions}


def _blocks_of_conversations(tokens: Any, length: int, apart: bool) -> Iterator[dict[str, list[int]]]:
    rows = (zip(rows["input_ids"], rows["labels"], strict=True) for rows in tokens.iter(1000))
    documents = (list(zip(*row, strict=True)) for row in chain.from_iterable(rows) if row[0])
    for block in whole_in_blocks(documents, length):
        ids, labels = map(list, zip(*chain.from_iterable(block), strict=True))
        positions = {"position_ids": [place for document in block for place in range(len(document))]} if apart else {}
        yield {"input_ids": ids, "labels": labels, **positions}


def _counts(tokens: datasets.Dataset, packed: datasets.Dataset, length: int) -> str:
    """What became of conversations, for the log."""
    labels, unseen = pc.list_flatten(packed.data["labels"]), tokens.data["unseen"]
    learned = pc.sum(pc.not_equal(labels, IGNORED)).as_py()
    text = f"{len(packed):,} blocks: the loss is that of {learned:,} tokens, and {len(labels) - learned:,} are masked."
    if cut := pc.sum(pc.greater(unseen, 0)).as_py():
        gone = pc.sum(pc.equal(pc.list_value_length(tokens.data["input_ids"]), 0)).as_py()
        lost = pc.sum(unseen).as_py()
        text += (
            f" Behind the {length}th token of {cut:,} of {len(tokens):,} conversations, which are cut there, {lost:,}"
        )
        text += f" more would be learned; {gone:,} are left out, as none of their answers begins before."
    return text


def _from_zero(places: list[int]) -> list[int]:
    """The places of a block's tokens in their documents, of which the first begins with the block."""
    rest = next((i for i, place in enumerate(places) if place == 0), len(places))
    return [*range(rest), *places[rest:]]


def collator(tokenizer: Any = None) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Batches of rows with `input_ids` and, unless they are the same, `labels`, padded on the right.

    Where a row brings `position_ids`, they keep documents apart; padding then is a document of its own for each token,
    and a row without any is one document.

    Args:
        tokenizer: Its padding token fills short rows; without one 0 does, which the mask and the labels hide.
    """
    padding = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0, "labels": IGNORED, "attention_mask": 0}
    return partial(_collate, padding)  # which, other than a closure, reaches the workers of a DataLoader


def _collate(padding: dict[str, int], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in padding}
    for row in rows:
        ids = torch.as_tensor(row["input_ids"])
        mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids)))
        columns["input_ids"].append(ids)
        columns["labels"].append(torch.as_tensor(row.get("labels", ids.masked_fill(mask == 0, IGNORED))))
        columns["attention_mask"].append(mask)
    batch = {
        name: pad_sequence(tensors, batch_first=True, padding_value=padding[name]) for name, tensors in columns.items()
    }
    if any("position_ids" in row for row in rows):
        positions = [torch.as_tensor(row.get("position_ids", range(len(row["input_ids"])))) for row in rows]
        batch["position_ids"] = pad_sequence(positions, batch_first=True)
        if all(mask.all() for mask in columns["attention_mask"]):
            del batch["attention_mask"]  # attention is faster without one, and with one does not look at positions
    elif batch["attention_mask"].all():
        del batch["attention_mask"]
    return told_by_positions(batch)


def told_by_positions(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose positions alone keep documents apart, without its mask; as it is where no row has several.

    Stock code, which a teacher may be, looks for documents where there is no mask.
    """
    if batch.get("attention_mask") is None or batch.get("position_ids") is None:
        return batch
    real, positions = batch["attention_mask"].bool(), batch["position_ids"]
    places = places_in_documents(positions, real)
    if places is None:
        return batch
    told = torch.where(real, positions, places)
    before = ~real[:, :-1] & real[:, 1:]  # padding, of which a token at 1 would seem to be the next one
    told[:, :-1] = torch.where(before, told[:, 1:], told[:, :-1])
    return {name: value for name, value in batch.items() if name != "attention_mask"} | {"position_ids": told}


def calibration_batches(
    data: Any, *, tokenizer, vocab_size: int, sequence_length: int, batch_size: int, max_samples: int
) -> list[torch.Tensor]:
    """Token batches `[B, S]` for calibration, read from the front of any kind of data.

    Args:
        data: Rows of text (strings, or dicts with a text column, see `tokens_of`) or conversations, all of whose tokens
            count, rows with `input_ids`, of which what an `attention_mask` hides does not count, tensors of ids `[S]`,
            or one tensor `[N, S]`; a list, a dataset, or a streamed one.
        tokenizer: For text and conversations.
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
    found = islice(blocks_of(_token_rows(data, tokenizer), sequence_length, rest=True), max_samples)
    blocks = [ids for ids, _ in found]
    if len(blocks) > 1 and len(blocks[-1]) < sequence_length:
        blocks.pop()
    if not blocks or len(blocks[0]) < 2:
        remedy = "Pass some text, or 'weights' to rank by the norms of the weights."
        raise invalid("calibration", data, "It holds no tokens.", remedy)
    samples = torch.tensor(blocks)
    if samples.min() < 0 or samples.max() >= vocab_size:
        rule = f"The parent has {vocab_size} tokens, and the data has the ids {samples.min()} to {samples.max()}."
        raise invalid("calibration", data, rule, "Tokenize it with the parent's own tokenizer.")
    return list(samples.split(batch_size))


def hold_out(batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Part the last eighth of the samples from the rest; a single sample is on both sides, with a warning.

    Args:
        batches: Of `calibration_batches`.
    """
    samples, size = torch.cat(batches), len(batches[0])
    if len(samples) == 1:
        warnings.warn(
            "The calibration has one sample, so what fits it best is chosen by that sample, too. Pass more text.",
            stacklevel=3,
        )
        return batches, batches
    count = max(1, len(samples) // 8)
    return list(samples[:-count].split(size)), list(samples[-count:].split(size))


def _token_rows(data: Any, tokenizer) -> Iterator[list[int]]:
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, (Iterable, datasets.Dataset)):
        rule = "It is a collection of texts or token ids."
        raise invalid("calibration", data, rule, "Pass a list, or one dataset such as `dataset['train']`.")
    column = None
    for number, row in enumerate(data, start=1):
        mask = None
        if isinstance(row, dict):
            if "input_ids" in row:
                row, mask = row["input_ids"], row.get("attention_mask")
            elif chat_columns(row) is not None:
                _need_tokenizer(tokenizer, row)
                documents = documents_of(tokenizer, row, f"calibration row {number}", assistant_only=False)
                yield from (ids for ids, _ in documents)
                continue
            else:
                column = column or (content_columns(data)[0] if hasattr(data, "column_names") else "text")
                row = row.get(column)
        if isinstance(row, str):
            _need_tokenizer(tokenizer, row)
            (row,) = tokens_of(tokenizer, [row])
        if isinstance(row, torch.Tensor):
            row = row.flatten().tolist()
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise invalid("calibration", row, "A row is a text or a list of token ids.", "Pass rows of one of these.")
        yield row if mask is None else [token for token, seen in zip(row, mask, strict=True) if seen]


def _need_tokenizer(tokenizer: Any, row: Any) -> None:
    if tokenizer is None:
        raise invalid("calibration", row, "Text needs a tokenizer.", "Pass `tokenizer=`, or rows of `input_ids`.")
