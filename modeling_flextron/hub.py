"""Upload to the Hub: everything in one commit, or nothing."""

import os
import re
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    create_branch,
    create_commit,
    list_repo_files,
)

from .errors import invalid

WEIGHTS = re.compile(r"(pytorch_)?model[-.][^/]*(safetensors|bin)(\.index[^/]*\.json)?")  # shards and indices, too


def files_of(folder: str | os.PathLike, prefix: str = "") -> dict[str, Path]:
    """The files in a folder, under their names in a repo: `prefix` and the path in the folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path for path in paths}


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
    """Upload files in one commit, which also deletes the weights of an earlier upload that they replace.

    Until that commit the revision serves what it served before. A call that failed may be repeated: blobs that have
    arrived are not sent again. (`upload_folder` would split a large folder into several commits.)

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
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    folders = {os.path.dirname(name) for name in files}
    stale = [
        name
        for name in list_repo_files(repo_id, revision=revision, token=token)
        if name not in files and os.path.dirname(name) in folders and WEIGHTS.fullmatch(os.path.basename(name))
    ]
    return create_commit(
        repo_id,
        [CommitOperationAdd(name, path) for name, path in files.items()] + [CommitOperationDelete(n) for n in stale],
        commit_message=commit_message or "Upload Flextron model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
