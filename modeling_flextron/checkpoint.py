"""Writing files so that nothing is ever half-written, and reading them so that nothing is of two checkpoints.

A folder that is written again is replaced file by file. While that lasts a file `.unfinished` lies in it; it stays when
the process is killed, until the next save. Whoever reads weights (`undisturbed`) refuses such a folder, and one whose
files are no longer those that were there at the beginning: a file is opened by its name when its time comes.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from .errors import invalid

UNFINISHED = ".unfinished"


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
        (target / UNFINISHED).touch()
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
        (target / UNFINISHED).unlink(missing_ok=True)
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


@contextmanager
def undisturbed(folder: str | os.PathLike) -> Iterator[None]:
    """Refuse what the block reads of a checkpoint when something is saved into its folder at the same time.

    A Hub id is no folder: what is downloaded is of one revision, and never replaced.

    Raises:
        ValueError: files were replaced, or a save has not come to its end; any error in the block is its cause.
    """
    before = _files_of_checkpoint(folder)
    try:
        _check_untouched(folder, before)
        yield
    except Exception as error:
        _check_untouched(folder, before, error)
        raise
    _check_untouched(folder, before)


def _files_of_checkpoint(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names of config and weights in a folder, with what tells a file from one that takes its place."""
    found: dict[str, tuple[int, ...]] = {}
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():
        if path.name in (CONFIG_NAME, UNFINISHED) or ".safetensors" in path.name:
            with suppress(FileNotFoundError):  # replaced by one of another name since it was listed
                stat = path.stat()
                found[path.name] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def _check_untouched(
    folder: str | os.PathLike, before: dict[str, tuple[int, ...]], cause: Exception | None = None
) -> None:
    if UNFINISHED in before or _files_of_checkpoint(folder) != before:
        rule = "Something was being saved into it, so that what was read may be of two checkpoints."
        remedy = "Try again when that has ended; if it was stopped in the middle, save or download it again."
        raise invalid("pretrained_model_name_or_path", str(folder), rule, remedy) from cause


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
