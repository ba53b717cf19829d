"""A teacher on disk (`flextron teach`) against one in memory: bytes, errors of what is drawn, time, memory, losses.

    python benchmarks/bench_teach.py PARENT --train text.txt --test other.txt
    python benchmarks/bench_teach.py PARENT --train text.txt --steps 0  # bytes, errors, time and memory alone
    python benchmarks/bench_teach.py --table                            # what was measured so far

Errors are those of the probabilities that stand in for the teacher's, which the gradient in the student's logits has
too: root of the summed squares at a token, mean over tokens. One is of a single reading of the text, the other of the
mean of many, which for what is unbiased goes to 0. `independent` draws one token after the other; `most likely` keeps
as many tokens as `drawn` does on average, as caches often do.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    add_run_options,
    against,
    interleaved,
    machine,
    peak_bytes,
    run_settings,
    save,
    text_blocks,
)
from transformers import AutoModelForCausalLM

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert, teach
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.data import load_tokenizer
from flextron_trainer.models import load_elastic
from flextron_trainer.training.teacher_cache import draw_tokens
from modeling_flextron.frontier import held

READINGS = 64


def errors(parent: Any, blocks: torch.Tensor, draws: int) -> dict[str, Any]:
    """Errors of probabilities that were drawn or cut off, on some text."""
    with torch.no_grad():
        exact = parent(blocks).logits.flatten(0, 1).float().softmax(-1)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        ids, counts, sizes = draw_tokens(exact, draws, torch.rand(len(exact), generator=generator))
        rows = torch.arange(len(exact)).repeat_interleave(sizes)
        return torch.zeros_like(exact).index_put_((rows, ids), counts / draws)

    def independent() -> torch.Tensor:
        ids = exact.multinomial(draws, replacement=True, generator=generator)
        return torch.zeros_like(exact).scatter_add_(-1, ids, torch.full(ids.shape, 1 / draws))

    kept = round((drawn() > 0).sum(-1).float().mean().item())
    top, ids = exact.topk(kept)
    cut = torch.zeros_like(exact).scatter_(-1, ids, top / top.sum(-1, keepdim=True))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "drawn": drawn, "independent": independent, "most likely": lambda: cut,
    }  # fmt: skip
    result: dict[str, Any] = {"draws": draws, "kept": kept}
    for name, way in ways.items():
        total, single = torch.zeros_like(exact), 0.0
        for _ in range(READINGS):
            found = way()
            total += found / READINGS
            single += (found - exact).norm(dim=-1).mean().item() / READINGS
        result[name] = {"one reading": single, "mean of many": (total - exact).norm(dim=-1).mean().item()}
    return result


def trainer_of(begin: str, teacher: Any, rows: list[Any], folder: str, steps: int, args: argparse.Namespace) -> Any:
    """A trainer of a fresh copy of the elastic model."""
    how = FlextronTrainingArguments(**run_settings(folder, steps, args.rate, args.batch_size, args.seed))
    return FlextronTrainer(load_elastic(begin), how, teacher=teacher, train_dataset=rows)


def step_of(trainer: Any, rows: list[Any], number: int) -> Callable[[], object]:
    """Forward and backward of all sizes of a step, without the optimizer."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.config.training_runs = [{}]
    batch = trainer.data_collator(rows[:number])

    def step() -> None:
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(batch), torch.tensor(batch["labels"][:, 1:].numel()))

    return step


