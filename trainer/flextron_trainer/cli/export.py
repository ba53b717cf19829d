"""`flextron export`."""

import shlex
import sys
from pathlib import Path
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
from .refusals import invalid

FORMATS = ("levels", "plain", "dense", "gguf", "mlx", "onnx", "executorch", "openvino")


def export(
    model: Model,
    output: Output,
    budget: Budget = None,
    format: Annotated[
        str | None, typer.Option(help="One of levels (default), plain, dense, gguf, mlx, onnx, executorch, openvino.")
    ] = None,
    dense: Annotated[bool, typer.Option(help="Write a stock model of the parent's family.")] = False,
    pad: Annotated[bool, typer.Option(help="With --dense: zeros where the stock class needs larger sizes.")] = False,
    plain: Annotated[bool, typer.Option(help="Whole tensors instead of levels, for engines that read them.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    snap: Annotated[bool, typer.Option(help="With --dense: the largest size that fits it and costs no more.")] = False,
    gguf: Annotated[bool, typer.Option(help="Write a file for llama.cpp; layers may differ.")] = False,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Write a model in levels, so that whoever loads it at a budget reads only what that needs; or one size of it.

    Example: `flextron export elastic to-upload`

    Example: `flextron export elastic small --dense --budget 0.5`

    With `--budget` it holds nothing larger. With `--dense` the result is a stock checkpoint that needs no code of ours.
    Where the stock class cannot hold the sizes, such as different ones in every layer, `--pad` fills them up and
    `--snap` takes smaller ones. `--gguf` writes one file (LLaMA only). `--plain` is for vLLM with our own class.
    `--format mlx` writes a folder for mlx-lm, where layers may differ.
    `--format onnx`, `executorch` and `openvino` write a program with a KV cache, run it and compare its logits;
    each is an extra, such as `pip install "flextron[onnx]"`.

    Example: `flextron export elastic program --format onnx --budget 0.5`
    """
    from ..export.dense import export_dense
    from ..export.gguf import export_gguf
    from ..export.mlx import export_mlx
    from ..export.runtimes import PACKAGES, export_program
    from ..models import load_elastic
    from ..publishing.card import write_model_card

    if format not in (None, *FORMATS):
        raise invalid("format", format, f"It is one of {', '.join(FORMATS)}.", "Pick one of them.")
    flags = {"dense": dense, "gguf": gguf, "plain": plain}
    kinds = {name for name, given in flags.items() if given} | ({format} if format else set())
    if len(kinds) > 1:
        remedy = f"Pass --{' or --'.join(name for name in flags if name in kinds)}." if format is None else "Pass one."
        raise invalid("format", sorted(kinds), "An export has one format.", remedy)
    kind = next(iter(kinds), "levels")
    different_folders(model, output, file=kind == "gguf")
    for name, value in (("pad", pad), ("snap", snap)):
        if value and kind != "dense":
            rule = "It changes sizes for a stock class alone."
            raise invalid(name, value, rule, "Pass --dense as well, or leave it out.")
    asked: Any = {"budget": budget_value(budget), "trust_remote_code": trust_remote_code}
    if kind == "dense":
        result = export_dense(model, output, **asked, pad=pad, snap=snap)
        if result["changed"]:
            print(f"The stock class cannot hold what was asked for: {result['changed']}.", file=sys.stderr)
        print_result(continue_with_transformers(output), output=str(output), dense=True, **result)
        return {output: {}}
    if kind == "gguf":
        print_result(f"llama-cli -m {output}", output=str(output), **export_gguf(model, output, **asked))
        return {output: {}}
    if kind == "mlx":
        then = shlex.join(["mlx_lm.generate", "--model", str(output), "--prompt", "Once upon a time"])
        print_result(then, output=str(output), **export_mlx(model, output, **asked))
        return {output: {}}
    if kind in PACKAGES:
        print_result(output=str(output), format=kind, **export_program(model, output, kind, **asked))
        return {output: {}}
    loaded = load_elastic(model, flextron_budget=budget_value(budget))
    write = loaded.save_pretrained if kind == "plain" else loaded.export
    write(output, max_shard_size=max_shard_size)
    copy_tokenizer(model, output, trust_remote_code)
    write_model_card(loaded, output)
    print_result(
        command("push", output, "you/name"), output=str(output), parameters=loaded.num_parameters(), dense=False
    )
    return {output: {}}


def continue_with_transformers(folder: Path) -> str:
    """A command that continues a text with a stock model, and needs nothing but transformers."""
    write = f"print(pipeline('text-generation', {str(folder)!r})('Once upon a time'))"
    return shlex.join(["python", "-c", f"from transformers import pipeline; {write}"])
