"""Memory of this process, as the system counts it."""

from pathlib import Path


def process_bytes(file: str, key: str) -> int | None:
    """Read a number of /proc/self, in bytes, such as `VmRSS` of `status`; None where there is no such file."""
    path = Path("/proc/self") / file
    lines = path.read_text().splitlines() if path.exists() else []
    fields = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if fields is None else int(fields[1]) * (1024 if fields[-1] == "kB" else 1)


def forget_peak() -> None:
    """Let the peak, `VmHWM` of `status`, start again at what is in use now."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
