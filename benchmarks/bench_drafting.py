"""When a small sub-network pays as the draft of the large one (`generate(assistant_model=model.share(b))`).

    python benchmarks/bench_drafting.py                      # one CPU thread; trains once
    python benchmarks/bench_drafting.py --parent-steps 40 --elastic-steps 10 --prompts 3 --no-save      # a quick look

A LLaMA of 13 M parameters and eight layers is trained on the sources of Python's standard library, made elastic with
widths, heads and depth, and trained with its parent as teacher; `--work` keeps it for the next run. Then held-out text
is continued greedily in float32 with drafts of every smaller row of the frontier and of several lengths g:
    accepted    share of drafted tokens that were kept, of those that were decided upon; `a` in
    predicted   S = E / (g c + v), E = (1 - a^(g+1)) / (1 - a) tokens per cycle, where c is the time of a token of the
                draft and v that of reading g + 1 tokens, both / the time of a token of the full network
    measured    time of plain decoding / time with drafts, on the same prompt in the same round
    bound       the prediction where decoding is bound by memory: v = 1, and c is the ratio of the weights
The text must be that of plain decoding. "control" is plain decoding a second time: the same against the same. "stock"
are the settings of transformers (up to 20 tokens, until the draft is unsure), "auto" is `draft_budget="auto"` with a
latency table that is measured here. The last line is JSON, also saved under docs/results/.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import against, interleaved, machine, save, stdlib_blocks
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import collator
from flextron_trainer.demo import settings
from flextron_trainer.evaluation.quality import evaluate_frontier
from flextron_trainer.measuring.latency import entry_of, file_of, measure_latency, write_table
from flextron_trainer.models import write_config
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.drafting import Watch, constant, expected_acceptance, share_draft, tokens_per_cycle
from modeling_flextron.latency import LENGTHS
from modeling_flextron.subnetwork import weight_bytes

LENGTH = 128
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
CHOICES = {
    "mlp": [1, 0.5, 0.25, 0.125],
    "heads": [6, 4, 2],
    "depth": [8, 6, 4, 2],
    "budgets": [1, 0.5, 0.25, 0.1],
}


def trained(folder: Path, parent_steps: int, elastic_steps: int) -> tuple[FlextronForCausalLM, torch.Tensor]:
    """The elastic model, trained here or read from an earlier run, and held-out blocks `[N, LENGTH]`."""
    rows, held_out, _, tokenizer = stdlib_blocks(LENGTH, documents=1200, vocab_size=2048)
    if not (folder / "config.json").is_file():
        train(folder, tokenizer, rows.shuffle(seed=0), held_out.select(range(64)), parent_steps, elastic_steps)
    return FlextronForCausalLM.from_pretrained(folder).eval(), torch.tensor(held_out["input_ids"])


def train(folder: Path, tokenizer, rows, held_out, parent_steps: int, elastic_steps: int) -> None:
    """Train a parent, then the elastic model with the parent as its teacher; write it with its losses."""

    def common(steps: int, learning_rate: float) -> dict[str, Any]:
        # Mixed precision halves the time on processors that have it; what is measured later is float32.
        chosen = settings(folder / "run", "cpu", steps, seed=0, learning_rate=learning_rate)
        return chosen | {"per_device_train_batch_size": 8, "bf16": True}

    set_seed(0)
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    parent = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **tokens))
    arguments = TrainingArguments(**common(parent_steps, 2e-3))
    Trainer(parent, arguments, train_dataset=rows, data_collator=collator(tokenizer)).train()
    elastic = convert(parent.eval(), rows.select(range(64)), **CHOICES)
    arguments = FlextronTrainingArguments(**common(elastic_steps, 1e-3))
    FlextronTrainer(
        elastic, arguments, teacher=parent, train_dataset=rows.shuffle(seed=1), processing_class=tokenizer
    ).train()
    evaluate_frontier(elastic, held_out, 32)
    elastic.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # for `bench_quantized.py`


@torch.no_grad()
def on_text(model: FlextronForCausalLM, draft: str, blocks: torch.Tensor) -> dict[str, float]:
    """Acceptance on given text: greedily, and by sampling, which is the overlap of both distributions."""
    agreement, overlap = [], []
    for ids in blocks.split(8):
        full, small = model(ids).logits.softmax(-1), model(ids, flextron_budget=draft).logits.softmax(-1)
        agreement.append((full.argmax(-1) == small.argmax(-1)).float().mean())
        overlap.append(torch.minimum(full, small).sum(-1).mean())
    return {"greedy": torch.stack(agreement).mean().item(), "sampling": torch.stack(overlap).mean().item()}


def reading(model: FlextronForCausalLM, ids: torch.Tensor) -> dict[int, Callable[[], None]]:
    """Forward passes of one token, and of a token with drafted ones, behind `ids` `[1, S]` in the cache."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)

    def read(tokens: int) -> Callable[[], None]:
        def run():
            with torch.inference_mode():
                for _ in range(8):
                    model(ids[:, :tokens], past_key_values=cache, use_cache=True)
                    cache.crop(-tokens)

        return run

    return {tokens: read(tokens) for tokens in (1, *(length + 1 for length in LENGTHS))}


