"""Torch-Pruning on a LLaMA: neurons of the MLP and heads, by first-order Taylor importance or by magnitude.

    FOLDER/torch_pruning/bin/python benchmarks/peers/torch_pruning.py PARENT OUT --calibration rows.npy --ratio 0.5

Every layer keeps as much as every other. Heads are pruned where each has its own key and value; with shared ones
(GQA) version 1.6.1 does not return from pruning them, so that only the MLP is pruned.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from shared import Parent, arguments, begin, cross_entropy, mean_loss, write
from transformers import LlamaForCausalLM

sys.path.append(sys.path.pop(0))  # `torch_pruning` is the package, not this file
import torch_pruning as tp

warnings.filterwarnings("ignore")


def load(folder: Path) -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def prune(model: Any, parent: Parent, sizes: dict[str, int], rows: torch.Tensor, taylor: bool) -> None:
    """Cut a model to `mlp` and, where there are any, `heads`, in place."""
    heads, ratios, head_ratios, ignored = {}, {}, {}, [model.lm_head]
    for layer in model.model.layers:
        attention = layer.self_attn
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        ratios[layer.mlp.gate_proj] = 1 - sizes["mlp"] / parent.mlp
        if "heads" in sizes:
            heads |= dict.fromkeys(inputs, parent.heads)
            head_ratios |= dict.fromkeys(inputs, 1 - sizes["heads"] / parent.heads)
            ratios |= head_ratios  # where the dimensions of heads have no ratio, it does not come to the heads either
        else:
            ignored += inputs
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, rows[:1], importance, pruning_ratio=0.0, pruning_ratio_dict=ratios, ignored_layers=ignored,
        num_heads=heads, prune_num_heads=bool(heads), prune_head_dims=False, head_pruning_ratio_dict=head_ratios,
        root_module_types=[torch.nn.Linear], output_transform=lambda output: output.logits.sum(),
    )  # fmt: skip
    if taylor:
        model.zero_grad()
        for batch in rows.split(32):
            cross_entropy(model(batch).logits, batch).backward()
    pruner.step()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--importance", choices=["taylor", "magnitude"], default="taylor")
    parser.add_argument("--variant", choices=["width", "mlp"], default="width", help="mlp leaves the heads alone")
    options = parser.parse_args()
    parent, rows = begin(options)
    choices: list[dict[str, int]] = [{}]
    if options.variant == "width" and parent.heads == parent.kv_heads:
        choices = [{"heads": n, "kv_heads": n} for n in range(1, parent.heads + 1)]
    for ratio in options.ratio:
        sizes = parent.uniform(ratio, options.grid, choices)
        model = load(options.parent)
        prune(model, parent, sizes, rows, options.importance == "taylor")
        loss = mean_loss(lambda batch, model=model: model(batch).logits, rows)
        write(
            options.out, parent, model.state_dict(), sizes, distribution="torch-pruning", ratio=ratio, loss=loss,
            peer=f"torch-pruning-{options.importance}-{'mlp' if choices == [{}] else 'width'}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
