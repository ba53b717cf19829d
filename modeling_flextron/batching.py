"""Each sequence of a batch at its own budget: the rows that share a sub-network run together."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .errors import invalid
from .subnetwork import SubNetwork

_ROWS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def is_list(budget: Any) -> bool:
    """Whether a budget is one for each row."""
    return isinstance(budget, (list, tuple))


def sequences_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a call of `generate` is to continue."""
    given = (kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))
    return next((value for value in (*args[:1], *given) if value is not None), None)


def rows_of(model, budgets: list, batch: int) -> dict[SubNetwork, torch.Tensor]:
    """Sub-network -> the rows `[n]` of the batch that ask for it.

    Raises:
        ValueError: not one budget for each row, or one that means nothing here.
    """
    if len(budgets) != batch:
        rule = f"A list has one budget for each sequence, and the batch has {batch}."
        raise invalid("flextron_budget", budgets, rule, "Pass so many, or one budget for all.")
    rows: dict[SubNetwork, list[int]] = {}
    for row, budget in enumerate(budgets):
        rows.setdefault(model.resolve_budget(budget), []).append(row)
    return {subnetwork: torch.tensor(which) for subnetwork, which in rows.items()}


def per_row(forward: Callable) -> Callable:
    """Let a forward pass that returns `logits` take a list of budgets, one for each sequence."""

    @functools.wraps(forward)
    def each(self, *args, flextron_budget: Any = None, **kwargs):
        if not is_list(flextron_budget):
            return forward(self, *args, flextron_budget=flextron_budget, **kwargs)
        given = inspect.signature(forward).bind(self, *args).arguments | kwargs
        given.pop("self")
        _refuse(
            given,
            "labels",
            "head_loss",
            "past_key_values",
            "cache",
            "use_cache",
            "output_hidden_states",
            "output_attentions",
        )
        batch = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        logits: torch.Tensor | None = None
        for subnetwork, rows in rows_of(self, flextron_budget, len(batch)).items():
            part = {key: _pick(value, rows, len(batch)) if key in _ROWS else value for key, value in given.items()}
            part |= {"use_cache": False, "return_dict": True}
            output = forward(self, flextron_budget=subnetwork, **part)
            if logits is None:
                logits = output.logits.new_empty(len(batch), *output.logits.shape[1:])
            logits[rows] = output.logits
        return type(output)(logits=logits)

    return each


def generate_each(model, budgets: list, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """`model.generate` for a list of budgets, one for each sequence.

    Returns:
        Ids `[rows, longest]`, padded on the right.
    """
    if args:
        kwargs = {"inputs": args[0], **dict(zip(("generation_config",), args[1:], strict=False)), **kwargs}
    _refuse(kwargs, "past_key_values", "cache", "return_dict_in_generate", "streamer")
    batch = sequences_of((), kwargs)
    if batch is None:
        raise invalid("inputs", None, "A list of budgets needs the sequences that they are for.", "Pass `input_ids`.")
    found: dict[int, torch.Tensor] = {}
    for subnetwork, rows in rows_of(model, budgets, len(batch)).items():
        part = {key: _pick(value, rows, len(batch)) for key, value in kwargs.items()}
        sequences = model.generate(**part, flextron_budget=subnetwork)
        each = len(sequences) // len(rows)  # beams or samples that come back for one sequence
        found |= {row * each + i: sequences[n * each + i] for n, row in enumerate(rows.tolist()) for i in range(each)}
    settings = kwargs.get("generation_config") or model.generation_config
    padding = kwargs.get("pad_token_id", settings.pad_token_id)
    if padding is None:
        padding = torch.as_tensor(settings.eos_token_id or 0).flatten()[0].item()
    ordered = [found[row] for row in sorted(found)]
    return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=padding)


def _refuse(given: dict[str, Any], *names: str) -> None:
    for name in names:
        if given.get(name) is not None and given[name] is not False:
            rule = "Sequences of several budgets have no such thing in common."
            raise invalid(name, "given", rule, "Leave it out, or make one call for each budget.")


def _pick(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """The rows of a tensor that has one for each sequence; anything else as it is."""
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
    return value[rows.to(value.device)] if has_rows else value
