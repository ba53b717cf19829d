"""Layers that learn one by one (stage `blocks`) against distillation of the whole, at equal tokens and equal compute.

    python benchmarks/bench_blocks.py PARENT --train text.txt --test other.txt --tokens 8192 32768 131072
    python benchmarks/bench_blocks.py --table                           # what was measured so far

PARENT is a folder or a Hub id. It is converted once, and each way begins anew from that for every number of tokens,
with a learning-rate schedule of that length:
    global              distillation from the parent (stage `elastic`), all rows in every step
    blocks              stage `blocks`, each row reading what it wrote itself
    blocks, parent      the same, rows reading what the parent's layers read
    blocks, corrections what rows own alone, the full network unchanged; only with --corrections
    blocks, global      half of the tokens each, one after the other
Compute is that of matrix products: forward and backward passes of all rows, and passes of the parent. Everything
measured is written at once, and a second start goes on where the first was stopped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, run_settings, save, text_blocks
from transformers import AutoModelForCausalLM

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.data import load_tokenizer
from flextron_trainer.models import load_elastic
from modeling_flextron import SubNetwork, flops_per_token
from modeling_flextron.frontier import held

WAYS: dict[str, list[dict[str, Any]]] = {
    "global": [{"stage": "elastic"}],
    "blocks": [{"stage": "blocks"}],
    "blocks, parent": [{"stage": "blocks", "block_inputs": "parent"}],
    "blocks, corrections": [{"stage": "blocks", "block_parameters": "corrections"}],
    "blocks, global": [{"stage": "blocks"}, {"stage": "elastic"}],
}
RATES = {"elastic": 3e-3, "blocks": 3e-3, "corrections": 1e-2}


def compute(config: Any, stage: dict[str, Any], tokens: int, distinct: int, length: int) -> float:
    """Floating-point operations of a stage."""
    rows = list(held(config.frontier).values())

    def forward(subnetwork: SubNetwork, head: bool) -> int:
        outside = 0 if head else 2 * config.vocab_size * subnetwork.hidden
        return flops_per_token(config, subnetwork, length // 2) - outside

    if stage["stage"] == "elastic":
        return tokens * (forward(config.built, True) + sum(3 * forward(row, True) for row in rows))
    if stage.get("block_parameters") == "corrections":
        rows = [row for row in rows if row != config.built]
    passes = 0 if stage.get("block_inputs") == "parent" or "block_parameters" in stage else 1
    own = distinct * passes * sum(forward(row, False) for row in rows)
    return distinct * forward(config.built, False) + own + tokens * sum(3 * forward(row, False) for row in rows)


def run(way: str, begin: str, parent: Any, data: torch.Tensor, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a model in one of the ways; its losses and what it cost."""
    model, flops, start = load_elastic(begin), 0.0, time.process_time()
    stages, batch = WAYS[way], args.batch_size * args.length
    for number, stage in enumerate(stages):
        steps = max(1, tokens // len(stages) // batch)
        first = number * steps * args.batch_size % len(data)
        rows = [{"input_ids": row} for row in data.roll(-first, 0)[: steps * args.batch_size]]
        key = stage.get("block_parameters", stage["stage"])
        with tempfile.TemporaryDirectory() as folder:
            common = run_settings(folder, steps, (args.rate or RATES)[key], args.batch_size, seed=42)
            count = len(held(model.config.frontier))
            settings = FlextronTrainingArguments(**common, **stage, subnetworks_per_step=count)
            teacher = parent if stage["stage"] == "elastic" else None
            FlextronTrainer(model, settings, teacher=teacher, train_dataset=rows).train()
        flops += compute(model.config, stage, steps * batch, min(steps * batch, len(rows) * args.length), args.length)
    model.eval()
    return {"flops": flops, "seconds": time.process_time() - start} | losses(model, args.tests)


def losses(model: Any, tests: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
    """Text -> row -> loss."""
    rows = held(model.config.frontier)
    return {text: {name: mean_loss(model, row, test) for name, row in rows.items()} for text, test in tests.items()}


def table(result: dict[str, Any]) -> str:
    """Losses of the rows, one line for each way and number of tokens."""
    start = result["start"]
    texts = list(start)
    rows = [(text, row) for text in texts for row in start[text]]
    lines = [f"| way | tokens | TFLOP | {' | '.join(f'{row}, {text}' for text, row in rows)} |"]
    lines.append("|---|---:|---:|" + "---:|" * len(rows))
    lines.append(f"| converted | 0 | 0 | {' | '.join(f'{start[text][row]:.3f}' for text, row in rows)} |")
    found = [(int(tokens), way, one) for way, many in result["ways"].items() for tokens, one in many.items()]
    for tokens, way, one in sorted(found, key=lambda each: each[:2]):
        cells = " | ".join(f"{one[text][row]:.3f}" for text, row in rows)
        lines.append(f"| {way} | {tokens:,} | {one['flops'] / 1e12:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", help="folder or Hub id")
    parser.add_argument("--train", type=Path, help="text file to convert and train with")
    parser.add_argument("--test", type=Path, nargs="+", default=[], help="text files that are not in it")
    parser.add_argument("--name", help="of the result; default: that of the parent")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["global", "blocks", "blocks, global"])
    parser.add_argument("--corrections", type=float, default=0.0, help="share of a row's parameters")
    parser.add_argument("--by-layer", action="store_true", help="rows whose layers differ in size")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.75, 0.5, 0.25])
    parser.add_argument("--rate", type=json.loads, help='learning rates as JSON, such as {"elastic": 0.003}')
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--test-blocks", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, help="folder that keeps the converted model; default: a temporary one")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    args = parser.parse_args()

    name = f"blocks-{args.name or Path(args.parent or '').name}"
    path = RESULTS / f"{name}.json"
    if args.table:
        for each in sorted(RESULTS.glob("blocks-*.json")):
            print(f"{each.stem}\n\n{table(json.loads(each.read_text()))}\n")
        return
    wanted = ("corrections", "by_layer", "budgets", "batch_size", "length", "calibration_blocks", "test_blocks")
    settings = {key: value for key, value in vars(args).items() if key in wanted}
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine("cpu"), "settings": settings}
    if result["settings"] != settings:
        parser.error(f"{path} was measured with {result['settings']}; pass the same, or another --name.")
    tokenizer = load_tokenizer(args.parent)
    data = text_blocks(args.train, tokenizer, args.length)
    args.tests = {
        each.stem: list(text_blocks(each, tokenizer, args.length)[: args.test_blocks].split(4)) for each in args.test
    }
    parent = AutoModelForCausalLM.from_pretrained(args.parent, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        begin = str(args.work or temporary)
        if not Path(begin, "config.json").exists():
            converted = convert(
                parent, data[: args.calibration_blocks], budgets=args.budgets, corrections=args.corrections,
                uniform=not args.by_layer,
            )  # fmt: skip
            converted.save_pretrained(begin)
        model = load_elastic(begin)
        result["rows"] = {row: subnetwork.to_dict() for row, subnetwork in held(model.config.frontier).items()}
        result["start"] = result.get("start") or losses(model, args.tests)
        save(name, result)
        for tokens in args.tokens:
            for way in args.ways:
                place = result.setdefault("ways", {}).setdefault(way, {})
                if str(tokens) not in place:
                    place[str(tokens)] = run(way, begin, parent, data, tokens, args)
                    save(name, result)
                    print(way, tokens, place[str(tokens)], flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
