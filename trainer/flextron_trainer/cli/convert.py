"""`flextron convert`."""

import inspect
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    PRESETS,
    Device,
    Output,
    Trust,
    command,
    copy_tokenizer,
    device_or_default,
    different_folders,
    dtype_named,
    parse_numbers,
    print_result,
)
from .refusals import invalid


def convert(
    parent: Annotated[
        str, typer.Argument(help="Folder or Hub id of a trained model, or of an adapter.", show_default=False)
    ],
    output: Output,
    preset: Annotated[str | None, typer.Option(help=f"Defaults for the options below: {PRESETS}")] = None,
    calibration: Annotated[
        str | None, typer.Option(help=f"Text to rank with: {DATA} 'weights': none, rank by the norms of the weights.")
    ] = None,
    mlp: Annotated[str | None, typer.Option(help="Neurons, fractions or sizes; default: about thirty-seconds.")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads; default: about eighths, down to a quarter.")] = None,
    hidden: Annotated[str | None, typer.Option(help="Residual channels; default: all, for GPT as heads.")] = None,
    depth: Annotated[str | None, typer.Option(help="Layers: 1,0.75; default: all.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Budgets of the frontier: 1,0.75,0.5,0.25")] = None,
    max_samples: Annotated[int | None, typer.Option(help="Calibration samples: 1024")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample: 512")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a forward pass: 8")] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="Of neurons and heads: importance, norms, variance or obs; random and reverse are controls."
            " Default: auto, what loses least."
        ),
    ] = None,
    corrections: Annotated[
        float | None,
        typer.Option(help="Part of its parameters that a row may own to make up for what it lacks: 0.03; default: 0."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform/--no-uniform", help="Rows whose layers are alike, or each layer as loses least."),
    ] = True,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Turn the residual stream into its principal axes; for smaller sizes of hidden."),
    ] = False,
    block_steps: Annotated[
        int | None,
        typer.Option(help="Steps in which what rows own learns in each layer, with --corrections; default: 0."),
    ] = None,
    search_evaluations: Annotated[
        int | None,
        typer.Option(help="Search each budget's row among networks whose layers differ, e.g. 200; default: 0."),
    ] = None,
    nested: Annotated[
        bool, typer.Option("--nested/--no-nested", help="Rows that contain each other, or each chosen by itself.")
    ] = True,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the weights in files beside OUTPUT: for what is larger than memory.")
    ] = False,
    keep_moments: Annotated[
        bool, typer.Option("--keep-moments", help="Keep second moments in OUTPUT/moments, for a later conversion.")
    ] = False,
    importance: Annotated[
        Path | None,
        typer.Option(help="File of scores to read, or to keep them in; default: OUTPUT/importance.safetensors."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the result; auto keeps the parent's.")] = "auto",
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Make a trained model elastic: LLaMA, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX and Pythia.

    Example: `flextron convert meta-llama/Llama-3.2-1B elastic --calibration ./text --mlp 1,0.75,0.5,0.25`

    With a preset: `flextron convert Qwen/Qwen3-0.6B elastic --calibration ./text --preset qwen3-0.6b`

    The importance scores stay in OUTPUT/importance.safetensors, so that a second conversion with other sizes is quick,
    into the same folder, or into another one with `--importance FIRST/importance.safetensors`.
    What was planned and measured stays in its `config.json`, under `conversion`.
    """
    from ..conversion.convert import convert as run
    from ..conversion.parents import place_of
    from ..conversion.plan import measured, plan_conversion
    from ..conversion.sizes import elastic_config
    from ..data import load_text, load_tokenizer
    from ..models import read_config, write_config
    from ..presets import load_preset
    from ..publishing.card import write_model_card

    different_folders(parent, output)
    if importance is not None and not importance.parent.is_dir():
        raise invalid("importance", str(importance), "Its folder does not exist.", "Check the path.")
    options: dict[str, Any] = {}
    parent_config = read_config(place_of(parent, "config.json"), trust_remote_code=trust_remote_code)
    if preset is not None:
        chosen = load_preset(preset)
        chosen.check(parent_config)
        options |= chosen.convert
    given = {
        "mlp": parse_numbers("mlp", mlp),
        "heads": parse_numbers("heads", heads),
        "hidden": parse_numbers("hidden", hidden),
        "depth": parse_numbers("depth", depth),
        "budgets": None if budgets is None else [part.strip() for part in budgets.split(",")],
        "max_samples": max_samples,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "order": order,
        "corrections": corrections,
        "rotate": rotate or None,
        "uniform": None if uniform else False,
        "block_steps": block_steps,
        "search_evaluations": search_evaluations,
        "nested": None if nested else False,
        "seed": seed,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    place = place_of(parent, "tokenizer_config.json")
    text = None if calibration in (None, "weights") else load_text(calibration)
    where, kind = "cpu" if offload and device is None else device_or_default(device), dtype_named(dtype)
    settings = {name: one.default for name, one in inspect.signature(run).parameters.items()} | options
    planned = None
    if calibration is not None:  # else it is refused
        sizes = {name: settings[name] for name in ("mlp", "heads", "hidden", "depth")}
        passes = ("max_samples", "sequence_length", "batch_size", "search_evaluations", "order", "corrections",
                  "block_steps", "uniform")  # fmt: skip
        with suppress(ValueError):  # the conversion itself says what is wrong
            planned = plan_conversion(
                elastic_config(parent_config, **sizes, budgets=[1]),
                dtype=None if kind == "auto" else kind,
                device=where,
                calibrated=text is not None,
                budgets=len(settings["budgets"]),
                offloaded=offload,
                keeps_moments=keep_moments,
                **{name: settings[name] for name in passes},
            )
            print(planned, file=sys.stderr)
    with measured(where) as took:
        elastic = run(
            parent,
            calibration if text is None else text,
            tokenizer=None if text is None else load_tokenizer(place, trust_remote_code=trust_remote_code),
            importance=importance or output / "importance.safetensors",
            moments=output / "moments" if keep_moments else None,
            offload_folder=output.parent if offload else None,
            device=where,
            dtype=kind,
            trust_remote_code=trust_remote_code,
            **options,
        )
        elastic.save_pretrained(output)
    plan = planned and planned.summary()
    elastic.config.conversion = {**(elastic.config.conversion or {}), "planned": plan, "measured": took}
    write_config(elastic, output)
    copy_tokenizer(place, output, trust_remote_code)
    write_model_card(elastic, output)
    data = calibration if calibration not in (None, "weights") else "./text"
    print_result(
        command("train", output, data, "--teacher", parent, "--output-dir", f"{output}-trained", "--max-steps", 1000),
        output=str(output),
        frontier=[row.to_dict() for row in elastic.frontier],
        planned=plan,
        measured=took,
    )
    return {output: {name: settings[name] for name in given} | {"budgets": [*map(str, settings["budgets"])]}}
