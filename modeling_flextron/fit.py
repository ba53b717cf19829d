"""The budget `"fit"`: the best row that fits the free memory of the devices onto which a model is loaded."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from .budgets import Family, best_within, parse_budget, row_cost
from .errors import invalid
from .memory import free_memory, in_units
from .subnetwork import SubNetwork, memory_context

logger = logging.get_logger(__name__)
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps of transformers over all accelerators


def fit(config: Family, budget: str, device_map: Any = None, max_memory: Mapping[Any, Any] | None = None) -> SubNetwork:
    """The best row whose weights, in the dtype of `config`, and KV cache fit the free memory; it is logged.

    `"fit:0.9"` is another share of it than 0.8. Memory of the devices of a map is added up; a limit in `max_memory`
    counts as what is free at most.

    Raises:
        ValueError: not even the smallest row fits, or how much is free is not known.
    """
    share = parse_budget(budget).value
    devices = target_devices(device_map, max_memory)
    free = sum(_free_within(device, (max_memory or {}).get(key)) for key, device in devices.items())
    priced = [(row, float(row_cost(config, row, "memory"))) for row in config.frontier if row.subnetwork is not None]
    needs = {row.name: need for row, need in priced}
    best, where = best_within(priced, share * free), " + ".join(map(str, devices.values()))
    have = f"{in_units(free)} of memory are free on {where}, of which {share:.0%} are to be used"
    tokens = f"with a KV cache of {memory_context(config):,} tokens"
    if best is None:
        name = min(needs, key=lambda name: needs[name])
        rule = f"{have}, and the smallest row, {name!r}, needs {in_units(needs[name])} {tokens}."
        remedy = "Free some, pass a larger share such as 'fit:1', a smaller dtype or a smaller `flextron_context`."
        raise invalid("flextron_budget", budget, rule, remedy)
    more = min(((need, name) for name, need in needs.items() if need > share * free), default=None)
    after = "none is larger" if more is None else f"the next larger one, {more[1]!r}, needs {in_units(more[0])}"
    # A warning, because the caller left to this call what is loaded, and sees nothing below that by default.
    logger.warning(
        f"flextron_budget={budget!r}: {have}; row {best.name!r} needs {in_units(needs[best.name])} {tokens}; {after}."
    )
    assert best.subnetwork is not None
    return best.subnetwork


def target_devices(device_map: Any, max_memory: Mapping[Any, Any] | None = None) -> dict[Any, torch.device]:
    """The devices onto which `from_pretrained` loads with a device map, under their keys in `max_memory`.

    A map over all devices means the accelerators, where there are any: what is left to CPU and disk is slow.
    """
    if device_map is None:
        return _keyed(torch.empty(0).device)
    if isinstance(device_map, Mapping):
        named = {key: found for value in device_map.values() if value != "disk" for key, found in _keyed(value).items()}
        return named or _keyed("cpu")
    if device_map not in SPREAD:
        return _keyed(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device_map == "cuda" else device_map)
    found: dict[Any, torch.device] = {}
    if (kind := torch.accelerator.current_accelerator()) is not None:
        for i in range(torch.accelerator.device_count()):
            found |= _keyed(torch.device(kind.type, i))
    return {key: device for key, device in found.items() if key in (max_memory or found)} or _keyed("cpu")


def _keyed(device: Any) -> dict[Any, torch.device]:
    device = torch.device(device)
    return {device.type if device.type in ("cpu", "mps") else device.index or 0: device}


def _free_within(device: torch.device, limit: Any) -> int:
    free = free_memory(device)
    if limit is None:
        return free
    return min(free, int(parse_budget(limit).value) if isinstance(limit, str) else limit)
