"""Which sub-network runs where a call does not say: that of the `at_budget` block around it, else the model's default.

A block belongs to the thread (or the asyncio task) that opened it, as those of `torch.no_grad` do, so callers of one
model never see each other's sizes.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from .subnetwork import SubNetwork

_around: ContextVar[dict[nn.Module, SubNetwork]] = ContextVar("flextron_at_budget")
_lock = threading.Lock()
_blocks = 0  # that are open anywhere; without one nobody looks at the context, which a compiled graph cannot do


def size_around(decoder: nn.Module) -> SubNetwork | None:
    """The sub-network of the innermost block around this call that is about `decoder`; None outside of any."""
    if not _blocks:
        return None
    return _around.get({}).get(decoder)  # torch.compile(fullgraph=True) cannot ask: pass `flextron_budget=` instead


@contextmanager
def run_at(decoder: nn.Module, subnetwork: SubNetwork) -> Iterator[None]:
    """Let what this thread calls inside the block run `decoder` at `subnetwork`, where it does not say otherwise."""
    global _blocks
    before = _around.get({})
    _around.set({**before, decoder: subnetwork})
    with _lock:
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
        _around.set(before)
