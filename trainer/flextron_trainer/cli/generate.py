"""`flextron generate`."""

import sys
from typing import Annotated, Any

import typer

from .options import Budget, Device, Model, Trust, budget_value, command, device_or_default, print_result
from .refusals import invalid


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    budget: Budget = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the text, through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most likely token.")] = False,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text at a budget, or answer it. On a terminal it appears as it is written.

    Example: `flextron generate elastic "def main():" --budget 0.5`

    Example: `flextron generate elastic "1 + 1?" --budget '{"thinking": 0.5, "answer": 1}'`
    Example: `flextron generate elastic "Why is the sky blue?" --chat --budget 0.5`
    """
    import torch
    from transformers import TextStreamer

    from modeling_flextron.thinking import is_phased

    from ..conversations import written
    from ..data import load_tokenizer
    from ..models import load_elastic

    torch.manual_seed(seed)
    asked: Any = budget_value(budget)
    loaded_at = None if is_phased(asked) else asked

    class ToStderr(TextStreamer):  # stdout is for the result
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", file=sys.stderr, flush=True)

    loaded = load_elastic(model, flextron_budget=loaded_at, device_map=device_or_default(device))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    text = prompt
    if chat:
        text = written(tokenizer, [{"role": "user", "content": prompt}], "prompt", add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise invalid("prompt", prompt, "It has no tokens to continue.", "Write at least a word.")
    sizes = {"flextron_budget": asked, "tokenizer": tokenizer} if is_phased(asked) else {}
    streamer = None
    if sys.stderr.isatty():
        streamer = ToStderr(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, streamer=streamer, **sizes)[0]
    ids = ids[inputs["input_ids"].shape[1] :] if chat else ids
    print_result(
        command("evaluate", model, "./held-out"),
        budget=budget,
        parameters=loaded.num_parameters(),
        text=tokenizer.decode(ids, skip_special_tokens=True),
    )
