"""What the clients read: a small LLaMA, GPT-2 and Qwen3, elastic and exported, and what transformers computes.

python tests/interop/prepare.py WORK
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flextron_trainer import convert
from flextron_trainer.cli import app
from flextron_trainer.data import collator, load_text, pack
from flextron_trainer.demo import settings, train_tokenizer
from flextron_trainer.evaluation.quality import evaluate_frontier

PROMPTS, PROMPT, NEW = 4, 24, 16
SIZES: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "gpt2": GPT2Config(vocab_size=1024, n_embd=128, n_layer=4, n_head=4, n_positions=512),
    "qwen3": Qwen3Config(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
CHOICES: dict[str, Any] = {
    "llama": {"mlp": [1, 0.75, 0.5, 0.25], "heads": [1, 0.5], "hidden": [1, 0.75], "depth": [1, 0.75]},
    "gpt2": {"mlp": [1, 0.75, 0.5], "heads": [1, 0.75, 0.5], "hidden": [1, 0.75, 0.5], "depth": [1, 0.75]},
    "qwen3": {"uniform": False, "corrections": 0.03},  # the layers of its smaller rows differ
}
LAYERS = {"mlp": [384, 96, 192, 288], "heads": [4, 2, 2, 4]}  # of a LLaMA that no stock class holds
NARROW = {"hidden": 96, "heads": 3, "mlp": 384, "layers": 3}  # of a GPT-2 that llama.cpp holds: mlp = 4 x hidden


def flextron(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def train(kind: str, tokenizer, rows, work: Path, steps: int = 200):
    """A parent that has learned enough for its choices to mean something."""
    set_seed(0)
    config = SIZES[kind]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    arguments = TrainingArguments(**settings(work / "run", "cpu", steps, seed=0, learning_rate=3e-3))
    Trainer(model, arguments, train_dataset=rows, data_collator=collator(tokenizer)).train()
    return model.eval()


@torch.no_grad()
def reference(folder: Path, prompts: torch.Tensor, output: Path) -> None:
    """Greedy tokens, and log probabilities of every position, of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    text = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    logits = model(text).logits
    numpy.savez(output, text=text.numpy(), logprobs=logits.log_softmax(-1).numpy())


def write_tasks(folder: Path, texts: list[str]) -> None:
    """Two tasks of lm-eval on held-out text: perplexity, and which of three lines goes on."""
    folder.mkdir()
    lines = [[line for line in text.splitlines() if len(line) > 20] for text in texts]
    lines = [found for found in lines if len(found) > 40]
    choices = []
    for i, found in enumerate(lines):
        others = lines[i - 1]
        label = i % 3
        options = [others[10], others[20]]
        options.insert(label, found[11])
        choices.append({"context": found[10] + "\n", "choices": options, "label": label})
    data = {"ppl": [{"text": text[:1500]} for text in texts if text.strip()], "mc": choices}
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    kinds = {
        "ppl": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte"}]},
        "mc": {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{label}}", "target_delimiter": "",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    }  # fmt: skip
    for name, rows in data.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]), encoding="utf-8")
        task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(path)}}, **common, **kinds[name]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def main(work: Path) -> None:
    torch.set_num_threads(2)
    texts = load_text("stdlib").shuffle(seed=0)
    held_out, used = texts.select(range(60)), texts.select(range(60, 500))
    tokenizer = train_tokenizer(used["text"])
    rows, evaluation = pack(used, tokenizer, 128), pack(held_out, tokenizer, 128).select(range(64))
    prompts = torch.tensor(evaluation.select(range(PROMPTS))["input_ids"])[:, :PROMPT]
    for kind in SIZES:
        parent = train(kind, tokenizer, rows, work)
        calibration = rows.select(range(64))
        elastic = convert(parent, calibration, budgets=[1, 0.5, 0.3], sequence_length=128, **CHOICES[kind])
        evaluate_frontier(elastic, evaluation, 32)
        elastic.save_pretrained(work / kind)
        tokenizer.save_pretrained(work / kind)
        for row in elastic.frontier:
            if row.subnetwork.uniform:
                flextron("export", work / kind, work / f"{kind}-dense-{row.name}", "--dense", "--budget", row.name)
    flextron("export", work / "gpt2", work / "gpt2-dense-narrow", "--dense", "--budget", json.dumps(NARROW))
    flextron("export", work / "llama", work / "llama-half", "--plain", "--budget", "0.5")
    flextron("export", work / "llama", work / "llama-layers", "--plain", "--budget", json.dumps(LAYERS))
    flextron("export", work / "llama", work / "llama-snapped", "--dense", "--snap", "--budget", json.dumps(LAYERS))
    flextron("export", work / "qwen3", work / "qwen3-half", "--plain", "--budget", "0.5")
    flextron("export", work / "qwen3", work / "mlx" / "qwen3-half", "--format", "mlx", "--budget", "0.5")
    (work / "gguf").mkdir()
    for name, budget in (("llama-dense-1", "1"), ("llama-dense-0.5", "0.5"), ("llama-layers", json.dumps(LAYERS))):
        flextron("export", work / "llama", work / "gguf" / f"{name}.gguf", "--gguf", "--budget", budget)
    write_tasks(work / "tasks", held_out["text"])
    (work / "reference").mkdir()
    for folder in sorted(path.parent for path in work.glob("*/config.json")):
        reference(folder, prompts, work / "reference" / f"{folder.name}.npz")
    text = "def main():\n    return 0  # done"
    ids = AutoTokenizer.from_pretrained(work / "llama", trust_remote_code=True)(text)["input_ids"]
    (work / "reference" / "tokens.json").write_text(json.dumps({"text": text, "ids": ids}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
