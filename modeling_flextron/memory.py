"""Reads how much memory of a device is free: the one place that asks for it.

Of a CPU that is what the system can give without swapping, and no more than its control groups leave to this process,
which is what containers are limited by.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from .errors import invalid

GROUPS = {  # controllers of /proc/self/cgroup -> folder of the tree; files of the limit and the use; field of `stat`
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device | str | int, root: str | os.PathLike = "/") -> int:
    """Bytes of a device's memory that this process could still take.

    Args:
        device: Of an accelerator, what torch keeps for later is counted as free; MPS shares the memory of the CPU.
        root: Where `proc` and `sys` lie.

    Raises:
        ValueError: this machine has no such device, or does not say how much is free.
    """
    try:
        device = torch.device(device)
        if device.type == "cpu":
            return _free_of_cpu(Path(root))
        if device.type == "mps":
            free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
            return min(free, _free_of_cpu(Path(root)))
        module = torch.get_device_module(device)
        kept = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + kept
    except (RuntimeError, AssertionError, AttributeError, ValueError, OSError) as error:
        rule = f"How much of its memory is free cannot be read: {str(error).splitlines()[0]}."
        raise invalid("device", str(device), rule, "Pass a budget of memory such as '6GiB'.") from error


def in_units(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def _free_of_cpu(root: Path) -> int:
    return max(0, min([_free_of_system(root), *_left_by_groups(root)]))


def _free_of_system(root: Path) -> int:
    """Memory that can be had without swapping; the files that the system keeps in memory count as free."""
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        return _field(meminfo, "MemAvailable:") * 1024
    try:
        import psutil  # the only one who knows on macOS and Windows

        return psutil.virtual_memory().available
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group around this process (version 1 or 2) leaves of its limit, where it has one."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        kind = next((kind for kind in controllers.split(",") if kind in GROUPS), None)
        if kind is None:
            continue
        tree, limit, used, reclaimable = GROUPS[kind]
        group = PurePosixPath(path.lstrip("/"))
        for each in (group, *group.parents):  # in a container the tree often begins at its own group
            folder = root / tree / each
            if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()) != "max":
                cached = _field(folder / "memory.stat", reclaimable)
                yield int(most) - int((folder / used).read_text()) + cached


def _field(file: Path, name: str) -> int:
    """A number of a file with lines `NAME NUMBER`; 0 without it."""
    rows = (line.split() for line in file.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
