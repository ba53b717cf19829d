"""What another budget in the middle of a text costs in quality when the KV cache is kept.

    make demo && python benchmarks/bench_switching.py           # the model that the demo leaves, a minute on a CPU
    python benchmarks/bench_switching.py --model me/elastic --dataset ./held-out

Every held-out block is read in two halves. The first half is read at budget A, the second at budget B on A's cache.
Given is the loss on the second half (nats per token, mean and standard error over blocks): on the kept cache, and
after recomputing the first half at B, which is what keeping the cache saves. The diagonal is the control: the same
budget with and without a break must give the same loss. The last line is JSON, also saved under docs/results/.
"""

import argparse
import json
import statistics

import torch
from common import machine, save
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import DynamicCache

from flextron_trainer.data import load_text, load_tokenizer, pack
from modeling_flextron import FlextronForCausalLM


@torch.no_grad()
def second_half_losses(model, ids: torch.Tensor, first: str | None, second: str) -> list[float]:
    """Loss of each row of ids `[B, S]` on its second half, read at `second` on a cache of `first` (None: no break)."""
    half = ids.shape[1] // 2
    cache = DynamicCache(config=model.config)
    if first is None:
        logits = model(ids, use_cache=False, flextron_budget=second).logits[:, half:]
    else:
        model(ids[:, :half], past_key_values=cache, use_cache=True, flextron_budget=first)
        logits = model(ids[:, half:], past_key_values=cache, use_cache=True, flextron_budget=second).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), ids[:, half + 1 :], reduction="none"
    )
    return losses.mean(dim=1).tolist()


def blocks(dataset: str, tokenizer, length: int, rows: int) -> Dataset:
    """Held-out text, of the standard library the part that the demo holds out."""
    texts = load_text(dataset)
    if dataset == "stdlib":
        texts = texts.shuffle(seed=0)
        texts = texts.select(range(max(1, len(texts) // 20)))
    packed = pack(texts, tokenizer, length).shuffle(seed=0)
    return packed.select(range(min(rows, len(packed))))


def main() -> None:
    """Measure every pair of rows with the same layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flextron-demo/elastic")
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--length", type=int, default=128)  # as long as the demo trains
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()

    model = FlextronForCausalLM.from_pretrained(options.model).to(options.device).eval()
    tokenizer = load_tokenizer(options.model)
    rows = blocks(options.dataset, tokenizer, options.length, options.rows)
    batches = torch.tensor(rows["input_ids"]).split(options.batch_size)
    names = [row["name"] for row in model.frontier]
    layers = {name: model.resolve_budget(name).layers for name in names}
    pairs = [(a, b) for b in names for a in (None, *names) if a is None or layers[a] == layers[b]]

    losses: dict[tuple[str | None, str], list[float]] = {}
    for pair in tqdm(pairs, desc="Reading"):
        losses[pair] = [
            loss for ids in batches for loss in second_half_losses(model, ids.to(options.device), *pair)
        ]  # fmt: skip

    table = Table(title="loss on the second half: read at (row), on a cache filled at (column)")
    for title in ("budget", "recomputed", *names):
        table.add_column(title, justify="right")
    results = []
    for b in names:
        cells = []
        for a in (None, *names):
            if (a, b) not in losses:
                cells.append("other depth")
                continue
            mean, more = (
                statistics.mean(losses[a, b]),
                [x - y for x, y in zip(losses[a, b], losses[None, b], strict=True)],
            )
            error = statistics.stdev(more) / len(more) ** 0.5
            cells.append(f"{mean:.4f}" if a is None else f"{mean:.4f} ({statistics.mean(more):+.4f} ± {error:.4f})")
            entry = {"cache": a or "recomputed", "budget": b, "loss": mean}
            results.append(entry | {"difference": statistics.mean(more), "standard_error": error})
        table.add_row(b, *cells)
    Console(width=140).print(table)
    result = {
        "benchmark": "switching", "model": options.model, "blocks": len(rows), "length": options.length,
        "machine": machine(options.device), "results": results,
    }  # fmt: skip
    if not options.no_save:
        save(f"switching_{options.device}", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
