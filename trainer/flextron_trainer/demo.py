"""The whole way on real text in a few minutes: train a parent, make it elastic, train it at all sizes, use it."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_flextron import FlextronConfig, FlextronForCausalLM

from . import standalone
from .conversion.convert import convert
from .data import collator, load_text, load_tokenizer, pack
from .evaluation.quality import evaluate_frontier, evaluate_model, name_of
from .files import write_json
from .measuring.latency import measure_into
from .models import load_stock
from .publishing.card import plot_frontier, write_model_card
from .training.arguments import FlextronTrainingArguments
from .training.trainer import FlextronTrainer

BUDGETS = {"1": 1, "0.75": 0.75, "0.5": 0.5, "small": 0.25}
AUTO = (0.75, 0.5)  # what tokens that choose their sizes may cost on average
CORRECTIONS = 0.03  # of the parameters of a row, to make up for what it lacks
SEQUENCE_LENGTH = 128
LATENCY_ROUNDS = 5
PLAIN = {"skip_special_tokens": True}
END = "<|endoftext|>"
console = Console(stderr=True)


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, bos_token=END)


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained LLaMA of about a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def settings(folder: Path, device: str, steps: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Training arguments that both trainings share."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "adam_beta2": 0.95,
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
    }


def train_parent(
    tokenizer: PreTrainedTokenizerFast, rows: Dataset, folder: Path, device: str, steps: int, seed: int
) -> LlamaForCausalLM:
    """Train `small_llama` with the plain Trainer."""
    set_seed(seed)
    parent = small_llama(tokenizer)
    arguments = TrainingArguments(**settings(folder, device, steps, seed, learning_rate=3e-3))
    Trainer(parent, arguments, train_dataset=rows, data_collator=collator(tokenizer)).train()
    return parent.eval()


def run(
    output: str | os.PathLike = "flextron-demo",
    *,
    dataset: str = "stdlib",
    parent: str | None = None,
    device: str | None = None,
    parent_steps: int = 600,
    elastic_steps: int = 200,
    router_steps: int = 40,
    eval_rows: int = 128,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run the demo and leave a Hub-ready folder.

    Args:
        output: Folder to work in; the elastic model ends up in `output/elastic`, the plot in `output/frontier.png`,
            what is returned in `output/results.json`.
        dataset: Text: `"stdlib"` for the sources of Python's standard library, or anything `data.load_text` reads.
        parent: Hub id or folder of a trained model; None trains a small LLaMA first.
        device: `"cpu"` or `"cuda"`; by default a GPU when there is one.
        parent_steps: Steps for the parent that is trained here.
        elastic_steps: Steps of elastic training.
        router_steps: Steps in which the tokens learn to choose their sizes.
        eval_rows: Blocks of held-out text to evaluate on.
        trust_remote_code: Run the code that the files of `parent` name, where they name some.

    Returns:
        What was measured: one entry per budget, the paths, and the generated texts.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(output)
    repo = output / "elastic"
    logging.getLogger("httpx").setLevel(logging.WARNING)

    console.rule("1/8 text")
    texts = load_text(dataset).shuffle(seed=seed)
    held_out = max(1, len(texts) // 20) if len(texts) > 1 else 0
    train_text, eval_text = texts.select(range(held_out, len(texts))), texts.select(range(held_out))
    if parent is None:
        sample = train_text.select(range(min(len(train_text), 400)))
        tokenizer = train_tokenizer(sample[sample.column_names[0]])
        train_text = train_text.select(range(min(len(train_text), 800)))  # more than the steps below will see
    else:
        tokenizer = load_tokenizer(parent, trust_remote_code=trust_remote_code)
    rows = pack(train_text, tokenizer, SEQUENCE_LENGTH)
    if held_out:
        eval_blocks = pack(eval_text, tokenizer, SEQUENCE_LENGTH).shuffle(seed=seed)
    else:  # one document, so the end of it
        parts = rows.train_test_split(0.05, shuffle=False)
        rows, eval_blocks = parts["train"], parts["test"]
    eval_blocks = eval_blocks.select(range(min(eval_rows, len(eval_blocks))))
    prompt = "def main():\n" if dataset == "stdlib" else tokenizer.decode(eval_blocks[0]["input_ids"][:8], **PLAIN)
    named = f"5 % of {name_of(dataset)}, held out"

    console.rule("2/8 parent")
    teacher: PreTrainedModel
    if parent is None:
        teacher = train_parent(tokenizer, rows, output / "parent", device, parent_steps, seed)
    else:
        teacher = load_stock(parent, trust_remote_code=trust_remote_code).to(device).eval()
    parent_loss = evaluate_model(teacher, eval_blocks, 32)["loss"]

    console.rule("3/8 conversion")
    calibration, layers = rows.select(range(min(256, len(rows)))), teacher.config.num_hidden_layers
    sizes: dict[str, Any] = {"budgets": BUDGETS, "depth": sorted({layers, layers - layers // 4}, reverse=True)}
    elastic = convert(teacher, calibration, sequence_length=SEQUENCE_LENGTH, **sizes)
    sliced = evaluate_frontier(elastic, eval_blocks, 32, named)
    elastic = convert(teacher, calibration, sequence_length=SEQUENCE_LENGTH, corrections=CORRECTIONS, **sizes)
    repaired = evaluate_frontier(elastic, eval_blocks, 32, named)

    console.rule("4/8 elastic training")
    console.print(
        "The loss that is logged now is a distance to the parent's predictions, the mean of the sizes of a step: it"
        f" falls towards 0. Losses in the tables are those on held-out text, where the parent has {parent_loss:.2f}."
    )
    data = {"train_dataset": rows.shuffle(seed=seed + 1), "processing_class": tokenizer}
    arguments = FlextronTrainingArguments(**settings(output / "run", device, elastic_steps, seed, learning_rate=2e-3))
    FlextronTrainer(elastic, arguments, teacher=teacher, **data).train()

    console.rule("5/8 token routers")
    console.print("Every token learns to choose its sizes. This loss is that on text, and how far costs are from 0.5.")
    routers: dict[str, Any] = {"stage": "router", "router_method": "token", "router_budgets": list(AUTO)}
    common = settings(output / "run", device, router_steps, seed, learning_rate=2e-3)
    FlextronTrainer(elastic, FlextronTrainingArguments(**common, **routers), **data).train()

    console.rule("6/8 evaluation")
    after = evaluate_frontier(elastic, eval_blocks, 32, named)
    elastic.export(repo)
    tokenizer.save_pretrained(repo)
    rows_after = {name: after[name] for name in sliced}
    curves = {"slices": sliced, "repaired slices": repaired, "after training": rows_after}
    _plot(elastic, parent_loss, curves, output / "frontier.png")

    console.rule("7/8 speed on this machine")
    measure_into(repo, elastic, rounds=LATENCY_ROUNDS)
    elastic.config.latency_tables = FlextronConfig.from_pretrained(repo).latency_tables
    write_model_card(elastic, repo)

    console.rule("8/8 loading without this package")
    runs = use_without_package(repo, prompt, [row.name for row in elastic.frontier])
    results = [
        {
            "budget": row.name,
            "parameters": used["parameters"],
            "bytes": used["bytes"],
            "parent_loss": parent_loss,
            "sliced_loss": sliced[row.name]["loss"],
            "repaired_loss": repaired[row.name]["loss"],
            "trained_loss": after[row.name]["loss"],
            "tokens_per_second": round(used["tokens_per_second"], 1),
        }
        for row, used in zip(elastic.frontier, runs, strict=True)
    ]
    _print_table(results)
    for used in runs:
        console.print(f"\n[bold]budget {used['budget']} writes:[/bold] {used['text']!r}", highlight=False)
    _print_next(repo, prompt, output / "frontier.png")
    summary: dict[str, Any] = {
        "repo": str(repo),
        "plot": str(output / "frontier.png"),
        "device": device,
        "rows": results,
    }
    summary["auto"] = {f"auto:{target:g}": after[f"auto:{target:g}"]["loss"] for target in AUTO}
    for folder in (output / "parent", output / "run"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # the Trainer made it
    write_json(output / "results.json", summary)
    return summary


def use_without_package(repo: str | os.PathLike, prompt: str, budgets: list[str]) -> list[dict[str, Any]]:
    """Run `standalone.py` in a process of its own, with the code that was just written into `repo`."""
    command = [sys.executable, str(Path(standalone.__file__)), "--trust-remote-code", str(repo), prompt, *budgets]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _plot(elastic: FlextronForCausalLM, parent_loss: float, results: dict[str, dict], path: Path) -> None:
    sizes = {row.name: row.parameters for row in elastic.frontier}
    curves = {
        label: [(sizes[name], result["loss"]) for name, result in found.items()] for label, found in results.items()
    }
    curves["parent"] = [(max(sizes.values()), parent_loss)]
    plot_frontier(curves, path, "One set of weights, every size")


def _print_table(results: list[dict[str, Any]]) -> None:
    table = Table("budget", "parameters", "bytes", "loss parent", "sliced", "repaired", "trained", "tokens/s")
    for row in results:
        counts = (f"{row[name]:,}" for name in ("parameters", "bytes"))
        losses = (f"{row[f'{name}_loss']:.3f}" for name in ("parent", "sliced", "repaired", "trained"))
        table.add_row(row["budget"], *counts, *losses, f"{row['tokens_per_second']:,.0f}")
    console.print(table)


def _print_next(repo: Path, prompt: str, plot: Path) -> None:
    """Say what is where, and what to try with it."""
    console.print(f"\nThe model is in {repo}, the plot in {plot}. Try next:\n", highlight=False)
    for command, meaning in (
        (f"generate {repo} {shlex.quote(prompt.strip())} --budget small", "also 0.5, 25ms, 'loss<=4', auto:0.5"),
        (f"bench {repo} --rounds 3", "what a size costs and saves on this machine"),
        (f"export {repo} llama-half --dense --budget 0.5", "one size as a stock model, for other engines"),
    ):
        console.print(f"  flextron {command}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"      [dim]{meaning}[/dim]", highlight=False)
