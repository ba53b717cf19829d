"""Budgets of a model object: which sub-network runs, for a call, a block, a twin, or from now on.

Where a call does not say it, that of the `at_budget` block around it runs, else the default of `set_budget`. A block
belongs to the thread (or the asyncio task) that opened it, as those of `torch.no_grad` do, so callers of one model
never see each other's sizes.
"""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .budgets import Resolver, resolve
from .corrections import number_of_owner
from .errors import invalid
from .frontier import FrontierRow
from .latency import LatencyTable, table_of
from .subnetwork import SubNetwork, is_routed
from .token_routing import TokenRouting

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


def quantization_method(config: PreTrainedConfig) -> str | None:
    """The method by which a model is quantized when it is loaded."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return settings["quant_method"] if isinstance(settings, dict) else settings.quant_method


def divided_parameters(model: nn.Module) -> list[Any]:
    """The parameters of which each process holds a part."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "device_mesh")]


def runs_divided(model: nn.Module) -> bool:
    """Whether layers run on parts of their weights (tensor parallel); FSDP gathers them before."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    parts = divided_parameters(model)
    if any("tp" in (parameter.device_mesh.mesh_dim_names or ()) for parameter in parts):
        return True
    return bool(parts) and not any(hasattr(module, "unshard") for module in model.modules())


class SwitchingMixin(PreTrainedModel):
    """Budgets of a model that was built at `self.built` and holds every sub-network of it."""

    def __init__(self, config: Any, *args, **kwargs):
        config.validate()  # it may have been changed since it was read
        stored = resolve(config, config.flextron_budget)
        super().__init__(config if config.flextron_budget is None else config.narrowed(stored), *args, **kwargs)
        self.stored = None if config.flextron_budget is None else stored  # of a checkpoint, in its layer numbers
        # Whose corrections are in the weights then; those of what is not stored smaller are beside them.
        self.folded = None if self.stored is None else number_of_owner(config.owners(), stored)
        self.stored_depth = config.num_hidden_layers
        self.built, self._resolver = resolve(self.config, None), Resolver()
        # The weights of torchao slice. Layers of other quantizers exist only at the size they were built at.
        self.switchable = quantization_method(self.config) in (None, "torchao")
        self._subnetwork = self.built
        self._held = self.built  # the last one that was found to be inside: whoever runs another looks again
        self._last_routing: TokenRouting | None = None
        self._shared = False

    def post_init(self) -> None:
        """Begin as the base class does; a model loaded for token routing then runs with it."""
        super().post_init()
        if is_routed(self.stored):
            self.set_budget(f"auto:{self.stored.target}")

    @property
    def subnetwork(self) -> SubNetwork:
        """The sub-network that runs when no budget is passed: of the `at_budget` block around, else the default."""
        decoder = self.base_model  # one place, so that the decoder alone runs it too
        return size_around(decoder) or decoder._subnetwork

    @property
    def last_routing(self) -> TokenRouting | None:
        """The choices of the tokens in the last forward pass, where they chose; see `TokenRouting.average`.

        It is the last pass of any caller, and nothing that runs reads it.
        """
        return self.base_model._last_routing

    @property
    def frontier(self) -> list[FrontierRow]:
        """Recommended sub-networks that these weights hold, largest first, with exact costs and measured loss."""
        return [row for row in self.config.frontier if row.subnetwork is not None]

    @property
    def latency_table(self) -> LatencyTable | None:
        """The measured table that budgets such as `"25ms"` refer to here; None when there is none."""
        return table_of(self.config)

    def resolve_budget(self, budget: Any = None) -> SubNetwork:
        """The sub-network that a budget means here; None means the current default.

        Raises:
            ValueError: the budget means nothing here, or more than the weights hold, or less than is built of a
                quantized or tensor-parallel model.
        """
        if budget is None:
            return self.subnetwork
        compiling = torch.compiler.is_compiling()  # a graph would be one for the size that was asked for before, too
        if budget is self.built or (budget is self._held and not compiling):
            return budget  # as it was found before: every token of a text asks
        held = isinstance(budget, SubNetwork) and self.built.contains(budget)
        subnetwork = budget if held else self._resolver(self.config, budget)
        if not self.switchable and subnetwork != self.built:
            rule = "The layers of a model quantized by this method exist only at the size they were built at."
            remedy = "Load it with `flextron_budget=` and the quantization together, or quantize with torchao."
            raise invalid("flextron_budget", budget, rule, remedy)
        if runs_divided(self) and subnetwork != self.built:
            rule = "Under a tensor-parallel plan each process holds a part of a weight, not what is leading of it."
            remedy = "Load it with `flextron_budget=` and the plan together, which then divides weights of that size."
            raise invalid("flextron_budget", budget, rule, remedy)
        if not compiling:
            self._held = subnetwork
        return subnetwork

    def set_budget(self, budget: Any) -> None:
        """Run this sub-network from now on. Nothing is copied; None goes back to everything that is loaded.

        This is the default of the model object, for everyone who calls it without a budget, so it is for an object
        with one caller. Several pass their budget with each call, use `at_budget`, or call a twin each (`share`).

        Raises:
            ValueError: as `resolve_budget`; or inside an `at_budget` block, which goes before the default.
        """
        if size_around(self.base_model) is not None:
            rule = "Inside an `at_budget` block its size runs, whatever the default is."
            raise invalid("budget", budget, rule, "Call `set_budget` outside of the block.")
        self.base_model._subnetwork = self.built if budget is None else self.resolve_budget(budget)

    @contextmanager
    def at_budget(self, budget: Any) -> Iterator[None]:
        """Run this sub-network inside the `with` block; None for everything that is loaded.

        The block is that of one thread (or asyncio task): other callers of the model see nothing of it, and a thread
        that is started inside, as for a streamer, does not either: pass `flextron_budget=` to what that one calls.
        """
        with run_at(self.base_model, self.built if budget is None else self.resolve_budget(budget)):
            yield

    def share(self, budget: Any):
        """A second model object at `budget` on the same parameters, for instance as `assistant_model`.

        Only Python objects are created. Training or moving one model moves the other; only the original can be
        saved, or get another vocabulary, after which it must be shared again.
        """
        return self._twin(self.resolve_budget(budget), chain(self.parameters(), self.buffers()))

    def _twin(self, subnetwork: SubNetwork, same: Iterable[Any]) -> Any:
        """Copy this model object at a sub-network, around `same` parts of it that are not copied."""
        twin = copy.deepcopy(self, {id(part): part for part in same})
        for module in (twin, twin.base_model):
            if isinstance(vars(module).get("forward"), FunctionType):
                del module.forward  # such as torch.compile(model.forward), which runs us
        twin.base_model._shared = True
        twin.set_budget(subnetwork)
        return twin
