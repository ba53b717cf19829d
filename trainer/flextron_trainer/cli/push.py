"""`flextron push`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Trust, command, must_be_a_model, print_result


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub, user/name.", show_default=False)],
    private: Annotated[bool | None, typer.Option(help="Create the repo as private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created when it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag for the card; repeatable.")] = None,
    token: Annotated[str | None, typer.Option(help="By default the one of `hf auth login`.", envvar="HF_TOKEN")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Upload a saved model with its tokenizer to the Hub, in one commit; its card is written anew.

    Example: `flextron push elastic me/flextron-llama --private`
    """
    from modeling_flextron import FlextronConfig

    from ..data import load_tokenizer
    from ..models import kind_of, load_elastic

    must_be_a_model(folder)
    model = load_elastic(folder, kind_of(FlextronConfig.from_pretrained(folder)))
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        tokenizer = None
        print(f"No tokenizer is pushed: {error}", file=sys.stderr)
    commit = model.push_to_hub(
        repo_id, tokenizer=tokenizer, private=private, revision=revision, create_pr=create_pr, token=token, tags=tag,
        commit_message=commit_message,
    )  # fmt: skip
    repo = commit.repo_url.repo_id
    then = command("generate", repo, "Once upon a time", "--budget", 0.5)
    print_result(then, repo=repo, commit=commit.oid, pull_request=commit.pr_url)
