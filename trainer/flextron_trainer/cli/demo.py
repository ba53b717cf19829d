"""`flextron demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DATA, Device, Trust, command, print_result


def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("flextron-demo"),
    dataset: Annotated[str, typer.Option(help=f"Text: {DATA}")] = "stdlib",
    parent: Annotated[str | None, typer.Option(help="Hub id or folder of a trained model; default: train one.")] = None,
    parent_steps: Annotated[int, typer.Option(help="Training steps of the parent.")] = 600,
    elastic_steps: Annotated[int, typer.Option(help="Steps of elastic training.")] = 200,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Train a small LLaMA, make it elastic, train it at every size, and load the result without this package.

    Example: `flextron demo --device cuda --parent meta-llama/Llama-3.2-1B --dataset ./text`
    """
    from ..demo import run

    result = run(
        output, dataset=dataset, parent=parent, device=device, parent_steps=parent_steps, elastic_steps=elastic_steps,
        seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    print_result(command("generate", result["repo"], "def main():", "--budget", 0.5), **result)
