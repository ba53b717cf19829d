"""Tiny models for the tests, and the pieces that several test files share."""

import copy
import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import child
import torch
from shapes import SHAPES
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

from flextron_trainer import convert
from flextron_trainer.cli import app
from flextron_trainer.training.router_stage import add_token_routers
from modeling_flextron.subnetwork import random_subnetwork

CONFIGS = {
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gpt2": GPT2Config,
    "neox": GPTNeoXConfig,
    "neox-serial": GPTNeoXConfig,
}
CHOICES = {
    "mlp": [1, 0.75, 0.5, 0.25],
    "heads": [1, 0.5],
    "hidden": [1, 0.75, 0.5],
    "depth": [1, 0.75, 0.5],
    "budgets": [1, 0.6, 0.35, 0.15],
}


def parent_of(variant: str, **changes) -> PreTrainedModel:
    """A stock model with random weights, large enough ones that every unit matters."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **copy.deepcopy(SHAPES[variant]),
        **changes,
    }
    config = CONFIGS.get(variant, LlamaConfig)
    if config is GPT2Config:
        shape.pop("intermediate_size")
    model = AutoModelForCausalLM.from_config(config(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if scale else 0.0, 0.15)
    return model.eval()


def elastic_of(variant: str, parent=None, **changes):
    """`parent_of(variant)`, or the parent given, made elastic with `CHOICES`. The former is converted only once."""
    if parent is None:
        model = copy.deepcopy(_converted(variant, json.dumps(changes)))
        torch.manual_seed(0)  # the same state whether it was converted now or before
        return model
    data = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))
    return convert(parent, data, **{"order": "importance", **CHOICES, **changes})  # to choose one takes four passes


@functools.cache
def _converted(variant: str, changes: str):
    return elastic_of(variant, parent_of(variant), **json.loads(changes))


def let_tokens_choose(model):
    """Give an elastic model routers with which its tokens want many different sizes, and return it."""
    add_token_routers(model, [0.6, 0.35])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_subnetworks(model, count: int, seed: int = 0) -> list:
    """Heterogeneous sub-networks of a model, the same ones for the same seed."""
    generator = random.Random(seed)
    return [random_subnetwork(model.config, generator) for _ in range(count)]


def all_sizes(model, count: int = 6) -> list:
    """Every row of the frontier and a few heterogeneous sub-networks."""
    return [model.resolve_budget(row["subnetwork"]) for row in model.frontier] + random_subnetworks(model, count)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; of values above 1 as a part of the largest, as rounding is, on any processor."""
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


def flextron(*arguments: object) -> dict:
    """Run a verb of the command in this process; its JSON line, which is all that it prints on stdout."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return json.loads(line)


WITHOUT_PACKAGE = """
import sys
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_flextron", "flextron_trainer"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse)
"""


# Its processes begin with these imported, which takes seconds, and nothing of ours.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers.models.auto.modeling_auto", "transformers.trainer", "datasets"])


def run_python(
    code: str,
    *arguments: object,
    timeout: float = 240,
    check: bool = True,
    package: bool = True,
    env: dict[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own: with this checkout on its path, or where our packages cannot be
    imported; `env` is added to the environment of a new interpreter, `folder` is where it works."""
    root = Path(__file__).parent.parent
    path = [str(root), str(root / "trainer"), str(root / "tests")]
    prelude = f"import sys; sys.path[:0] = {path!r}\n" if package else WITHOUT_PACKAGE
    given = [str(argument) for argument in arguments]
    if env is None:
        done = run_forked(prelude + code, given, timeout, folder or Path.cwd())
    else:  # which libraries read when they are imported
        command, variables = [sys.executable, "-c", prelude + code, *given], {**os.environ, **env}
        done = subprocess.run(command, text=True, capture_output=True, timeout=timeout, env=variables, cwd=folder)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def run_forked(code: str, arguments: list[str], timeout: float, folder: Path) -> subprocess.CompletedProcess:
    """`python -c CODE ARGUMENTS` without the seconds of its imports."""
    with tempfile.TemporaryDirectory() as output:
        files = [Path(output, name) for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=child.run, args=(code, arguments, str(folder), *map(str, files)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, timeout)
        return subprocess.CompletedProcess(code, process.exitcode, *(file.read_text() for file in files))
