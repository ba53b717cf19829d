"""`flextron verify`."""

from typing import Annotated

import typer

from .options import command, local_folder, print_result


def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model in levels.", show_default=False)],
) -> None:
    """Check every file of a model in levels: sizes, hashes, and that its blocks make up every tensor of every size.

    Example: `flextron verify me/flextron-llama`
    """
    from ..export.verify import verify as run

    print_result(command("generate", model, "Once upon a time"), model=model, **run(local_folder(model)))
