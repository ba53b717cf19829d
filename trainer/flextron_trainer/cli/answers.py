"""`flextron answers`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Budget, Device, Trust, budget_value, command, device_or_default, dtype_named, print_result
from .refusals import invalid


def answers(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, mostly the parent.", show_default=False)],
    prompts: Annotated[
        str,
        typer.Argument(help="Rows of `prompt`, `messages`, `instruction` or text.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="File to write, or to go on with: .jsonl.", show_default=False)],
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 8,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most likely token.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights; auto keeps theirs.")] = "auto",
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Write a model's own answers to prompts, for training: what a small size learns best is what its parent says.

    Example: `flextron answers HuggingFaceTB/SmolLM2-135M-Instruct prompts.jsonl answers.jsonl`

    Example: `flextron train elastic answers.jsonl --teacher HuggingFaceTB/SmolLM2-135M-Instruct --output_dir run`

    A run that was stopped goes on where it was. Every line says in `finish_reason` whether its answer was cut.
    """
    import torch

    from modeling_flextron import FlextronConfig

    from ..answers import write_answers
    from ..data import load_text, load_tokenizer
    from ..models import load_elastic, load_stock, read_config

    if output.suffix != ".jsonl":
        raise invalid("output", str(output), "It is a file of lines of JSON.", "Call it answers.jsonl, for instance.")
    if not sample and (temperature, top_p) != (1.0, 1.0):
        raise invalid("temperature", temperature, "It and --top-p are for draws.", "Pass --sample as well.")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = load_text(prompts, split, prompts=True)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    config = read_config(model, "model", trust_remote_code=trust_remote_code)
    kind: dict[str, Any] = {"dtype": dtype_named(dtype)}
    if isinstance(config, FlextronConfig):
        loaded = load_elastic(model, flextron_budget=budget_value(budget), **kind)
    elif budget is not None:
        raise invalid("budget", budget, "This model has one size.", "Leave it out, or pass an elastic model.")
    else:
        loaded = load_stock(model, "model", trust_remote_code=trust_remote_code, **kind)
    loaded.to(torch.device(device_or_default(device))).eval()
    sampling: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
    if sample:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    counts = write_answers(
        loaded, tokenizer, rows, output, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed,
        do_sample=sample, **sampling,
    )  # fmt: skip
    then = command("train", "elastic", output, "--teacher", model, "--output-dir", "run", "--max-steps", 1000)
    print_result(then, output=str(output), **counts)
    return {output: {}}
