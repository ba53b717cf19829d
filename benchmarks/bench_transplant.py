"""What a transplant is worth: an elastic model of a base, carried to a variant of that base.

    python benchmarks/bench_transplant.py BASE --train stories.txt --variant-train code.txt --variant-test held-out.txt
    python benchmarks/bench_transplant.py BASE ... --name transplant-near    # of the result; variants differ
    python benchmarks/bench_transplant.py --table                       # what was measured so far

BASE is a folder or a Hub id. The variant is the base, trained on another text by a plain language-model loss. Losses of
every row on the variant's held-out text, and steps of elastic training on it:
    converted            the variant converted with its own text, not trained
    order                the untrained elastic base, transplanted: the base's order and rows
    transplant           the elastic base that was trained on the base's text, transplanted
    transplant, trained  the same, then a tenth of the steps on the variant's text
    converted, a tenth   the variant converted and trained for a tenth of the steps
    converted, trained   the variant converted and trained for all of the steps
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, add_run_options, machine, run_settings, save, text_blocks
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert, transplant
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.data import collator, load_tokenizer
from modeling_flextron.frontier import held


def tuned(base: Any, data: torch.Tensor, args: argparse.Namespace) -> Any:
    """A copy of the base that was trained on another text."""
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in data]
    with tempfile.TemporaryDirectory() as folder:
        how = run_settings(folder, args.variant_steps, args.variant_rate, args.batch_size, args.seed)
        Trainer(model, TrainingArguments(**how), train_dataset=rows, data_collator=collator()).train()
    return model.eval()


def trained(model: Any, teacher: Any, data: torch.Tensor, steps: int, args: argparse.Namespace) -> Any:
    """An elastic model, trained at all of its rows with distillation."""
    with tempfile.TemporaryDirectory() as folder:
        how = FlextronTrainingArguments(**run_settings(folder, steps, args.rate, args.batch_size, args.seed))
        rows = [{"input_ids": row} for row in data]
        FlextronTrainer(model, how, teacher=teacher, train_dataset=rows).train()
    return model.eval()


def table(result: dict[str, Any]) -> str:
    """A line for each way, a column for each row."""
    rows = list(next(iter(result["losses"].values())))
    lines = [f"| way | elastic steps on the variant | {' | '.join(rows)} |", "|---|---:|" + "---:|" * len(rows)]
    for way, losses in result["losses"].items():
        cells = " | ".join(f"{losses[row]:.3f}" for row in rows)
        lines.append(f"| {way} | {result['steps'][way]} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="folder or Hub id")
    parser.add_argument("--train", type=Path, help="text that the elastic base is trained on")
    parser.add_argument("--variant-train", type=Path, help="text that the variant is trained on")
    parser.add_argument("--variant-test", type=Path, help="text of that kind that is in neither")
    parser.add_argument("--name", default="transplant_cpu", help="of the result")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variant-steps", type=int, default=300)
    parser.add_argument("--variant-rate", type=float, default=1e-3)
    add_run_options(parser)
    args = parser.parse_args()
    if args.table:
        for path in sorted(RESULTS.glob("transplant*.json")):
            print(f"{path.stem}\n\n{table(json.loads(path.read_text()))}\n")
        return

    tokenizer = load_tokenizer(args.base)
    data, other, test = (
        text_blocks(path, tokenizer, args.length) for path in (args.train, args.variant_train, args.variant_test)
    )
    tests = list(test[: args.test_blocks].split(4))
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    variant = tuned(base, other, args)
    fields = ("steps", "rate", "variant_steps", "variant_rate", "budgets", "batch_size", "length", "seed")
    result: dict[str, Any] = {
        "machine": machine("cpu"), "base": Path(args.base).name,
        "settings": {key: getattr(args, key) for key in fields},
        "parents": {"base": loss_of(base, tests), "variant": loss_of(variant, tests)}, "losses": {}, "steps": {},
    }  # fmt: skip

    def measure(way: str, model: Any, steps: int) -> None:
        rows = held(model.config.frontier)
        result["losses"][way] = {name: mean_loss(model, row, tests) for name, row in rows.items()}
        result["steps"][way] = steps
        save(args.name, result)
        print(way, result["losses"][way], flush=True)

    def converted(parent: Any, blocks: torch.Tensor) -> Any:
        return convert(parent, blocks[: args.calibration_blocks], budgets=args.budgets, seed=args.seed)

    tenth = max(1, args.steps // 10)
    measure("converted", converted(variant, other), 0)
    elastic = converted(base, data)
    measure("order", transplant(elastic, variant, base), 0)
    elastic = trained(elastic, base, data, args.steps, args)
    carried = transplant(elastic, variant, base)
    result["differences"] = carried.config.conversion["transplanted"]
    measure("transplant", carried, 0)
    measure("transplant, trained", trained(carried, variant, other, tenth, args), tenth)
    measure("converted, a tenth", trained(converted(variant, other), variant, other, tenth, args), tenth)
    measure("converted, trained", trained(converted(variant, other), variant, other, args.steps, args), args.steps)
    print(table(result))


@torch.no_grad()
def loss_of(model: Any, tests: list[torch.Tensor]) -> float:
    """Mean loss of a stock model in nats per token."""
    return sum(model(batch, labels=batch).loss.item() * len(batch) for batch in tests) / sum(map(len, tests))


if __name__ == "__main__":
    main()
