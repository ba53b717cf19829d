"""The loss of every budget in every number format, for quantize-then-slice: weights are quantized once, at full size.

    python benchmarks/bench_quantized.py flextron-demo/elastic

Prints a row for every format and saves all of them in docs/results/quantized_cpu.json; needs torchao, and bitsandbytes
where that is installed (which cannot slice, so its rows are loaded at each budget).
"""

import argparse
import importlib.util
import json
from typing import Any

import torch
from common import RESULTS, machine
from transformers import BitsAndBytesConfig, TorchAoConfig

from flextron_trainer.data import load_text, load_tokenizer, pack
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import FlextronForCausalLM


def formats() -> dict[str, dict[str, Any]]:
    """Arguments of `from_pretrained` for each format that can run here."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    int4 = {
        f"int4, groups of {size}": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(size))
        for size in (16, 32)
    }
    found: dict[str, dict[str, Any]] = {"float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16}}
    for name, config in {"int8 weight-only": Int8WeightOnlyConfig(), **int4}.items():
        found[f"torchao {name}"] = {"dtype": torch.float32, "quantization_config": TorchAoConfig(config)}
    if importlib.util.find_spec("bitsandbytes"):
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        found["bitsandbytes int8"] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        found["bitsandbytes nf4"] = {"dtype": torch.float32, "quantization_config": nf4}
    return found


def loss_at(model: Any, folder: str, settings: dict[str, Any], name: str, rows: Any) -> float | str:
    """The loss of a row of the frontier, or why there is none."""
    try:
        if not model.switchable:
            model = FlextronForCausalLM.from_pretrained(folder, flextron_budget=name, **settings)
            return evaluate_model(model, rows)["loss"]
        with model.at_budget(name):
            return evaluate_model(model, rows)["loss"]
    except (ValueError, RuntimeError) as error:  # also of kernels that do not take these shapes
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an elastic model")
    parser.add_argument("--dataset", default="stdlib", help="held-out text, as for `flextron evaluate`")
    parser.add_argument("--rows", type=int, default=64, help="blocks of 128 tokens")
    args = parser.parse_args()

    texts = load_text(args.dataset).shuffle(seed=0).select(range(60))
    rows = pack(texts, load_tokenizer(args.model), sequence_length=128).select(range(args.rows))
    table: dict[str, dict[str, float | str]] = {}
    for label, settings in formats().items():
        model = FlextronForCausalLM.from_pretrained(args.model, **settings)
        names = [row["name"] for row in model.frontier]
        table[label] = {name: loss_at(model, args.model, settings, name, rows) for name in names}
        cells = (f"{value:.4f}" if isinstance(value, float) else "refused" for value in table[label].values())
        print(f"{label:26}", *(f"{name}: {cell}" for name, cell in zip(names, cells, strict=True)))
    result = {"model": args.model, "tokens": args.rows * 128, "loss": table, "machine": machine("cpu")}
    (RESULTS / "quantized_cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
