"""Text from sub-networks: at a budget, with a smaller one that drafts, or each sequence of a batch at its own.

Sequences of several budgets run together with those that share their sub-network. Which draft pays, and how long it
should be, is said by `drafting.py`; requests that come and go are batched by transformers, in a model of their own.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationMixin

from .drafting import Drafts, Watch, constant, share_draft
from .errors import invalid
from .subnetwork import SubNetwork, is_routed, parameters_of
from .thinking import Phases, is_phased, read_phases, refuse_company

_ROWS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
_OF_ONE_SIZE = (
    "labels", "head_loss", "past_key_values", "cache", "use_cache", "output_hidden_states", "output_attentions",
)  # fmt: skip


class FlextronGenerationMixin(GenerationMixin):
    """`generate` and continuous batching at a budget, for a model with `SwitchingMixin`."""

    def generate(self, *args, flextron_budget: Any = None, draft_budget: Any = None, **kwargs):
        """Generate like `GenerationMixin.generate`, at `flextron_budget`; other callers of the model see nothing of it.

        A list of budgets has one for each sequence; each is continued as if it were alone. A smaller `draft_budget`
        drafts, which changes no greedy output; with `"auto"` the size and the length of drafts that are fastest by the
        latency table and by what earlier calls kept of them, or none (`drafts.chosen`).

        With `{"thinking": 0.5, "answer": 1}` the budget changes behind the token that ends the thinking: that of the
        chat template of `tokenizer=`, or `"end": token_id`. The KV cache is kept, or where its shapes do not fit the
        text is read once more. Each sequence of a batch is continued by itself then.

        Raises:
            ValueError: a budget means nothing here, or stands in a generation config; `assistant_early_exit`; or
                `custom_generate` of a repo that is not trusted.
        """
        kwargs = by_name(GenerationMixin.generate, self, args, kwargs) if args else kwargs
        check_generation(self, kwargs)
        each = flextron_budget if is_list(flextron_budget) else [flextron_budget]
        each = [read_phases(self, one, kwargs.get("tokenizer")) if is_phased(one) else one for one in each]
        if phases := [one for one in each if isinstance(one, Phases)]:
            settings = {"draft_budget": draft_budget, **kwargs}
            refuse_company(phases, self.config, settings, kwargs.get("generation_config"), self.generation_config)
        if draft_budget is not None:
            return generate_drafted(self, draft_budget, flextron_budget, kwargs)
        if is_list(flextron_budget):
            return generate_each(self, each, kwargs)
        if isinstance(each[0], Phases):
            return self._think(each[0], kwargs)
        subnetwork = self.resolve_budget(flextron_budget)  # once: a default that changes meanwhile is for later calls
        if kwargs.get("assistant_model") is not None:  # which would be given every keyword of this model, too
            with self.at_budget(subnetwork):
                return super().generate(**kwargs)
        return super().generate(flextron_budget=subnetwork, **kwargs)

    def _think(self, phases: Phases, kwargs: dict[str, Any]) -> Any:
        """Generate at one size while the text thinks, and at another one behind it."""
        sequences = sequences_of(kwargs)
        if sequences is not None and len(sequences) > 1:
            return generate_each(self, [replace(phases) for _ in sequences], kwargs)
        return super().generate(flextron_budget=phases.behind(sequences, kwargs.get("tokenizer")), **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args, inputs_embeds: Any = None, flextron_budget: Any = None, **kwargs
    ):
        """Prepare like `GenerationMixin.prepare_inputs_for_generation`, at the size that writes the next token."""
        if isinstance(flextron_budget, Phases):
            cache: Any = kwargs.get("past_key_values", kwargs.get("cache"))
            if flextron_budget.must_read_again(input_ids, cache, self.config, kwargs.get("attention_mask")):
                cache.reset()
                kwargs["next_sequence_length"] = None
            flextron_budget = flextron_budget.at(input_ids)
        kwargs |= {"inputs_embeds": inputs_embeds, "flextron_budget": flextron_budget}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *,
        flextron_budget: Any = None,
        **kwargs,
    ):
        """Make a manager of requests like `ContinuousMixin.init_continuous_batching`, all at `flextron_budget`.

        The manager runs in a thread of its own and keeps the size that it begins with, so it gets a model of its own
        (`share`); none is kept for a next call, as `persistent_manager=True` would have it.
        """
        model = self.share(self.resolve_budget(flextron_budget))
        # Pages have one shape for all layers: that of the largest, which a config whose layers differ gives if allowed.
        model.config.allow_global_per_layer_attribute_access = True
        if is_routed(model.subnetwork) and self.device.type == "cuda":  # tokens choose where a graph cannot look
            continuous_batching_config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
            continuous_batching_config.use_cuda_graph = False
        settings = generation_config, continuous_batching_config
        return GenerationMixin.init_continuous_batching(model, *settings, **kwargs)

    def generate_batch(self, *args, flextron_budget: Any = None, **kwargs):
        """Generate like `ContinuousMixin.generate_batch`, with all requests at `flextron_budget`."""
        if flextron_budget is not None:
            return self.share(flextron_budget).generate_batch(*args, **kwargs)
        return super().generate_batch(*args, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        return None  # what is allocated before the first token cannot know the budget


def by_name(function: Callable, model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name all arguments of a call of a method, but for the model."""
    found = inspect.signature(function).bind_partial(model, *args, **kwargs).arguments
    del found["self"]
    return found.pop("kwargs", {}) | found


