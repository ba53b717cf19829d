"""`flextron generate`."""

from typing import Annotated, Any

import typer

from .options import Budget, Device, Model, Trust, budget_value, command, device_or_default, print_result


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most likely token.")] = False,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text at a budget.

    Example: `flextron generate elastic "def main():" --budget 0.5`

    Example: `flextron generate elastic "1 + 1?" --budget '{"thinking": 0.5, "answer": 1}'`
    """
    import torch

    from modeling_flextron.errors import invalid
    from modeling_flextron.thinking import is_phased

    from ..data import load_tokenizer
    from ..models import load_elastic

    torch.manual_seed(seed)
    asked: Any = budget_value(budget)
    loaded_at = None if is_phased(asked) else asked
    loaded = load_elastic(model, flextron_budget=loaded_at, device_map=device_or_default(device))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise invalid("prompt", prompt, "It has no tokens to continue.", "Write at least a word.")
    sizes = {"flextron_budget": asked, "tokenizer": tokenizer} if is_phased(asked) else {}
    ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, **sizes)
    print_result(
        command("evaluate", model, "./held-out"),
        budget=budget,
        parameters=loaded.num_parameters(),
        text=tokenizer.decode(ids[0], skip_special_tokens=True),
    )
