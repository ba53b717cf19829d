"""Writing files so that nothing is ever half-written, and reading them so that nothing is of two checkpoints.

Files are written in a hidden folder (`staging`), and what a killed writer left there the next one removes. A folder
that is written again is replaced file by file. While that lasts a file `.unfinished` lies in it; it stays when the
process is killed, until the next save. Whoever reads weights (`undisturbed`) refuses such a folder, and one whose
files are no longer those that were there at the beginning: a file is opened by its name when its time comes.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from .errors import invalid

try:
    import fcntl
except ImportError:  # not a POSIX system: what killed writers leave stays, and writers do not wait for each other
    fcntl = None  # type: ignore[assignment]

MARK = ".flextron-writing"  # in a folder that is being written, locked for as long as its writer lives
UNFINISHED = ".unfinished"


@contextmanager
def write_beside(target: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Give a fresh folder to write into, and move it to `target` when the block ends without an error.

    A new target appears at once. In an existing one each file is replaced at once, weights before the config,
    and weight files of an earlier save of the same `variant` that are no longer part of it are removed; other files
    stay.

    Raises:
        ValueError: `target` is a file.
        FileExistsError: another process wrote the new target meanwhile; what was written here is kept beside it.
    """
    target = Path(target)
    exists = target.exists()
    if exists and not target.is_dir():
        raise invalid("save_directory", str(target), "There is a file of this name.", "Pass the path of a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    # Inside a target that exists: it may be a mount point, onto which nothing can be moved from beside it.
    with staging(target if exists else target.parent, target.name) as folder:
        yield folder
        if exists:
            with _alone(target):  # or of two writers each would leave a part
                _replace(folder, target, variant)
        else:
            _appear(folder, target)


@contextmanager
def staging(place: str | os.PathLike, name: str) -> Iterator[Path]:
    """Give a new folder in a hidden one in `place`, called after `name`, that goes at the end of the block.

    What is left of it when the process is killed, the next one that writes into `place` removes.
    """
    sweep(place)
    hidden = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=place))
    try:
        with open(hidden / "new", "w") as mark:
            if _lock(mark.fileno()):
                os.replace(hidden / "new", hidden / MARK)  # under this name it is never without its lock
            folder = hidden / "files"
            folder.mkdir()
            yield folder
    finally:
        _remove(hidden)


def sweep(place: str | os.PathLike) -> None:
    """Remove what killed writers left in a folder: hidden folders with a mark that nobody holds any more."""
    for path in Path(place).glob(f".*/{MARK}"):
        with suppress(OSError), open(path, "r+") as mark:  # another process may be removing it just now
            if _lock(mark.fileno()):
                _remove(path.parent)


def _remove(hidden: Path) -> None:
    """Remove a folder of `staging`, its mark last: so that somebody ends it if this is killed."""
    shutil.rmtree(hidden / "files", ignore_errors=True)
    shutil.rmtree(hidden, ignore_errors=True)


def _appear(folder: Path, target: Path) -> None:
    """Move a folder to where there was none."""
    try:
        os.replace(folder, target)
    except OSError as error:
        if not target.exists():
            raise
        kept = tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent)
        os.replace(folder, kept)
        rule = "Another process has written this folder in the meantime, and it stays as that left it."
        raise FileExistsError(f"{target}: {rule} What this process wrote is in {kept}.") from error


def _replace(folder: Path, target: Path, variant: str | None) -> None:
    """Move the files of a folder into one that exists, and remove the weights that they replace."""
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other writers of a folder waiting, where its file system can."""
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        _lock(number, wait=True)
        yield
    finally:
        os.close(number)


def _lock(number: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False when another process has it, or where that is impossible."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (OSError, AttributeError):
        return False
    return True


@contextmanager
def undisturbed(folder: str | os.PathLike) -> Iterator[None]:
    """Refuse what the block reads of a checkpoint when something is saved into its folder at the same time.

    A Hub id is no folder: what is downloaded is of one revision, and never replaced.

    Raises:
        ValueError: files were replaced, or a save has not come to its end; any error in the block is its cause.
    """
    before = _files_of_checkpoint(folder)
    _check_untouched(folder, before)
    try:
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


def _check_untouched(folder: str | os.PathLike, before: Mapping[str, Any], cause: Exception | None = None) -> None:
    if UNFINISHED in before or _files_of_checkpoint(folder) != before:
        rule = "Something was being saved into it, so that what was read may be of two checkpoints."
        remedy = "Try again when that has ended; if it was stopped in the middle, save or download it again."
        raise invalid("pretrained_model_name_or_path", str(folder), rule, remedy) from cause