def table(result: dict[str, Any]) -> str:
    """What was measured of one parent."""
    lines = ["| draws | entries a token | bytes a token | teaching, us a token |", "|---:|---:|---:|---:|"]
    for draws, one in result["caches"].items():
        values = f"{one['entries_per_token']:.1f} | {one['bytes_per_token']:.1f} | {one['microseconds_per_token']:.0f}"
        lines.append(f"| {draws} | {values} |")
    lines += ["", "| draws | way | error of one reading | of the mean of many |", "|---:|---|---:|---:|"]
    for one in result["errors"]:
        for way in ("drawn", "independent", "most likely"):
            name = f"{way} {one['kept']}" if way == "most likely" else way
            values = one[way]
            lines.append(f"| {one['draws']} | {name} | {values['one reading']:.4f} | {values['mean of many']:.4f} |")
    lines += ["", "| teacher | time of a step | peak of a step, MiB |", "|---|---:|---:|"]
    for way, ratio in result["time"].items():
        peak = result["peak_bytes"].get(way)
        lines.append(f"| {way} | {ratio['ratio']:.3f} | {'' if peak is None else f'{peak / 2**20:.1f}'} |")
    if losses := result.get("losses"):
        rows = list(next(iter(losses.values())))
        lines += ["", f"| teacher | {' | '.join(rows)} |", "|---|" + "---:|" * len(rows)]
        lines += [f"| {way} | {' | '.join(f'{one[row]:.3f}' for row in rows)} |" for way, one in losses.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", help="folder or Hub id")
    parser.add_argument("--train", type=Path, help="text to convert, teach and train with")
    parser.add_argument("--test", type=Path, help="text that is not in it")
    parser.add_argument("--name", help="of the result; default: that of the parent")
    parser.add_argument("--draws", type=int, nargs="+", default=[12, 50, 200])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20)
    add_run_options(parser)
    args = parser.parse_args()
    if args.table:
        for path in sorted(RESULTS.glob("teach-*.json")):
            print(f"{path.stem}\n\n{table(json.loads(path.read_text()))}\n")
        return

    name = f"teach-{args.name or Path(args.parent).name}"
    tokenizer = load_tokenizer(args.parent)
    data = text_blocks(args.train, tokenizer, args.length)
    samples = max(args.steps, 1) * args.batch_size
    rows = [{"input_ids": row} for row in data[:samples]]
    parent = AutoModelForCausalLM.from_pretrained(args.parent, dtype=torch.float32).eval()
    fields = ("draws", "steps", "rounds", "rate", "budgets", "batch_size", "length", "seed")
    result: dict[str, Any] = {
        "machine": machine("cpu"), "parent": Path(args.parent).name, "vocab_size": parent.config.vocab_size,
        "settings": {key: getattr(args, key) for key in fields}, "samples": len(rows), "caches": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        begin = f"{work}/elastic"
        convert(parent, data[: args.calibration_blocks], budgets=args.budgets).save_pretrained(begin)
        teachers: dict[str, Any] = {"in memory": parent}
        for draws in args.draws:
            start = time.process_time()
            told = teach(parent, rows, f"{work}/cache-{draws}", draws=draws, batch_size=args.batch_size, seed=args.seed)
            seconds = time.process_time() - start
            result["caches"][draws] = {
                **told, "entries_per_token": told["entries"] / told["tokens"],
                "bytes_per_token": told["bytes"] / told["tokens"],
                "microseconds_per_token": 1e6 * seconds / told["tokens"],
            }  # fmt: skip
            teachers[f"on disk, {draws} draws"] = f"{work}/cache-{draws}"
        result["errors"] = [errors(parent, data[: max(1, 2048 // args.length)], draws) for draws in args.draws]
        save(name, result)
        runs = {way: trainer_of(begin, each, rows, work, 1, args) for way, each in teachers.items()}
        runs["control: in memory again"] = trainer_of(begin, parent, rows, work, 1, args)
        runs["none"] = trainer_of(begin, None, rows, work, 1, args)
        steps = {way: step_of(run, rows, args.batch_size) for way, run in runs.items()}
        result["time"] = against(interleaved(steps, args.rounds, "cpu"), "in memory")
        result["peak_bytes"] = {}
        for way, run in runs.items():
            held_there = [run.model] if run.teacher is None else [run.model, run.teacher]
            run.model.zero_grad()
            result["peak_bytes"][way] = peak_bytes(steps[way], "cpu", *held_there)
        save(name, result)
        print(table(result), flush=True)
        if args.steps:
            tests = list(text_blocks(args.test, tokenizer, args.length)[: args.test_blocks].split(4))
            result["losses"] = {}
            for way, each in {**teachers, "none": None}.items():
                run = trainer_of(begin, each, rows, work, args.steps, args)
                run.train()
                model = run.model.eval()
                result["losses"][way] = {
                    row: mean_loss(model, size, tests) for row, size in held(model.config.frontier).items()
                }
                save(name, result)
                print(way, result["losses"][way], flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
