"""Speculative decoding in which a smaller sub-network of the same weights drafts, and when that pays.

A draft writes g tokens one by one; the model reads them in one pass, keeps those that it would have written, and adds
one of its own. If it keeps each with probability a (the acceptance), such a cycle gives E = (1 - a^(g+1)) / (1 - a)
tokens, and against decoding one by one it is

    E * token / (g * draft + cycle(g))

times as fast: `token` and `draft` are the seconds of a decoding step of the model and of the draft, `cycle` is what
remains of a cycle, which is the reading of g + 1 tokens and what `generate` does around it. These times are part of a
latency table (`latency.py`); acceptance is estimated from the measured losses, and then from what is observed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .batching import sequences_of
from .errors import invalid
from .subnetwork import SubNetwork, parameters_of

logger = logging.get_logger(__name__)
GAIN = 1.05  # what a prediction must promise: it has an error, and plain decoding has none
UNKNOWN = 0.7  # acceptance of a draft of which nothing was measured
WEIGHT = 32  # tokens for which an estimate counts beside those that are observed
MEMORY = 0.9  # how much of what was observed still counts at the next call
SETTINGS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


def tokens_per_cycle(acceptance: float, length: int) -> float:
    """Expected tokens of a cycle with so many drafted ones."""
    return sum(acceptance**i for i in range(length + 1))


def best_draft(
    token: float, drafts: Mapping[SubNetwork, tuple[float, float]], cycles: Mapping[int, float]
) -> tuple[SubNetwork, int] | None:
    """The draft and its length that are fastest, or None where plain decoding is.

    Args:
        token: Seconds of a plain token.
        drafts: Draft -> the seconds of its token, and its acceptance.
        cycles: Length -> the seconds of a cycle without those of the draft.
    """
    gains = {
        (draft, length): tokens_per_cycle(acceptance, length) * token / (length * seconds + cycle)
        for draft, (seconds, acceptance) in drafts.items()
        for length, cycle in cycles.items()
    }
    best = max(gains, key=gains.__getitem__, default=None)
    return best if best is not None and gains[best] >= GAIN else None


def expected_acceptance(loss: float | None, draft_loss: float | None) -> float:
    """What the losses of a model and of its draft say about acceptance.

    Sampling keeps a drafted token with probability 1 - TV of the two distributions, and TV <= sqrt(KL / 2), where the
    difference of the losses stands for KL.
    """
    if loss is None or draft_loss is None:
        return UNKNOWN
    return 1 - min(1.0, max(0.0, draft_loss - loss) / 2) ** 0.5


@dataclass
class Watch(BaseStreamer):
    """Sees the pieces in which `generate` writes, and hands them on to the streamer of the caller."""

    streamer: Any = None
    sizes: list[int] = field(default_factory=list)  # the first one is the prompt
    times: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.sizes.append(value.numel())
        self.times.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def kept(self, length: int) -> tuple[int, int]:
        """Tokens of drafts of this length that were kept, and those that were decided upon."""
        cycles = self.sizes[1:-1]  # the last one may end with the text
        kept = sum(size - 1 for size in cycles)
        return kept, kept + sum(size <= length for size in cycles)


class Drafts:
    """What a model has seen of its drafts, and which one it used last.

    `chosen` is the draft and the length of the last call with `draft_budget="auto"`; None for plain decoding.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[SubNetwork, SubNetwork], tuple[float, float]] = {}
        self.chosen: tuple[SubNetwork, int] | None = None

    def __deepcopy__(self, memo: dict) -> "Drafts":
        return Drafts()  # a twin has seen nothing; and what another thread is writing to cannot be copied

    def choose(self, model: Any, verifier: SubNetwork) -> tuple[SubNetwork, int] | None:
        """Choose by the latency table, by measured losses, and by what was seen; without times, plain decoding.

        What was seen fades with every call, so that a draft that did badly on one text is tried again on a later one.
        """
        self.chosen = None
        table = model.latency_table
        if table is None or not table.drafting:
            what = "This model has no latency table" if table is None else "The latency table has no times of drafting"
            logger.warning_once(f'{what}: `draft_budget="auto"` decodes without drafts. Run `flextron measure` first.')
            return None
        self.seen = {pair: (MEMORY * kept, MEMORY * tried) for pair, (kept, tried) in self.seen.items()}
        loop = table.drafting["loop"]
        losses = {model.resolve_budget(row.subnetwork): row.loss for row in model.frontier}
        drafts = {}
        for draft, loss in losses.items():
            kept, tried = self.seen.get((verifier, draft), (0.0, 0.0))
            expected = expected_acceptance(losses.get(verifier), loss)
            drafts[draft] = table.predict(draft) + loop, (kept + WEIGHT * expected) / (tried + WEIGHT)
        token = table.predict(verifier) + loop
        cycles = {int(length): token + more for length, more in table.drafting["more"].items()}
        self.chosen = best = best_draft(token, drafts, cycles)
        return best  # what others read may change before this call reads it again

    def add(self, verifier: SubNetwork, draft: SubNetwork, kept: int, decided: int) -> None:
        """Count what became of drafted tokens."""
        before = self.seen.get((verifier, draft), (0.0, 0.0))
        self.seen[verifier, draft] = before[0] + kept, before[1] + decided


