"""Tiny models for the tests, and the pieces that several test files share."""

import copy
import random
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron_trainer import convert
from flextron_trainer.sampling import random_subnetwork

VARIANTS = ("mha", "mha-tied-biased", "gqa-wide-heads", "gqa-tied-llama3")
SHAPES = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "mha-tied-biased": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gqa-wide-heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "gqa-tied-llama3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
CHOICES = {
    "mlp": [1, 0.75, 0.5, 0.25],
    "heads": [1, 0.5],
    "hidden": [1, 0.75, 0.5],
    "depth": [1, 0.75, 0.5],
    "budgets": [1, 0.6, 0.35, 0.15],
}


def parent_of(variant: str, **changes) -> LlamaForCausalLM:
    """A stock LLaMA with random weights, large enough ones that every unit matters."""
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
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model.eval()


def elastic_of(variant: str, parent=None, **changes):
    """`parent_of(variant)` made elastic with `CHOICES`."""
    data = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))
    return convert(parent or parent_of(variant), data, **{**CHOICES, **changes})


def random_subnetworks(model, count: int, seed: int = 0) -> list:
    """Heterogeneous sub-networks of a model, the same ones for the same seed."""
    generator = random.Random(seed)
    return [random_subnetwork(model.config, generator) for _ in range(count)]


def all_sizes(model, count: int = 6) -> list:
    """Every row of the frontier and a few heterogeneous sub-networks."""
    return [model.resolve_budget(row["subnetwork"]) for row in model.frontier] + random_subnetworks(model, count)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def run_python(code: str, *arguments: object, timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, with this checkout on its path."""
    root = Path(__file__).parent.parent
    path = [str(root), str(root / "trainer"), str(root / "tests")]
    prelude = f"import sys; sys.path[:0] = {path!r}\n"
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
