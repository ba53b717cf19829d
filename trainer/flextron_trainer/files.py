"""Writes single files so that none is ever half-written, and JSON that every reader takes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_flextron.checkpoint import staging


@contextmanager
def write_file_beside(target: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write one file at, and move the file to `target` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target.parent, target.name) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


def strict_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: numbers that are not finite, which JSON does not have, are null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent, allow_nan=False)


def write_json(target: str | os.PathLike, value: Any) -> None:
    """Write a value as strict JSON, and move the file to `target` when it is complete."""
    with write_file_beside(target) as path:
        path.write_text(strict_json(value, indent=1) + "\n", encoding="utf-8")
