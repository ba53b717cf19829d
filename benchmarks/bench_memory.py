"""The memory plan of `flextron train --plan` against the measured peak of two training steps.

    python benchmarks/bench_memory.py                  # docs/results/memory_cpu.json
    python benchmarks/bench_memory.py --device cuda    # docs/results/memory_cuda.json

On a CPU the peak is that of all tensors, from the profiler's memory events; on a GPU that of the allocator.
"""

import argparse
import json
import tempfile

import torch
from common import machine, peak_bytes, save
from transformers import LlamaConfig, LlamaForCausalLM

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert

SIZES = {  # hidden, neurons, layers, heads, key-value heads, vocabulary, batch, sequence
    "12M": (256, 1024, 6, 8, 2, 8192, 4, 256),
    "45M": (512, 2048, 8, 8, 4, 8192, 2, 256),
}
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "self": {"teacher": "self", "sampler": "uniform"},
    "bf16": {"bf16": True},
}


def parent(size: tuple[int, ...]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    hidden, neurons, layers, heads, kv, vocabulary, _, _ = size
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=neurons,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=hidden // heads,
            pad_token_id=0,
        )
    )


def compare(size: str, setting: str, device: str) -> dict[str, float]:
    """The plan, the measured peak, and their ratio."""
    shape, changes = SIZES[size], dict(SETTINGS[setting])
    batch, length = shape[-2:]
    dense = parent(shape)
    rows = [{"input_ids": torch.randint(1, shape[5], (length,))} for _ in range(batch * 8)]
    elastic = convert(dense, "weights", mlp=[1, 0.75, 0.5, 0.25], heads=[1, 0.5], budgets=[1, 0.75, 0.5, 0.25])
    teacher = changes.pop("teacher", dense)
    with tempfile.TemporaryDirectory() as folder:
        args = FlextronTrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=batch, loss_chunk_size=128, use_cpu=device == "cpu",
            report_to="none", save_strategy="no", disable_tqdm=True, **changes,
        )  # fmt: skip
        run = FlextronTrainer(elastic, args, teacher=teacher, train_dataset=rows)
        plan = run.plan()
        teachers = [] if run.teacher is None else [run.teacher]
        measured = peak_bytes(run.train, device, run.model, *teachers)
    ratio = round(plan.total / measured, 3)
    return {"plan_mib": round(plan.total / 2**20, 1), "peak_mib": round(measured / 2**20, 1), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    device = options.device
    result: dict[str, object] = {"machine": machine(device), "rows": {}}
    for size in options.sizes:
        for setting in options.settings:
            result["rows"][f"{size} {setting}"] = row = compare(size, setting, device)
            print(size, setting, row, flush=True)
            if not options.no_save:
                save(f"memory_{device}", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
