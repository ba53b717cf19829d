"""Writing files so that nothing is ever half-written."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from .errors import invalid


@contextmanager
def write_beside(target: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Give a fresh folder to write into, and move it to `target` when the block ends without an error.

    A new target appears at once. In an existing one each file is replaced at once, weights before the config,
    and weight files of an earlier save of the same `variant` that are no longer part of it are removed; other files
    stay.
    """
    target = Path(target)
    exists = target.exists()
    if exists and not target.is_dir():
        raise invalid("save_directory", str(target), "There is a file of this name.", "Pass the path of a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside a target that exists: it may be a mount point, onto which nothing can be moved from beside it.
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if exists else target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if not exists:
            os.replace(folder, target)
            return
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (".safetensors" not in path.name, path)):
            (target / path).parent.mkdir(exist_ok=True)
            os.replace(folder / path, target / path)
        names = {str(path) for path in files}
        dot = re.escape(f".{variant}") if variant else ""
        shard, index = rf"{dot}(-\d{{5}}-of-\d{{5}})?\.safetensors", rf"\.safetensors\.index{dot}\.json"
        weights = re.compile(rf"model(\.level\d+)?({shard}|{index})")
        for path in list(target.iterdir()):
            if weights.fullmatch(path.name) and path.name not in names:
                path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_file_beside(target: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write one file at, and move the file to `target` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        path = Path(folder) / target.name
        yield path
        os.replace(path, target)


def write_config(model: Any, folder: str | os.PathLike, config: Any = None) -> None:
    """Write a config into the folder of a saved model, with the code that reads it; the weights stay.

    Args:
        model: Whose code it is.
        folder: Of the model.
        config: By default that of the model.
    """
    custom_object_save(model, folder)
    with write_file_beside(Path(folder) / CONFIG_NAME) as path:
        (config or model.config).to_json_file(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