def check_generation(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what a generation config cannot say here, and to run code that nobody trusts.

    Raises:
        ValueError: it has a budget, which transformers would drop; or asks to draft by leaving layers out, for which
            transformers changes the model; or `custom_generate` names a repo, and nobody said that its code may run.
    """
    if isinstance(code := kwargs.get("custom_generate"), str) and not kwargs.get("trust_remote_code"):
        remedy = "Read it, and pass `trust_remote_code=True` as well."
        raise invalid("custom_generate", code, "This runs the code that lies there.", remedy)
    for config in (kwargs.get("generation_config"), model.generation_config):
        for name in ("flextron_budget", "draft_budget"):
            if getattr(config, name, None) is not None:
                rule = "A budget is an argument of `generate`, and no part of a generation config."
                remedy = f"Pass `generate(..., {name}=...)`, and set the attribute to None."
                raise invalid(f"generation_config.{name}", getattr(config, name), rule, remedy)
        early = kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None))
        if early is not None:
            rule = "Layers are left out by a budget."
            remedy = "Pass `draft_budget=` with a smaller budget, for instance {'layers': N} of an elastic depth."
            raise invalid("assistant_early_exit", early, rule, remedy)


def generate_drafted(model: Any, draft_budget: Any, flextron_budget: Any, kwargs: dict[str, Any]) -> Any:
    """`model.generate` at `flextron_budget` with a draft at `draft_budget`, or with the one that `"auto"` chooses.

    Raises:
        ValueError: there is an `assistant_model` as well, or more than one sequence; the budget means nothing here,
            or a sub-network that is not smaller than the one that it is to draft for.
    """
    if kwargs.get("assistant_model") is not None:
        rule = "The `assistant_model` drafts already."
        raise invalid("draft_budget", draft_budget, rule, "Leave out one of the two.")
    sequences = sequences_of(kwargs)
    if sequences is not None and len(sequences) > 1:
        rule = f"Drafts are written for one sequence at a time, and the batch has {len(sequences)}."
        raise invalid("draft_budget", draft_budget, rule, "Leave it out, or make one call for each sequence.")
    verifier = model.resolve_budget(flextron_budget)
    if draft_budget != "auto":
        draft = share_draft(model, _resolve(model, draft_budget, verifier), **kwargs)
        return model.generate(flextron_budget=verifier, assistant_model=draft, **kwargs)
    drafts: Drafts = model.drafts
    chosen = drafts.choose(model, verifier)
    if chosen is None:
        return model.generate(flextron_budget=verifier, **kwargs)
    subnetwork, length = chosen
    draft = share_draft(model, subnetwork, **constant(length))
    watch = Watch(kwargs.pop("streamer", None))
    result = model.generate(flextron_budget=verifier, assistant_model=draft, streamer=watch, **kwargs)
    drafts.add(verifier, subnetwork, *watch.kept(length))
    return result


def _resolve(model: Any, budget: Any, verifier: SubNetwork) -> SubNetwork:
    """Resolve the budget of a draft for a verifier."""
    try:
        draft = model.resolve_budget(budget)
    except ValueError as error:  # in the words of another argument
        rule = f'It is "auto" or a budget: {error}'
        raise invalid("draft_budget", budget, rule, "Pass for instance 0.25.") from None
    size = parameters_of(model.config)
    if size(draft) >= size(verifier):
        rule = "It means a sub-network that is not smaller than the one it is to draft for."
        raise invalid("draft_budget", budget, rule, "Pass a smaller budget, or load or run the model at a larger one.")
    return draft


def is_list(budget: Any) -> bool:
    """Whether a budget is one for each row."""
    return isinstance(budget, (list, tuple))


def sequences_of(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Find the sequences that a call of `generate` is to continue; None without any."""
    given = (kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))
    return next((value for value in given if value is not None), None)


