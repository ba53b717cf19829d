"""`flextron export`."""

import sys
from typing import Annotated, Any

import typer

from .options import (
    Budget,
    Model,
    Output,
    Trust,
    budget_value,
    command,
    copy_tokenizer,
    different_folders,
    print_result,
)


def export(
    model: Model,
    output: Output,
    budget: Budget = None,
    dense: Annotated[bool, typer.Option(help="Write a stock model of the parent's family.")] = False,
    pad: Annotated[bool, typer.Option(help="With --dense: zeros where the stock class needs larger sizes.")] = False,
    plain: Annotated[bool, typer.Option(help="Whole tensors instead of levels, for engines that read them.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    snap: Annotated[bool, typer.Option(help="With --dense: the largest size that fits it and costs no more.")] = False,
    gguf: Annotated[bool, typer.Option(help="Write a file for llama.cpp; layers may differ.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model in levels, so that whoever loads it at a budget reads only what that needs; or one size of it.

    Example: `flextron export elastic to-upload`

    Example: `flextron export elastic small --dense --budget 0.5`

    With `--budget` it holds nothing larger. With `--dense` the result is a stock checkpoint that needs no code of ours.
    Where the stock class cannot hold the sizes, such as different ones in every layer, `--pad` fills them up and
    `--snap` takes smaller ones. `--gguf` writes one file (LLaMA only). `--plain` is for vLLM with our own class.
    """
    from modeling_flextron.errors import invalid
    from modeling_flextron.model_card import write_model_card

    from ..export.dense import export_dense
    from ..export.gguf import export_gguf
    from ..models import load_elastic

    different_folders(model, output)
    for name, value in (("pad", pad), ("snap", snap)):
        if value and not dense:
            rule = "It changes sizes for a stock class alone."
            raise invalid(name, value, rule, "Pass --dense as well, or leave it out.")
    if dense and gguf:
        raise invalid("gguf", gguf, "One is a folder and the other a file.", "Pass --dense or --gguf.")
    asked: Any = {"budget": budget_value(budget), "trust_remote_code": trust_remote_code}
    if dense:
        result = export_dense(model, output, **asked, pad=pad, snap=snap)
        if result["changed"]:
            print(f"The stock class cannot hold what was asked for: {result['changed']}.", file=sys.stderr)
        print_result(f"vllm serve {output}", output=str(output), dense=True, **result)
        return
    if gguf:
        print_result(f"llama-cli -m {output}", output=str(output), **export_gguf(model, output, **asked))
        return
    loaded = load_elastic(model, flextron_budget=budget_value(budget))
    write = loaded.save_pretrained if plain else loaded.export
    write(output, max_shard_size=max_shard_size)
    copy_tokenizer(model, output, trust_remote_code)
    write_model_card(loaded, output)
    print_result(
        command("push", output, "you/name"), output=str(output), parameters=loaded.num_parameters(), dense=False
    )
