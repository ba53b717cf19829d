"""Upload to the Hub: everything in one commit, or nothing."""

import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    create_branch,
    create_commit,
    list_repo_files,
    run_as_future,
)

from modeling_flextron.checkpoint import staging
from modeling_flextron.errors import invalid

T = TypeVar("T")
WAITS = (1, 4)  # seconds before a call is made again
SCORES = ".eval_results/flextron-{}.yaml"  # which are written anew with every card
WEIGHTS = re.compile(r"(pytorch_)?model[-.][^/]*(safetensors|bin)(\.index[^/]*\.json)?")  # shards and indices, too


def retried(call: Callable[[], T]) -> T:
    """Make a call, and again after a while when the Hub answers that it has a problem of its own (5xx)."""
    for seconds in WAITS:
        try:
            return call()
        except Exception as error:
            if not _is_of_the_hub(error):
                raise
            time.sleep(seconds)
    return call()


def _is_of_the_hub(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is an answer of a server that failed."""
    while error is not None:
        if getattr(getattr(error, "response", None), "status_code", 0) >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def files_of(folder: str | os.PathLike, prefix: str = "") -> dict[str, Path]:
    """The files in a folder, under their names in a repo: `prefix` and the path in the folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path for path in paths}


def commit_written(
    write: Callable[[str], str], blocking: bool = True, **kwargs: Any
) -> CommitInfo | Future[CommitInfo]:
    """Let `write` fill a folder, and upload that; in the background only when all of it is written.

    Args:
        write: Called with the folder; returns the repo that it is for.
        blocking: False returns a `Future` of the commit.
        kwargs: Of `commit_files`, with its errors.
    """
    with ExitStack() as stack:
        folder = str(stack.enter_context(staging(tempfile.gettempdir(), "flextron-push")))
        repo_id = write(folder)
        staged = stack.pop_all()  # or an error removes it here

    def commit() -> CommitInfo:
        with staged:
            return commit_files(files_of(folder), repo_id, **kwargs)

    return commit() if blocking else run_as_future(commit)


def commit_files(
    files: dict[str, Path],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload files in one commit, which also deletes weights and scores of an earlier upload that they replace.

    Until then the revision serves what it served before. A call that failed may be repeated, and is when the Hub had a
    problem, but not for a pull request, of which there could be two. (`upload_folder` makes several commits.)

    Args:
        files: Path in the repo -> file.
        repo_id: A repo that exists.
        revision: Branch to commit to, created when it is not there; `refs/pr/N` goes on with a pull request.
        create_pr: Open a pull request instead.

    Raises:
        ValueError: `create_pr` beside a `revision`.
        OSError: the Hub refused.
        HTTPError of the HTTP library of huggingface_hub: the Hub could not be reached.
    """
    if create_pr and revision is not None:
        rule = "A new pull request is always one against the main branch."
        raise invalid("revision", revision, rule, "Leave out one of `revision` and `create_pr`.")
    if revision is not None and not revision.startswith("refs/pr"):
        retried(lambda: create_branch(repo_id, branch=revision, token=token, exist_ok=True))
    folders = {os.path.dirname(name) for name in files}

    def replaced(name: str) -> bool:
        if fnmatchcase(name, SCORES.format("*")):
            return "README.md" in files
        return os.path.dirname(name) in folders and WEIGHTS.fullmatch(os.path.basename(name)) is not None

    def commit() -> CommitInfo:
        stale = [
            name
            for name in list_repo_files(repo_id, revision=revision, token=token)
            if name not in files and replaced(name)
        ]
        return create_commit(
            repo_id,
            [*(CommitOperationAdd(n, path) for n, path in files.items()), *(CommitOperationDelete(n) for n in stale)],
            commit_message=commit_message or "Upload Flextron model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )

    return commit() if create_pr else retried(commit)
