"""Which sub-network a budget should get: uniform sizes, random ones, or sizes found layer by layer.

    python benchmarks/bench_routing.py                       # three seeds, about 20 minutes on 2 cores
    python benchmarks/bench_routing.py --seeds 0 --budgets 0.5 --evaluations 32 --parent-steps 20 --elastic-steps 5

For each seed a byte-pair LLaMA of about a million parameters and eight layers is trained on the sources of Python's
standard library, made elastic, and trained with full, smallest and random heterogeneous sub-networks in every step.
At each budget of non-embedding parameters the losses (nats per token, on held-out text) are those of
    uniform   the best network with the same sizes in all layers
    random    the median of random sub-networks that use the budget
    search    the best of an evolutionary search over the sizes of every layer
where "best" means on held-in batches. All are real slices of the same weights. Trained models are kept in `--work`, so
that a second run only measures. The last line is JSON, also saved under docs/results/ after every seed.
"""

import argparse
import json
import random
import statistics
from functools import cache, partial
from pathlib import Path

import torch
from common import machine, save
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import collator, load_text, pack
from flextron_trainer.demo import settings, train_tokenizer
from flextron_trainer.evaluation import evaluate_model
from flextron_trainer.frontier import mean_loss
from flextron_trainer.search import fill, search
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.routing import Choices
from modeling_flextron.subnetwork import parameters_of, random_subnetwork, uniform_subnetworks

LENGTH = 128


@cache
def texts(seed: int) -> tuple:
    """Training blocks, held-in and held-out blocks, and their tokenizer."""
    documents = load_text("stdlib").shuffle(seed=0)
    few = len(documents) // 20
    tokenizer = train_tokenizer(documents.select(range(few, few + 400))["text"])
    held_out = pack(documents.select(range(few)), tokenizer, LENGTH).shuffle(seed=0)
    rows = pack(documents.select(range(few, few + 800)), tokenizer, LENGTH).shuffle(seed=seed)
    return rows, rows.select(range(64)), held_out.select(range(128)), tokenizer


def trained(seed: int, options: argparse.Namespace) -> tuple[FlextronForCausalLM, float]:
    """The elastic model of a seed, trained or read from an earlier run, and the loss of its parent."""
    folder = Path(options.work) / f"seed-{seed}-{options.parent_steps}-{options.elastic_steps}"
    rows, _, held_out, tokenizer = texts(seed)
    if (folder / "parent.json").is_file():
        return FlextronForCausalLM.from_pretrained(folder), json.loads((folder / "parent.json").read_text())["loss"]
    set_seed(seed)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    parent = LlamaForCausalLM(LlamaConfig(**shape, **tokens, max_position_embeddings=256))
    common = partial(settings, folder / "run", "cpu", seed=seed)
    arguments = TrainingArguments(**common(steps=options.parent_steps, learning_rate=3e-3))
    Trainer(parent, arguments, train_dataset=rows, data_collator=collator(tokenizer)).train()
    loss = evaluate_model(parent.eval(), held_out, 32)["loss"]

    elastic = convert(parent, rows.select(range(256)), heads=[1, 0.75, 0.5, 0.25], budgets=[1, 0.25])
    arguments = FlextronTrainingArguments(**common(steps=options.elastic_steps, learning_rate=2e-3))
    FlextronTrainer(
        elastic, arguments, teacher=parent, train_dataset=rows.shuffle(seed=seed + 1), processing_class=tokenizer
    ).train()
    elastic.save_pretrained(folder)
    (folder / "parent.json").write_text(json.dumps({"loss": loss}))
    return elastic.eval(), loss


def measured(model: FlextronForCausalLM, budget: float, seed: int, options: argparse.Namespace) -> dict:
    """Losses of every way to spend a budget."""
    _, held_in, held_out, _ = texts(seed)
    batches = list(torch.tensor(held_in["input_ids"]).split(32))
    inside = partial(mean_loss, model, batches=batches)
    limit, cost = budget * model.config.parent_size(), parameters_of(model.config, embeddings=False)

    uniform = [s for s in uniform_subnetworks(model.config) if cost(s) <= limit]
    uniform = [s for s in uniform if not any(t != s and t.contains(s) for t in uniform)]
    generator = random.Random(seed)
    drawn = []
    for _ in range(15):
        start = Choices.of(model.config, random_subnetwork(model.config, generator))
        drawn.append(fill(model.config, start, cost, limit, generator).subnetwork(model.config))
    found, _ = search(model.config, inside, limit, evaluations=options.evaluations, seed=seed)

    def outside(subnetwork) -> float:
        return evaluate_model(model, held_out, 32, subnetwork)["loss"]

    chosen = {"uniform": min(uniform, key=inside), "search": found}
    result = {
        name: {"loss": outside(s), "cost": cost(s) / model.config.parent_size(), "subnetwork": s.to_dict()}
        for name, s in chosen.items()
    }
    return result | {"random": {"loss": statistics.median(map(outside, drawn)), "of": len(drawn)}}


def main() -> None:
    """Measure, save after every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.3])
    parser.add_argument("--parent-steps", type=int, default=800)
    parser.add_argument("--elastic-steps", type=int, default=400)
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--work", default="routing-work", help="Folder of the trained models.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    result: dict = {"benchmark": "routing", "machine": machine("cpu"), "options": vars(options), "seeds": {}}
    for seed in options.seeds:
        model, parent = trained(seed, options)
        rows = texts(seed)[2]
        result["seeds"][seed] = {
            "parent": parent,
            "full": evaluate_model(model, rows, 32)["loss"],
            "budgets": {str(budget): measured(model, budget, seed, options) for budget in options.budgets},
        }
        if not options.no_save:
            save("routing_cpu", result)

    table = Table(title=f"held-out loss, mean of {len(options.seeds)} seeds (difference to uniform: mean ± spread)")
    for title in ("budget", "uniform", "random", "search"):
        table.add_column(title, justify="right")
    for budget in options.budgets:
        entries = [seed["budgets"][str(budget)] for seed in result["seeds"].values()]
        base = [entry["uniform"]["loss"] for entry in entries]
        cells = [f"{statistics.mean(base):.4f}"]
        for name in ("random", "search"):
            differences = [entry[name]["loss"] - own for entry, own in zip(entries, base, strict=True)]
            spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
            mean = statistics.mean(entry[name]["loss"] for entry in entries)
            cells.append(f"{mean:.4f} ({statistics.mean(differences):+.4f} ± {spread:.4f})")
        table.add_row(f"{budget:g}", *cells)
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
