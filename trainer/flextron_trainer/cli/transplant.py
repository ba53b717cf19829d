"""`flextron transplant`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Output, Trust, command, copy_tokenizer, different_folders, print_result


def transplant(
    elastic: Annotated[
        str, typer.Argument(help="Folder or Hub id of the elastic model of a base.", show_default=False)
    ],
    variant: Annotated[
        str,
        typer.Argument(help="Folder or Hub id of a model trained on from that base, or of an adapter of it.",
                       show_default=False),
    ],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base; by default what the elastic model names.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a base on the Hub.")] = None,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:  # fmt: skip
    """Carry what an elastic model of a base has learned to a variant of the base, such as its instruct model.

    Example: `flextron transplant run meta-llama/Llama-3.2-1B-Instruct elastic-instruct --base meta-llama/Llama-3.2-1B`

    Weights become those of the variant plus what training changed in those of the base; sizes, rows and corrections
    stay. Nothing is trained. Tokenizer, chat template and generation config are the variant's. `flextron evaluate` says
    what the rows are worth: figures of the base do not carry over.
    """
    from ..conversion.parents import place_of
    from ..conversion.transplant import transplant as run
    from ..publishing.card import write_model_card

    for source in (elastic, variant, *([] if base is None else [base])):
        different_folders(source, output)
    result = run(elastic, variant, base, base_revision=base_revision, trust_remote_code=trust_remote_code)
    result.save_pretrained(output)
    copy_tokenizer(place_of(variant, "tokenizer_config.json"), output, trust_remote_code)
    write_model_card(result, output)
    made = (result.config.conversion or {})["transplanted"]
    then = command("evaluate", output, "./held-out", "--write")
    print_result(then, output=str(output), **made, frontier=[row.to_dict() for row in result.frontier])
    return {output: {}}