def measured_table(model: FlextronForCausalLM, folder: Path, context: int) -> None:
    """Measure the latency table that `"auto"` reads, into the folder of the model."""
    table = measure_latency(model, context=context, rounds=8, checks=3)
    write_table(table, folder / file_of(table))
    model.config.latency_tables = {file_of(table): entry_of(table)}
    write_config(model, folder)


class Drafting:
    """Continues prompts in all the ways that are compared."""

    def __init__(self, model: FlextronForCausalLM, prompts: list[torch.Tensor], new_tokens: int):
        self.model, self.prompts = model, prompts
        self.common = {"max_new_tokens": new_tokens, "do_sample": False}
        self.texts = [self.write(ids) for ids in prompts]
        self.names = [row["name"] for row in model.frontier[1:]]
        self.ways: dict[str, dict[str, Any]] = {"plain": {}, "control": {}, "auto": {"draft_budget": "auto"}}
        for name in self.names:
            budget = model.resolve_budget(name)
            for length in LENGTHS:
                self.ways[f"{name} {length}"] = {"assistant_model": share_draft(model, budget, **constant(length))}
            self.ways[f"{name} stock"] = {"assistant_model": model.share(budget)}

    def write(self, ids: torch.Tensor, **way: Any) -> torch.Tensor:
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **self.common, **way)

    def outcome(self, way: str) -> dict[str, float]:
        """Tokens of a cycle and the share that is accepted over all prompts, whose text must be the plain one."""
        tokens = cycles = kept = decided = 0
        length = way.split()[-1]
        for ids, plain in zip(self.prompts, self.texts, strict=True):
            watch = Watch()
            text = self.write(ids, streamer=watch, **self.ways[way])
            assert torch.equal(text, plain), way
            tokens, cycles = tokens + sum(watch.sizes[1:]), cycles + len(watch.sizes) - 1
            if length.isdigit():
                of_text = watch.kept(int(length))
                kept, decided = kept + of_text[0], decided + of_text[1]
        return {"tokens_per_cycle": tokens / cycles} | ({"accepted": kept / decided} if decided else {})

    def timed(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of every way, one prompt in each round."""

        def next_prompt(way: dict[str, Any]) -> Callable[[], Any]:
            turn = itertools.cycle(self.prompts)
            return lambda: self.write(next(turn), **way)

        return interleaved({name: next_prompt(way) for name, way in self.ways.items()}, rounds, "cpu")

    def parts(self, rounds: int) -> tuple[dict[str, float], dict[int, float]]:
        """c of every draft, and v of every length."""
        ids = self.prompts[0]
        alone = {name: lambda name=name: self.write(ids, flextron_budget=name) for name in ("1", *self.names)}
        alone = against(interleaved(alone, rounds, "cpu"), "1")
        reads = {str(tokens): run for tokens, run in reading(self.model, ids).items()}
        read = against(interleaved(reads, rounds, "cpu"), "1")
        c = {name: alone[name]["ratio"] for name in self.names}
        return c, {length: read[str(length + 1)]["ratio"] for length in LENGTHS}


def main() -> None:
    """Train or read the model, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent-steps", type=int, default=400)
    parser.add_argument("--elastic-steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--work", default="drafting-work", help="Folder of the trained model.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(options.work) / f"{options.parent_steps}-{options.elastic_steps}"
    model, held_out = trained(folder, options.parent_steps, options.elastic_steps)
    prompts = [row[None, : LENGTH // 2] for row in held_out[: options.prompts]]
    measured_table(model, folder, LENGTH - options.new_tokens // 2)
    drafting = Drafting(model, prompts, options.new_tokens)

    c, v = drafting.parts(options.rounds)
    outcomes = {way: drafting.outcome(way) for way in drafting.ways if way not in ("plain", "control", "auto")}
    speeds = against(drafting.timed(options.rounds), "plain")
    losses = {row["name"]: row["loss"] for row in model.frontier}
    size = {name: weight_bytes(model.config, model.resolve_budget(name)) for name in losses}
    chosen = {name: value for name, value in vars(options).items() if name not in ("work", "no_save")}
    result: dict[str, Any] = {
        "benchmark": "drafting", "machine": machine("cpu"), "options": chosen, "verify": v,
        "table": model.latency_table.drafting, "chosen": model.drafts.chosen and [
            model.drafts.chosen[0].to_dict(), model.drafts.chosen[1]
        ],
        "plain": speeds["plain"], "control": speeds["control"], "auto": speeds["auto"],
        "drafts": {
            name: {
                "cost": c[name], "loss": losses[name], "bytes": size[name] / size["1"],
                "expected": expected_acceptance(losses["1"], losses[name]),
                "on_text": on_text(model, name, held_out[: 8 * options.prompts]),
            } for name in drafting.names
        }, "rows": [],
    }  # fmt: skip
    table = Table("draft", "c", "length", "v", "accepted", "tokens/cycle", "predicted", "measured", "bound")
    for way, outcome in outcomes.items():
        name, length = way.split()
        row = {"draft": name, "length": length, **outcome, "speedup": 1 / speeds[way]["ratio"], "time": speeds[way]}
        cells = dict.fromkeys(("v", "accepted", "predicted", "bound"), "")
        if "accepted" in outcome:
            g, a = int(length), outcome["accepted"]
            expected = tokens_per_cycle(a, g)
            row["predicted"] = expected / (g * c[name] + v[g])
            row["bound"] = expected / (g * size[name] / size["1"] + 1)
            cells = {"v": v[g], "accepted": a, "predicted": row["predicted"], "bound": row["bound"]}
            cells = {title: f"{value:.2f}" for title, value in cells.items()}
        result["rows"].append(row)
        cells |= {"draft": name, "c": f"{c[name]:.2f}", "length": length, "measured": f"{row['speedup']:.2f}"}
        cells["tokens/cycle"] = f"{outcome['tokens_per_cycle']:.2f}"
        table.add_row(*(cells[column.header] for column in table.columns))
    if not options.no_save:
        save("drafting_cpu", result)
    console = Console(width=120)
    console.print(table)
    console.print(f"plain {1e3 * options.new_tokens / speeds['plain']['milliseconds']:.1f} tokens/s", highlight=False)
    console.print(f"control {speeds['control']['ratio']}, auto {speeds['auto']['ratio']} of the plain time")
    console.print({name: draft["on_text"] for name, draft in result["drafts"].items()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
