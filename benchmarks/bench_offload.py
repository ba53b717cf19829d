"""Memory of a conversion whose weights lie in files (`convert(offload_folder=...)`), against one in memory.

    python benchmarks/bench_offload.py offload            # docs/results/offload_cpu.json
    python benchmarks/bench_offload.py offload --shape 12M

The parent is random, in bfloat16, and stays in the folder; so does whatever was measured, and a second start goes on.
Each conversion runs in a process of its own. What is measured is its private anonymous memory (`RssAnon` of
/proc/self/status, looked at every few milliseconds) above what Python and its libraries took before: pages of mapped
files, those of a safetensors file that is read included, are not in it, as the system takes them back when it needs
memory. `resident` is everything (`VmHWM`).
"""

import argparse
import json
import multiprocessing
import threading
import time
from pathlib import Path

import torch
from common import RESULTS, machine, save
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from flextron_trainer import convert
from flextron_trainer.measuring.memory import process_bytes

SHAPES = {  # hidden, neurons, layers, heads, key-value heads, vocabulary
    "12M": (256, 1024, 6, 8, 2, 8192),
    "1B": (2048, 8192, 16, 32, 8, 128256),
}
MIB = 2**20


def make_parent(shape: tuple[int, ...], folder: Path) -> None:
    hidden, neurons, layers, heads, kv_heads, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, tie_word_embeddings=True,
        dtype="bfloat16",
    )  # fmt: skip
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    numbers = 0.02 * torch.randn(2**20 - 1, dtype=torch.bfloat16)  # again and again: drawing a billion takes minutes
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for part in flat.split(len(numbers)):
                part.copy_(numbers[: len(part)])
    model.save_pretrained(folder)


class Peak:
    """The largest `RssAnon` of this process while a block runs."""

    def __enter__(self) -> "Peak":
        self.before = self.highest = process_bytes("status", "RssAnon") or 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.003):
            self.highest = max(self.highest, process_bytes("status", "RssAnon") or 0)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def measure(parent: Path, output: Path, offload: Path | None, options: dict, queue: multiprocessing.Queue) -> None:
    """One conversion, and saving what it made."""
    batch = torch.randint(0, 1000, (options.pop("samples"), options.pop("length")))
    start = time.process_time()
    with Peak() as converting:
        model = convert(parent, batch, sequence_length=batch.shape[1], offload_folder=offload, **options)
    with Peak() as saving:
        model.save_pretrained(output)
    queue.put({
        "converting_mib": round((converting.highest - converting.before) / MIB),
        "saving_mib": round((saving.highest - converting.before) / MIB),
        "resident_mib": round((process_bytes("status", "VmHWM") or 0) / MIB),
        "cpu_seconds": round(time.process_time() - start),
        "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / MIB),
        "moments_mib": round(4 * model.config.intermediate_size**2 / MIB),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the parent and the files go: on a disk")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--orders", nargs="+", default=["norms"], help="of `convert`")
    parser.add_argument("--corrections", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    parent = args.folder / f"parent-{args.shape}"
    context = multiprocessing.get_context("spawn")
    if not (parent / "config.json").exists():
        maker = context.Process(target=make_parent, args=(SHAPES[args.shape], parent))
        maker.start()
        maker.join()
    path = RESULTS / "offload_cpu.json"
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine("cpu"), "rows": {}}
    for order in args.orders:
        for where in ("files", "memory"):
            name = (
                f"{args.shape} {where}, {order}, corrections {args.corrections:g}, {args.samples}x{args.length} tokens"
            )
            if name not in result["rows"]:
                options = {
                    "samples": args.samples, "length": args.length, "order": order, "corrections": args.corrections,
                    "mlp": [1, 0.75, 0.5], "heads": [1, 0.5], "budgets": [1, 0.6],
                }  # fmt: skip
                offload, queue = args.folder / "weights" if where == "files" else None, context.Queue()
                run = context.Process(target=measure, args=(parent, args.folder / "out", offload, options, queue))
                run.start()
                result["rows"][name] = queue.get()
                run.join()
                save("offload_cpu", result)
            print(json.dumps({name: result["rows"][name]}), flush=True)


if __name__ == "__main__":
    main()