def rows_of(model, budgets: list, batch: int) -> dict[Any, torch.Tensor]:
    """Sub-network, or `Phases` of one row -> the rows `[n]` of the batch that ask for it.

    Raises:
        ValueError: not one budget for each row, or one that means nothing here.
    """
    if len(budgets) != batch:
        rule = f"A list has one budget for each sequence, and the batch has {batch}."
        raise invalid("flextron_budget", budgets, rule, "Pass so many, or one budget for all.")
    rows: dict[Any, list[int]] = {}
    for row, budget in enumerate(budgets):
        rows.setdefault(budget if isinstance(budget, Phases) else model.resolve_budget(budget), []).append(row)
    return {subnetwork: torch.tensor(which) for subnetwork, which in rows.items()}


def per_row(forward: Callable) -> Callable:
    """Let a forward pass that returns `logits` take a list of budgets, one for each sequence."""

    @functools.wraps(forward)
    def each(self, *args, flextron_budget: Any = None, **kwargs):
        if not is_list(flextron_budget):
            return forward(self, *args, flextron_budget=flextron_budget, **kwargs)
        given = by_name(forward, self, args, kwargs)
        _refuse(given, *_OF_ONE_SIZE)
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


def generate_each(model, budgets: list, kwargs: dict[str, Any]) -> torch.Tensor:
    """`model.generate` for a list of budgets, one for each sequence.

    Returns:
        Ids `[rows, longest]`, padded on the right.
    """
    _refuse(kwargs, "past_key_values", "cache", "return_dict_in_generate", "streamer")
    batch = sequences_of(kwargs)
    if batch is None:
        raise invalid("inputs", None, "A list of budgets needs the sequences that they are for.", "Pass `input_ids`.")
    settings = kwargs.get("generation_config") or model.generation_config
    found: dict[int, torch.Tensor] = {}
    for subnetwork, rows in rows_of(model, budgets, len(batch)).items():
        # What is a setting, such as the tokens that end a text, is one for all of them.
        part = {k: value if hasattr(settings, k) else _pick(value, rows, len(batch)) for k, value in kwargs.items()}
        sequences = model.generate(**part, flextron_budget=subnetwork)
        each = len(sequences) // len(rows)  # beams or samples that come back for one sequence
        found |= {row * each + i: sequences[n * each + i] for n, row in enumerate(rows.tolist()) for i in range(each)}
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
