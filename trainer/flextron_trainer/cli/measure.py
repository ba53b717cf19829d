"""`flextron measure`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, command, device_or_default, dtype_named, must_be_a_model, print_result


def measure(
    folder: Annotated[Path, typer.Argument(help="Folder of a Flextron model.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens read and kept while one more is made; default: 512, if they fit.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each network is timed.")] = 15,
    dtype: Annotated[str, typer.Option(help="Dtype to measure in; auto is that of the weights.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    device: Device = None,
    seed: int = 0,
) -> dict[Path, dict[str, Any]]:
    """Time every choice of a model on this machine, so that `flextron_budget="25ms"` means something.

    Example: `flextron measure elastic --device cuda --dtype bfloat16`

    The table is written to FOLDER/latency/ and listed in FOLDER/config.json; those of other devices stay. Measured
    rounds are kept, and the same command goes on after a stop.
    """
    import torch

    from modeling_flextron.frontier import held

    from ..measuring.latency import file_of, measure_into
    from ..models import load_elastic

    must_be_a_model(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_elastic(folder, dtype=dtype_named(dtype)).to(device_or_default(device))
    table = measure_into(folder, model, batch=batch, context=context, rounds=rounds, seed=seed)
    times = {name: table.predict(subnetwork) for name, subnetwork in held(model.frontier).items()}
    milliseconds = 1e3 * min(times.values())
    print_result(
        command("generate", folder, "Once upon a time", "--budget", f"{1.1 * milliseconds:.3g}ms"),
        table=str(folder / file_of(table)),
        device=table.device,
        error={mode: {key: error[key] for key in ("median", "worst")} for mode, error in table.errors.items()},
        decode_ms={name: round(1e3 * seconds, 3) for name, seconds in times.items()},
    )
    return {folder / file_of(table): {}}
