"""`flextron sizes`."""

from typing import Annotated

import typer

from .options import Device, Model, command, device_or_default, dtype_named, print_result


def sizes(
    model: Model,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of KV cache; repeatable. Default: 1024, 4096 and 16384.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype to load in; auto is that of the weights.")] = "auto",
    device: Device = None,
) -> None:
    """Show what every size of a model would cost on this machine, and which fit now; no weights are downloaded.

    Example: `flextron sizes me/flextron-llama --context 8192 --dtype bfloat16`

    A row fits up to the longest of the contexts for which weights and KV cache take at most 80 % of the memory that is
    free, as `flextron_budget="fit"` counts. Tokens per second come from `flextron measure` on this kind of processor.
    """
    import torch

    from modeling_flextron import FlextronConfig
    from modeling_flextron.memory import free_memory, in_units

    from ..measuring.sizes import contexts_of, sizes_here, table_of_sizes
    from ..models import read_config

    where = torch.device(device_or_default(device))
    config = read_config(model, "model", FlextronConfig)
    chosen = config.dtype if dtype == "auto" else dtype_named(dtype)
    free = free_memory(where)
    rows = sizes_here(model, config, where.type, free, contexts_of(config, context), chosen)
    name = str(chosen or "float32").removeprefix("torch.")
    told = f"{in_units(free)} are free on {where}; memory is that of weights in {name} and of the KV cache."
    main = [{name: value for name, value in row.items() if "/" not in name} for row in rows]  # a screen is not wide
    print_result(
        command("generate", model, "Once upon a time", "--budget", "fit"), tables=[table_of_sizes(main), told],
        model=model, device=str(where), free=free, dtype=name, rows=rows,
    )  # fmt: skip
