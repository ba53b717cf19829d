"""What every peer shares: arguments, the parent, the sizes that meet a ratio, the loss, and what is written.

It needs torch, numpy and safetensors only, as every peer runs with the libraries of its own environment.
"""

import argparse
import importlib.metadata
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

START = time.perf_counter()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of every peer; some add to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path, help="folder of a LlamaForCausalLM")
    parser.add_argument("out", type=Path, help="folder to write a folder for each ratio into")
    parser.add_argument("--calibration", type=Path, required=True, help="tokens, int64 [N, S], in a .npy file")
    parser.add_argument(
        "--ratio", type=float, nargs="+", default=[0.5], help="of the parent's non-embedding parameters"
    )
    parser.add_argument(
        "--grid", type=int, default=16, help="widths of the MLP are multiples of 1/grid of the parent's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def begin(options: argparse.Namespace) -> tuple["Parent", torch.Tensor]:
    """Seed everything; read the parent and the calibration rows."""
    random.seed(options.seed)
    numpy.random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    return Parent(options.parent), torch.from_numpy(numpy.load(options.calibration))


class Parent:
    """A folder with a stock LLaMA: its `config`, its weights, and what its sizes cost."""

    def __init__(self, folder: Path):
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        assert self.config["model_type"] == "llama", f"{folder} holds a {self.config['model_type']}, not a llama"
        self.weights = load_file(folder / "model.safetensors")
        self.layers, self.heads = self.config["num_hidden_layers"], self.config["num_attention_heads"]
        self.kv_heads, self.mlp = self.config["num_key_value_heads"], self.config["intermediate_size"]
        self.hidden = self.config["hidden_size"]
        self.head_dim = self.config.get("head_dim") or self.hidden // self.heads
        self.size = self.parameters([self.mlp] * self.layers)

    def parameters(self, widths: list[int], heads: int | None = None, kv_heads: int | None = None) -> int:
        """Non-embedding parameters: as many layers as there are MLP widths, and the final norm."""
        heads, kv_heads = heads or self.heads, kv_heads or self.kv_heads
        attention = 2 * (heads + kv_heads) * self.head_dim * self.hidden
        return sum(attention + 3 * width * self.hidden + 2 * self.hidden for width in widths) + self.hidden

    def widths(self, grid: int) -> list[int]:
        """The widths of an MLP that may be chosen, smallest first."""
        return [self.mlp * i // grid for i in range(1, grid + 1)]

    def uniform(self, ratio: float, grid: int, choices: list[dict[str, int]]) -> dict[str, int]:
        """The sizes that use a ratio best: MLP and the rest as alike in their fractions as they can be.

        Args:
            ratio: Fraction of the parent's non-embedding parameters, an upper bound.
            grid: See `widths`.
            choices: What may be chosen beside the width: `heads` with `kv_heads`, or `layers`; absent is the parent's.

        Returns:
            A choice with `mlp`, the largest width that fits; the smallest sizes of all where nothing fits.
        """
        fitting = []
        for choice in choices:
            depth, heads = choice.get("layers", self.layers), choice.get("heads", self.heads)
            for width in self.widths(grid):
                cost = self.parameters([width] * depth, heads, choice.get("kv_heads"))
                uneven = abs(depth * heads / (self.layers * self.heads) - width / self.mlp)
                fitting.append((cost <= ratio * self.size, cost, uneven, choice | {"mlp": width}))
        within = [entry for entry in fitting if entry[0]]
        if not within:
            return min(fitting, key=lambda entry: entry[1])[3]
        largest = [
            max((e for e in within if e[3].items() >= c.items()), key=lambda e: e[1], default=None) for c in choices
        ]
        return min((entry for entry in largest if entry), key=lambda entry: (entry[2], -entry[1]))[3]


def cross_entropy(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Nats per token of `rows` `[N, S]` under `logits` `[N, S, V]`."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(logits_of: Any, rows: torch.Tensor) -> float:
    """Nats per token; `logits_of` gives `[N, S, V]` of some rows."""
    losses = [cross_entropy(logits_of(batch), batch).item() * len(batch) for batch in rows.split(32)]
    return sum(losses) / len(rows)


def write(
    folder: Path, parent: Parent, weights: dict[str, torch.Tensor], sizes: dict[str, Any], *, distribution: str,
    ratio: float, loss: float, **more: Any
) -> None:  # fmt: skip
    """Write a stock LLaMA, and print what it is as one line of JSON.

    Args:
        folder: Where the folder of this ratio goes.
        parent: What was pruned.
        weights: Under the names of `LlamaForCausalLM`.
        sizes: `heads`, `kv_heads` and `layers` where they are not the parent's; `mlp`: a width, or one for each layer.
            The MLPs of the latter are filled up with zeros to the widest, which changes nothing, and `sizes.json`
            says their true widths.
        distribution: The package that pruned, for its version.
        ratio: What was asked for.
        loss: Of the rows of the calibration.
        more: What else is worth saying.
    """
    folder = folder / f"{ratio:g}"
    folder.mkdir(parents=True, exist_ok=True)
    depth = sizes.get("layers", parent.layers)
    widths = sizes["mlp"] if isinstance(sizes["mlp"], list) else [sizes["mlp"]] * depth
    changed = {"num_hidden_layers": depth, "intermediate_size": max(widths), "head_dim": parent.head_dim}
    changed["num_attention_heads"] = sizes.get("heads", parent.heads)
    changed["num_key_value_heads"] = sizes.get("kv_heads", parent.kv_heads)
    (folder / "config.json").write_text(json.dumps(parent.config | changed, indent=1) + "\n")
    if isinstance(sizes["mlp"], list):
        (folder / "sizes.json").write_text(json.dumps({"intermediate": widths}) + "\n")
    count = parent.parameters(widths, sizes.get("heads"), sizes.get("kv_heads"))
    held = sum(
        tensor.numel() for name, tensor in weights.items() if "embed_tokens" not in name and "lm_head" not in name
    )
    assert held == count, f"weights hold {held} parameters, and the sizes {sizes} say {count}"
    filled = {}
    for name, tensor in weights.items():
        if ".mlp." in name:
            rows, columns = (parent.hidden, max(widths)) if "down_proj" in name else (max(widths), parent.hidden)
            tensor = torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
        if not (name == "lm_head.weight" and parent.config.get("tie_word_embeddings")):
            filled[name] = tensor.detach().clone().contiguous()
    save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    result = {
        "version": f"{distribution} {importlib.metadata.version(distribution)}",
        "ratio_asked": ratio,
        "non_embedding_parameters": count,
        "ratio": round(count / parent.size, 4),
        "sizes": sizes,
        "seconds": round(time.perf_counter() - START, 1),
        "loss": round(loss, 5),
    }
    if count > ratio * parent.size:
        result["note"] = "found nothing smaller"
    print(json.dumps(more | result), flush=True)