def check_generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse what a generation config cannot say here, and to run code that nobody trusts.

    Raises:
        ValueError: it has a budget, which transformers would drop; or asks to draft by leaving layers out, which
            transformers does by changing the model; or `custom_generate` names a repo, and transformers would ask on
            the terminal whether its code may run.
    """
    if isinstance(code := kwargs.get("custom_generate"), str) and not kwargs.get("trust_remote_code"):
        remedy = "Read it, and pass `trust_remote_code=True` as well."
        raise invalid("custom_generate", code, "This runs the code that lies there.", remedy)
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    for config in (given, model.generation_config):
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


def generate_drafted(model: Any, draft_budget: Any, flextron_budget: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`model.generate` at `flextron_budget` with a draft at `draft_budget`, or with the one that `"auto"` chooses.

    Raises:
        ValueError: there is an `assistant_model` as well, or more than one sequence; the budget means nothing here,
            or a sub-network that is not smaller than the one that it is to draft for.
    """
    if kwargs.get("assistant_model") is not None:
        rule = "The `assistant_model` drafts already."
        raise invalid("draft_budget", draft_budget, rule, "Leave out one of the two.")
    sequences = sequences_of(args, kwargs)
    if sequences is not None and len(sequences) > 1:
        rule = f"Drafts are written for one sequence at a time, and the batch has {len(sequences)}."
        raise invalid("draft_budget", draft_budget, rule, "Leave it out, or make one call for each sequence.")
    verifier = model.resolve_budget(flextron_budget)
    if draft_budget != "auto":
        draft = share_draft(model, _resolve(model, draft_budget, verifier), **kwargs)
        return model.generate(*args, flextron_budget=verifier, assistant_model=draft, **kwargs)
    drafts: Drafts = model.drafts
    chosen = drafts.choose(model, verifier)
    if chosen is None:
        return model.generate(*args, flextron_budget=verifier, **kwargs)
    subnetwork, length = chosen
    draft = share_draft(model, subnetwork, **constant(length))
    watch = Watch(kwargs.pop("streamer", None))
    result = model.generate(*args, flextron_budget=verifier, assistant_model=draft, streamer=watch, **kwargs)
    drafts.add(verifier, subnetwork, *watch.kept(length))
    return result


def constant(length: int) -> dict[str, Any]:
    """Settings with which every draft has this length."""
    return dict(zip(SETTINGS, (length, "constant", 0.0), strict=True))


def share_draft(model: Any, subnetwork: SubNetwork, **settings: Any) -> Any:
    """`model.share(subnetwork)` with what `settings` say about drafts: `generate` reads that from the draft alone."""
    draft = model.share(subnetwork)
    for name in SETTINGS:
        if settings.get(name) is not None:
            setattr(draft.generation_config, name, settings[name])
    return draft


def _resolve(model: Any, budget: Any, verifier: SubNetwork) -> SubNetwork:
    """The sub-network of a draft."""
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
