"""What every client script does: read the reference of transformers 5, compare with it, write down what came out."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy

PROMPT, NEW = 24, 16
WORK = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
results: list[dict] = []


class Reference:
    """Greedy text `[P, T]` of a model, and log probabilities `[P, T, V]` of what follows each of its tokens."""

    def __init__(self, name: str):
        with numpy.load(WORK / "reference" / f"{name}.npz") as data:
            self.text, self.logprobs = data["text"], data["logprobs"]

    @property
    def prompts(self) -> list[list[int]]:
        return self.text[:, :PROMPT].tolist()

    @property
    def greedy(self) -> list[list[int]]:
        return self.text[:, PROMPT:].tolist()


def record(model: str, how: str, tolerance: float, difference: float, tokens_equal: bool | None = None) -> None:
    """Add a line to what this client found; `tokens_equal` where it wrote tokens."""
    line = {"model": model, "how": how, "largest_difference": float(difference), "tolerance": tolerance}
    ok = bool(tokens_equal is not False and difference <= tolerance)
    results.append(line | {"greedy_tokens_equal": tokens_equal, "ok": ok})
    print(json.dumps(results[-1]), flush=True)


def failed(model: str, how: str, error: BaseException) -> None:
    """Add what a client could not do."""
    results.append({"model": model, "how": how, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]})
    print(json.dumps(results[-1]), flush=True)


def finish(*packages: str) -> None:
    """Write the results where the driver looks for them."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
