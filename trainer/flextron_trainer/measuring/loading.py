"""Measures what loading costs: seconds, bytes from the disk and memory, of every load in a fresh process.

    results = measure_loads([Load("levels", budget=0.5), Load("levels", budget=0.5, how="slice")] * 5)

A process of its own (`python -m flextron_trainer.measuring.loading`) imports everything once and forks for each load,
so that no load finds files mapped, memory in use, or code that has to be imported. The pages of the checkpoint are
dropped from the cache of the system first, and after loading one value of every page is read: a tensor that is only
mapped would otherwise cost nothing yet.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.level_reader import read_index

from ..models import load_elastic, load_stock
from .memory import forget_peak, process_bytes

PAGE = 4096


@dataclass(frozen=True)
class Load:
    """A way to load a model.

    Args:
        source: Folder, or Hub id.
        budget: What is loaded; None for everything.
        how: `"budget"`: `from_pretrained(flextron_budget=...)`; `"slice"`: everything, then `extract(budget)`;
            `"stock"`: a checkpoint of a stock class.
        dtype, device: Of the loaded model.
        threads: Of torch; None for its default.
        cold: Whether the files of a folder are dropped from the cache of the system first.
    """

    source: str
    budget: Any = None
    how: str = "budget"
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    cold: bool = True


def measure_loads(loads: list[Load], environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Load one after the other, each in a fresh process.

    Args:
        loads: What to load, in this order.
        environment: Variables of those processes, beside those of this one.

    Returns:
        For each load `seconds`, and `cpu_seconds` of all threads; `parameter_bytes` of the loaded model; `read_bytes`,
        what the system read from the disk for it; `peak_bytes`, by how much the memory of the process grew at the worst
        moment. The last two are None where the system does not say.

    Raises:
        OSError: a load failed; the message is that of its error.
    """
    path = os.pathsep.join(filter(None, sys.path))
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    command = [sys.executable, "-m", "flextron_trainer.measuring.loading"]
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps([asdict(load) for load in loads]))
        worker.stdin.close()
        lines = (line for line in worker.stdout if line.startswith("{"))
        results: list[dict[str, Any]] = []
        for load, line in zip(loads, tqdm(lines, total=len(loads), desc="Loading", unit="load"), strict=False):
            results.append(json.loads(line))
            if "error" in results[-1]:
                worker.kill()
                raise OSError(f"{load.source} was not loaded at budget {load.budget!r}: {results[-1]['error']}")
    if len(results) < len(loads):
        raise OSError(f"The process that loads ended with {worker.returncode} after {len(results)} loads.")
    return results


def fetched_bytes(folder: Path, budget: Any) -> int:
    """Bytes of the weight files that loading a budget fetches from a copy of a folder on the Hub."""
    config = FlextronConfig.from_pretrained(folder, flextron_budget=budget)
    if config.levels is None:
        return sum(path.stat().st_size for path in weight_files(folder))
    index = read_index(folder / (config.transformers_weights or SAFE_WEIGHTS_INDEX_NAME))
    return sum(shard["size"] for shard in index["shards"].values())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(folder.glob("model*.safetensors"))


def drop_pages(files: Iterable[Path]) -> None:
    """Write files to the disk and drop them from the cache of the system, where that is possible."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _measure(load: Load) -> dict[str, Any]:
    """Load in this process."""
    if load.threads is not None:
        torch.set_num_threads(load.threads)
    _warm_up()
    if load.cold and os.path.isdir(load.source):
        drop_pages(weight_files(Path(load.source)))
    if load.device.startswith("cuda"):
        torch.empty(0, device=load.device)
    forget_peak()
    memory, read = process_bytes("status", "VmRSS"), process_bytes("io", "read_bytes")
    start, cpu = time.perf_counter(), time.process_time()
    parameters = [parameter.detach() for parameter in _load(load).parameters()]
    for tensor in parameters:
        tensor.reshape(-1)[:: PAGE // tensor.element_size()].sum()
    if load.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after, peak = process_bytes("io", "read_bytes"), process_bytes("status", "VmHWM")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parameter_bytes": sum(tensor.nbytes for tensor in parameters),
        "read_bytes": None if after is None or read is None else after - read,
        "peak_bytes": None if peak is None or memory is None else peak - memory,
    }


def _load(load: Load) -> Any:
    if load.how == "stock":
        return load_stock(load.source, "source", dtype=load.dtype).to(load.device)
    if load.how == "slice":
        return load_elastic(load.source, dtype=load.dtype).to(load.device).extract(load.budget)
    return load_elastic(load.source, dtype=load.dtype, flextron_budget=load.budget).to(load.device)


def _warm_up() -> None:
    """Load a tiny model, so that code is in memory before its loading is measured."""
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = FlextronConfig(**shape, num_attention_heads=1, elastic={"mlp": [8, 4]})
    with tempfile.TemporaryDirectory() as folder:
        FlextronForCausalLM(config).export(folder)
        load_elastic(folder, flextron_budget={"mlp": 4}).extract().save_pretrained(folder)
        load_stock(folder)


def main() -> None:
    """Read loads as JSON, measure each in a fork of this process, and print a JSON line for each."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for fields in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(_measure(Load(**fields))), flush=True)
            except (ValueError, OSError, RuntimeError) as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
