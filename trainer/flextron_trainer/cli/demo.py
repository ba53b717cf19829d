"""`flextron demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DATA, Device, Trust, print_result


def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("flextron-demo"),
    dataset: Annotated[str, typer.Option(help=f"Text: {DATA}")] = "stdlib",
    parent: Annotated[str | None, typer.Option(help="Hub id or folder of a trained model; default: train one.")] = None,
    parent_steps: Annotated[int, typer.Option(help="Training steps of the parent.")] = 600,
    elastic_steps: Annotated[int, typer.Option(help="Steps of elastic training.")] = 200,
    router_steps: Annotated[int, typer.Option(help="Steps in which tokens learn to choose their sizes.")] = 40,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Train a small LLaMA, make it elastic, train it at every size, and load the result without this package.

    Every kind of budget means something for the model that it leaves: `flextron generate flextron-demo/elastic
    "def main():" --budget 25ms`, or `loss<=4`, `small`, `auto:0.5`.

    Example: `flextron demo --device cuda --parent meta-llama/Llama-3.2-1B --dataset ./text`
    """
    from ..demo import run

    result = run(
        output, dataset=dataset, parent=parent, device=device, parent_steps=parent_steps, elastic_steps=elastic_steps,
        router_steps=router_steps, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    print_result(tables=(), **result)  # it has told people all of it
    return {output: {}}
