"""`flextron teach`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    AssistantOnly,
    Boundaries,
    Device,
    Trust,
    as_datasets,
    command,
    device_or_default,
    dtype_named,
    fitting_length,
    packed,
    print_result,
)


def teach(
    parent: Annotated[str, typer.Argument(help="Folder or Hub id of the teacher.", show_default=False)],
    dataset: Annotated[str, typer.Argument(help=f"The text that is trained on: {DATA}", show_default=False)],
    cache: Annotated[Path, typer.Argument(help="Folder to write, or to go on with.", show_default=False)],
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="More of it, as in `train`; repeatable.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample, as in `train`: 1024")] = None,
    document_boundaries: Boundaries = None,
    assistant_only: AssistantOnly = None,
    draws: Annotated[int, typer.Option(help="Tokens that are drawn at each token of the text; at most 255.")] = 50,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    vocab_size: Annotated[int | None, typer.Option(help="Draw from so many tokens; default: all.")] = None,
    max_samples: Annotated[int | None, typer.Option(help="Read no more samples than this.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 8,
    split: Annotated[str, typer.Option(help="Split of a text on the Hub.")] = "train",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the text while the teacher does.")] = False,
    num_proc: Annotated[int | None, typer.Option(help="Processes to tokenize with.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the teacher; auto keeps its own.")] = "auto",
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Let a teacher read a text once, so that training on it needs no teacher in memory.

    Example: `flextron teach meta-llama/Llama-3.2-1B ./text cache --sequence-length 1024`

    Example: `flextron train elastic ./text --teacher cache --sequence-length 1024 --output_dir run --max_steps 1000`

    At every token some tokens are drawn from what the teacher predicts; on average the loss and its gradient are those
    of the teacher itself. Started again after a stop, it goes on behind the last file that was written.
    """
    from datasets import concatenate_datasets

    from ..conversion.parents import place_of
    from ..conversion.sizes import elastic_config
    from ..data import load_tokenizer
    from ..models import read_config
    from ..training.teach import teach as run

    config = read_config(place_of(parent, "config.json"), trust_remote_code=trust_remote_code)
    if config.model_type != "flextron":  # which of the two kinds of positions it has, a stock config does not say
        config = elastic_config(config, mlp=[1], heads=[1], hidden=[1], budgets=[1])
    length = fitting_length(sequence_length, config)
    tokenizer = load_tokenizer(place_of(parent, "tokenizer_config.json"), trust_remote_code=trust_remote_code)
    sources = [dataset, *(datasets or ())]
    named = packed(sources, tokenizer, length, assistant_only, document_boundaries, num_proc, split, streaming)
    rows = concatenate_datasets(list(named.values()))
    done = run(
        parent, rows, cache, tokenizer=tokenizer, draws=draws, temperature=temperature, vocab_size=vocab_size,
        max_samples=max_samples, batch_size=batch_size, seed=seed, device=device_or_default(device),
        trust_remote_code=trust_remote_code, dtype=dtype_named(dtype),
    )  # fmt: skip
    same = () if sequence_length is None else ("--sequence-length", sequence_length)
    then = command(
        "train", "elastic", *as_datasets(sources), "--teacher", cache, *same, "--output-dir", "run", "--max-steps", 1000
    )
    print_result(then, output=str(cache), **done, bytes_per_token=round(done["bytes"] / done["tokens"], 2))
    return {cache: {"sequence_length": length}}
