"""What FastNAS and AutoNAS share: both find a width for the MLP of each layer of a LLaMA, and nothing else.

modelopt traces which dimensions of a model may shrink together; in a LLaMA of transformers it sees the MLPs only.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shared import Parent, cross_entropy
from transformers import LlamaForCausalLM

SCORED = 32  # rows that a candidate of a search is scored on

warnings.filterwarnings("ignore")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What modelopt prints goes to stderr: stdout is for the results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def load(folder: Path) -> Any:
    """The parent as modelopt can trace it."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.use_cache = False
    return model


def space(parent: Parent, grid: int) -> dict[str, Any]:
    """The rules of a search space whose widths are those of `Parent.widths`."""
    return {"nn.Linear": {"*": {"features_ratio": [w / parent.mlp for w in parent.widths(grid)], "feature_divisor": 1}}}


def limit(parent: Parent, ratio: float, grid: int) -> tuple[dict[str, float], float]:
    """The constraint for modelopt, no lower than MLPs can go, and the ratio where they are narrowest.

    modelopt counts the embedding, and once more as the head, also where they share their weights.
    """
    embeddings = 2 * parent.weights["model.embed_tokens.weight"].numel()
    smallest = parent.parameters([parent.widths(grid)[0]] * parent.layers)
    return {"params": float(max(int(ratio * parent.size), smallest) + embeddings)}, round(smallest / parent.size, 4)


def score(rows: torch.Tensor) -> dict[str, Any]:
    """How modelopt scores a candidate: minus the loss of the first rows."""

    def minus_loss(model: Any) -> float:
        return -loss(model, rows[:SCORED])

    return {"score_func": minus_loss, "verbose": False}


@torch.no_grad()
def loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    losses = [cross_entropy(model(batch).logits, batch).item() * len(batch) for batch in rows.split(32)]
    return sum(losses) / len(rows)


def widths(model: Any) -> list[int]:
    return [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers]
