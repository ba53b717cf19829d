"""The whole way on real text in a few minutes: train a parent, make it elastic, train it at all sizes, use it."""

import json
import logging
import os
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

from modeling_flextron import FlextronForCausalLM
from modeling_flextron.errors import invalid
from modeling_flextron.model_card import plot_frontier, write_model_card

from . import standalone
from .conversion.convert import convert
from .data import collator, load_text, load_tokenizer, pack
from .evaluation.quality import evaluate_frontier, evaluate_model, name_of
from .models import load_stock
from .training.arguments import FlextronTrainingArguments
from .training.trainer import FlextronTrainer

BUDGETS = (1, 0.75, 0.5, 0.25)
CORRECTIONS = 0.03  # of the parameters of a row, to make up for what it lacks
SEQUENCE_LENGTH = 128
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
        eval_rows: Blocks of held-out text to evaluate on.
        seed: Of everything random.
        trust_remote_code: Run the code that the files of `parent` name, where they name some.

    Returns:
        What was measured: one entry per budget, the paths, and the generated texts.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(output)
    repo = output / "elastic"
    logging.getLogger("httpx").setLevel(logging.WARNING)

    console.rule("1/6 text")
    texts = load_text(dataset).shuffle(seed=seed)
    if len(texts) < 2:
        rule = "It has one document, and the demo holds some out."
        raise invalid("dataset", dataset, rule, "Pass text of several files or rows.")
    held_out = max(1, len(texts) // 20)
    train_text, eval_text = texts.select(range(held_out, len(texts))), texts.select(range(held_out))
    if parent is None:
        sample = train_text.select(range(min(len(train_text), 400)))
        tokenizer = train_tokenizer(sample[sample.column_names[0]])
        train_text = train_text.select(range(min(len(train_text), 800)))  # more than the steps below will see
    else:
        tokenizer = load_tokenizer(parent, trust_remote_code=trust_remote_code)
    rows = pack(train_text, tokenizer, SEQUENCE_LENGTH)
    eval_blocks = pack(eval_text, tokenizer, SEQUENCE_LENGTH).shuffle(seed=seed)
    eval_blocks = eval_blocks.select(range(min(eval_rows, len(eval_blocks))))
    named = f"5 % of {name_of(dataset)}, held out"

    console.rule("2/6 parent")
    teacher: PreTrainedModel
    if parent is None:
        teacher = train_parent(tokenizer, rows, output / "parent", device, parent_steps, seed)
    else:
        teacher = load_stock(parent, trust_remote_code=trust_remote_code).to(device).eval()
    parent_loss = evaluate_model(teacher, eval_blocks, 32)["loss"]

    console.rule("3/6 conversion")
    calibration = rows.select(range(min(256, len(rows))))
    elastic = convert(teacher, calibration, budgets=BUDGETS, sequence_length=SEQUENCE_LENGTH)
    sliced = evaluate_frontier(elastic, eval_blocks, 32, named)
    elastic = convert(teacher, calibration, budgets=BUDGETS, sequence_length=SEQUENCE_LENGTH, corrections=CORRECTIONS)
    repaired = evaluate_frontier(elastic, eval_blocks, 32, named)

    console.rule("4/6 elastic training")
    arguments = FlextronTrainingArguments(**settings(output / "run", device, elastic_steps, seed, learning_rate=2e-3))
    trainer = FlextronTrainer(
        elastic, arguments, teacher=teacher, train_dataset=rows.shuffle(seed=seed + 1), processing_class=tokenizer
    )
    trainer.train()

    console.rule("5/6 evaluation")
    after = evaluate_frontier(elastic, eval_blocks, 32, named)
    elastic.export(repo)
    tokenizer.save_pretrained(repo)
    write_model_card(elastic, repo)
    curves = {"slices": sliced, "repaired slices": repaired, "after training": after}
    _plot(elastic, parent_loss, curves, output / "frontier.png")

    console.rule("6/6 loading without this package")
    runs = use_without_package(repo, "def main():\n", [row.name for row in elastic.frontier])
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
    console.print(f"\nThe model is in {repo}, the plot in {output / 'frontier.png'}.")
    summary = {"repo": str(repo), "plot": str(output / "frontier.png"), "device": device, "rows": results}
    for folder in (output / "parent", output / "run"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # the Trainer made it
    (output / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
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
