"""Reading text and conversations: what a file, a folder, a pattern or an id on the Hub holds, as rows.

`datasets` does the work.
"""

import codecs
import glob
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from modeling_flextron.errors import invalid

from .conversations import chat_columns

logger = logging.get_logger(__name__)
# What holds rows, by its ending: the reader of `datasets`, and what is between columns. Anything else may be text.
FORMATS = {
    ".json": ("json", ""),
    ".jsonl": ("json", ""),
    ".ndjson": ("json", ""),
    ".parquet": ("parquet", ""),
    ".arrow": ("arrow", ""),
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SPLITS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
SPLITS |= {name: name for name in ("train", "validation", "test")}


def load_text(source: str, split: str = "train", streaming: bool = False, prompts: bool = False) -> Any:
    """Read a dataset of text or conversations. What `pack` makes of it is kept on disk until files change.

    Args:
        source: A file, a folder with everything in it but hidden files, or a pattern such as `"text/*.jsonl"`; the id
            of a dataset on the Hub; or `"stdlib"` for the sources of Python's own standard library. Files of one kind
            of `FORMATS`, compressed or not, are read as rows. Files of none are text in UTF-8, one row each, and what
            is no text is named in the log and left out.
        split: Split of a Hub dataset.
        streaming: Read rows when they are asked for, for text that does not fit on the disk.
        prompts: Rows need no text and no answers, because they are to be answered.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when it is streamed.

    Raises:
        ValueError: nothing to read there, files of several kinds or splits, or rows without a column of text or those
            of conversations.
    """
    source = str(source)
    files = _files(source)
    if not files and (Path(source).is_dir() or source.startswith(("/", "."))):
        rule = "There is no text that could be read." if Path(source).is_dir() else "There is no such file or folder."
        raise invalid("dataset", source, rule, "Check the path.")
    formats = _agreed(source, files, "kinds of data", _format)
    if formats == {None}:
        return _rows_of_text(source, files, streaming)
    if Path(source).is_dir():
        _agreed(source, files, "splits", lambda path: _split(path.relative_to(source)) or "train")
    try:
        if files:
            ((reader, separator),) = formats
            options: dict[str, Any] = {"sep": separator} if separator else {}
            names = [glob.escape(str(path)) for path in files]
            rows = datasets.load_dataset(reader, data_files=names, split="train", streaming=streaming, **options)
        else:
            rows = datasets.load_dataset(source, split=split, streaming=streaming)
        if files and streaming:  # where others would be noticed on the way
            _one_kind_of_rows(source, files, reader, options)
        next(iter(rows), None)  # of a stream nothing has been read yet
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        rule = f"There is no such file or folder, and the Hub gave no dataset of this name: {reason}."
        if files:
            _one_kind_of_rows(source, files, reader, options)
            rule = f"It cannot be read as {reader}: {reason}."
        raise invalid("dataset", source, rule, "Check the path, or the id and the split.") from error
    if not prompts:
        content_columns(rows, str(files[0]) if len(files) == 1 else source)
    return rows


def content_columns(dataset: Any, source: str | None = None) -> tuple[str, ...]:
    """The columns of a dataset that are read: those of conversations, or else the one of text.

    Args:
        dataset: Rows, stored or streamed.
        source: Where they come from, for messages.

    Raises:
        ValueError: there are none, or it is not clear which; or nothing is there.
    """
    if dataset.features:
        columns = list(dataset.features)
        types = {name: getattr(feature, "dtype", "") for name, feature in dataset.features.items()}
        strings = [name for name in columns if types[name] in ("string", "large_string")]
    else:  # of a stream
        first: dict[str, Any] = next(iter(dataset), {})
        columns, strings = list(first), [name for name, value in first.items() if isinstance(value, str)]
    if not columns:
        raise invalid("dataset", source or type(dataset).__name__, "It holds no rows.", "Pass some text.")
    chat = chat_columns(columns)
    if chat is not None:
        if "text" in columns:
            logger.warning_once(f"Read are the columns {', '.join(chat)}; remove them to read `text`.")
        return chat
    if "text" in columns:
        return ("text",)
    if len(strings) != 1:
        rule = "One column must hold the text: one called 'text', or the only one of strings; or several, a chat."
        remedy = "Rename the column to 'text'. Conversations have `messages`, or `prompt` and `completion`, or"
        remedy += " `instruction` and `output`."
        raise invalid("dataset", columns if source is None else f"{source}: {', '.join(columns)}", rule, remedy)
    return (strings[0],)


def _one_kind_of_rows(source: str, files: list[Path], reader: str, options: dict[str, Any]) -> None:
    """Refuse files whose first rows are of several kinds; what else is wrong with a file is told where it is read."""
    kinds: dict[Path, str] = {}
    for path in files:
        with suppress(OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError):
            name = glob.escape(str(path))
            rows = datasets.load_dataset(reader, data_files=[name], split="train", streaming=True, **options)
            first = next(iter(rows))
            kinds[path] = ", ".join(chat_columns(first) or sorted(first))
    _agreed(source, list(kinds), "kinds of rows", kinds.get)


def _files(source: str) -> list[Path]:
    """The files that a source names; none when it is no path."""
    path = Path(source)
    if source == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        return [file for file in sorted(path.rglob("*.py")) if "site-packages" not in file.relative_to(path).parts]
    if path.is_dir():
        inside = [(file, file.relative_to(path).parts) for file in sorted(path.rglob("*")) if file.is_file()]
        return [file for file, parts in inside if not any(part.startswith(".") for part in parts)]
    found = [path] if path.is_file() else map(Path, sorted(glob.glob(source, recursive=True)))
    return [file for file in found if file.is_file()]


def _format(path: Path) -> tuple[str, str] | None:
    """How the rows of a file are read; None for text."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return FORMATS.get(endings[-1]) if endings else None


def _split(path: Path) -> str | None:
    """The split that a name says, as `datasets` reads names."""
    words = re.split("[^a-z]+", str(path).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _agreed(source: str, files: list[Path], what: str, key: Callable[[Path], Any]) -> set[Any]:
    """The value of `key` in all files; different ones are refused."""
    first = {key(path): str(path) for path in reversed(files)}
    if len(first) > 1:
        rule = f"Its files are of several {what}, such as {', '.join(sorted(first.values()))}."
        remedy = "Pass those that you mean, such as 'text/*.jsonl', or a folder of them."
        raise invalid("dataset", source, rule, remedy)
    return set(first)


def _rows_of_text(source: str, files: list[Path], streaming: bool) -> Any:
    """One row for each file that is text; by their sizes and times `datasets` knows whether it has read them before."""
    if not any(path.stat().st_size for path in files):
        raise invalid("dataset", source, "There is no text that could be read.", "Its files are empty.")
    texts = [path for path in files if _is_text(path)]
    if len(texts) < len(files):
        others = sorted(map(str, set(files) - set(texts)))
        found = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        if not texts:
            rule = f"There is no text in UTF-8 that could be read, only {found}."
            raise invalid("dataset", source, rule, "Pass a text file, or a folder of them.")
        logger.warning(f"What is no text in UTF-8 is left out of {source}: {found}.")
    states = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in texts)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    features = datasets.Features({"text": datasets.Value("string")})
    return kind.from_generator(_read, features=features, gen_kwargs={"states": states})


def _is_text(path: Path) -> bool:
    """Whether a file begins as text does: it can be read, as UTF-8, and has no zero bytes."""
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
        codecs.getincrementaldecoder("utf-8")().decode(begin)  # which may end within a character
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in begin


def _read(states: tuple[tuple[str, int, int], ...]) -> Iterator[dict[str, str]]:
    for name, _, _ in states:
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            logger.warning(f"{name} is no UTF-8 at byte {error.start}, and what cannot be read is replaced.")
            text = Path(name).read_text(encoding="utf-8-sig", errors="replace")
        yield {"text": text}
