"""`flextron bench`."""

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Model, command, device_or_default, dtype_named, local_folder, parse_numbers, print_result
from .refusals import invalid


def bench(
    model: Model,
    budgets: Annotated[str | None, typer.Option(help="Budgets to measure: 1,0.5,0.25; default: all rows.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens read and kept while more are made; default: 512, if they fit.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at the same time.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="How often everything is timed.")] = 15,
    dtype: Annotated[str, typer.Option(help="Dtype to measure in; auto is that of the weights.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option(help="Write the result into this file, too.")] = None,
) -> dict[Path, dict[str, Any]]:
    """Measure what elasticity costs here: time against stock models of the same size, speed and loading of every size.

    Example: `flextron bench elastic --budgets 1,0.5 --device cuda --dtype bfloat16`

    Compared are a sub-network of the whole family, a model loaded at the budget, and the stock model that `extract()`
    makes, with a second copy of it as a control: where that is far from 1, the machine was busy. Loading is measured in
    fresh processes, with the files dropped from the cache of the system. On a busy machine, use one thread.
    """
    import torch

    from ..files import write_json
    from ..measuring.bench import bench as run
    from ..measuring.bench import tables, warnings

    if json_file is not None and not json_file.parent.is_dir():
        raise invalid("json_file", str(json_file), "Its folder does not exist.", "Make the folder first.")
    if threads is not None:
        torch.set_num_threads(threads)
    sizes: Any = parse_numbers("batch_sizes", batch_sizes)
    result = run(
        local_folder(model),
        budgets and [part.strip() for part in budgets.split(",")],
        context=context,
        batch_sizes=sizes,
        rounds=rounds,
        device=device_or_default(device),
        dtype=dtype_named(dtype),
    )
    result["model"] = model
    if json_file is not None:
        write_json(json_file, result)
    print_result(
        command("export", model, "small", "--budget", result["speed"][-1]["budget"]),
        tables=chain(tables(result), warnings(result)),
        **result,
    )
    return {} if json_file is None else {json_file: {}}
