"""Speculative decoding in which a smaller sub-network of the same weights drafts, and when that pays.

A draft writes g tokens; the model reads them in one pass, keeps those that it would have written, and adds one. If it
keeps each with probability a (the acceptance), such a cycle gives E = (1 - a^(g+1)) / (1 - a) tokens, and it is

    E * token / (g * draft + cycle(g))

times as fast as plain decoding: `token` and `draft` are the seconds of a decoding step of the model and of the draft,
`cycle` is what remains of a cycle: reading g + 1 tokens, and what `generate` does around it. These times are part of a
latency table (`latency.py`); acceptance is estimated from the measured losses, and then from what is observed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .subnetwork import SubNetwork

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
    """Estimate acceptance from the losses of a model and of its draft.

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
    """Remembers how a model's drafts did, chooses the next one, and says which was used last.

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


def constant(length: int) -> dict[str, Any]:
    """Settings with which every draft has this length."""
    return dict(zip(SETTINGS, (length, "constant", 0.0), strict=True))


def share_draft(model: Any, subnetwork: SubNetwork, **settings: Any) -> Any:
    """Make a model object that drafts at a sub-network for one call of `model.generate`.

    It is a head and a decoder of its own around the very layers of `model`, whose config it shares too: so there is
    nothing that could be out of date, and it costs a small part of `model.share`, which copies every module.
    What the `settings`, keywords of `generate`, say about drafts is put into its generation config.
    """
    decoder = model.base_model
    parts = (*model.children(), *decoder.children(), model.config, model._resolver, decoder._resolver)
    draft = model._twin(subnetwork, (part for part in parts if part is not decoder))
    for name in SETTINGS:
        if settings.get(name) is not None:
            setattr(draft.generation_config, name, settings[name])
    return draft
