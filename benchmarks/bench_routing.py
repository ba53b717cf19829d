"""Which sub-network a budget should get: uniform sizes, random ones, searched ones, and those that routers learned.

    python benchmarks/bench_routing.py                       # three seeds, about 45 minutes on 2 cores
    python benchmarks/bench_routing.py --seeds 0 --budgets 0.5 --evaluations 32 --parent-steps 20 --elastic-steps 5

For each seed a byte-pair LLaMA of about a million parameters and eight layers is trained on the sources of Python's
standard library, made elastic, and trained with full, smallest and random heterogeneous sub-networks in every step.
Then its weights are frozen. At each budget of non-embedding parameters the losses (nats per token, on held-out text)
are those of
    uniform     the best network with the same sizes in all layers
    random      the median of random sub-networks that use the budget
    search      the best of an evolutionary search over the sizes of every layer, on real slices
    surrogate   what the router says that learned through a surrogate
    surrogate search   the best of a search on that surrogate, of whose last few the losses are measured
    gumbel      what the router says that learned through the model
    token       token routing at the same average cost
where "best" means on held-in batches. All are real slices of the same weights. Budgets beside those that get a row
show what the surrogate router says between them. Models, and what was measured, are kept in `--work`, so that a second
run goes on where the first stopped. The last line is JSON, also saved under docs/results/ after every part.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import machine, save, stdlib_blocks
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.conversion.search import candidate_of, fill, search
from flextron_trainer.data import collator
from flextron_trainer.demo import settings
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import FlextronForCausalLM, SubNetwork
from modeling_flextron.static_router import StaticRouter
from modeling_flextron.subnetwork import parameters_of, random_subnetwork, uniform_subnetworks

LENGTH = 128
METHODS = ("uniform", "random", "search", "surrogate", "surrogate search", "gumbel", "token")


@cache
def texts(seed: int) -> tuple:
    """Training blocks, held-in and held-out blocks, and their tokenizer."""
    rows, held_out, _, tokenizer = stdlib_blocks(LENGTH, documents=800)
    rows = rows.shuffle(seed=seed)
    return rows, rows.select(range(64)), held_out.select(range(128)), tokenizer


class Seed:
    """The models of one seed, trained or read from an earlier run, and what is measured on them."""

    def __init__(self, seed: int, options: argparse.Namespace):
        self.seed, self.options = seed, options
        self.folder = Path(options.work) / f"seed-{seed}-{options.parent_steps}-{options.elastic_steps}"
        self.rows, self.held_in, self.held_out, self.tokenizer = texts(seed)
        self.common = partial(settings, self.folder / "run", "cpu", seed=seed)
        self.parent_loss = self.train()
        self.model: Any = FlextronForCausalLM.from_pretrained(self.folder).eval()
        self.config = self.model.config
        self.cost = parameters_of(self.config, embeddings=False)
        self.inside = partial(mean_loss, self.model, batches=list(torch.tensor(self.held_in["input_ids"]).split(32)))

    def train(self) -> float:
        """Train the parent and the elastic model, unless they are there; return the loss of the parent."""
        note = self.folder / "parent.json"
        if note.is_file():
            return json.loads(note.read_text())["loss"]
        set_seed(self.seed)
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
        tokens = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
        parent = LlamaForCausalLM(LlamaConfig(**shape, **tokens, tie_word_embeddings=True, max_position_embeddings=256))
        arguments = TrainingArguments(**self.common(steps=self.options.parent_steps, learning_rate=3e-3))
        Trainer(parent, arguments, train_dataset=self.rows, data_collator=collator(self.tokenizer)).train()
        loss = evaluate_model(parent.eval(), self.held_out, 32)["loss"]
        elastic = convert(parent, self.rows.select(range(256)), heads=[1, 0.75, 0.5, 0.25], budgets=[1, 0.25])
        arguments = FlextronTrainingArguments(**self.common(steps=self.options.elastic_steps, learning_rate=2e-3))
        rows = self.rows.shuffle(seed=self.seed + 1)
        FlextronTrainer(elastic, arguments, teacher=parent, train_dataset=rows, processing_class=self.tokenizer).train()
        elastic.save_pretrained(self.folder)
        note.write_text(json.dumps({"loss": loss}))
        return loss

    def outside(self, budget: Any) -> float:
        """Held-out loss."""
        return evaluate_model(self.model, self.held_out, 32, budget)["loss"]

    def entry(self, subnetwork: SubNetwork) -> dict[str, Any]:
        """What is saved of a sub-network."""
        cost = self.cost(subnetwork) / self.config.parent_size()
        return {"loss": self.outside(subnetwork), "cost": cost, "subnetwork": subnetwork.to_dict()}

    def each_budget(self, choose: Callable[[float], SubNetwork]) -> dict[str, Any]:
        """What a way to choose gives at every budget."""
        return {str(b): self.entry(choose(b * self.config.parent_size())) for b in self.options.budgets}

    # ------------------------------------------------------------------------------------------- the methods

    def uniform(self) -> dict[str, Any]:
        def choose(limit: float) -> SubNetwork:
            fitting = [s for s in uniform_subnetworks(self.config) if self.cost(s) <= limit]
            largest = [s for s in fitting if not any(t != s and t.contains(s) for t in fitting)]
            return min(largest, key=self.inside)

        return self.each_budget(choose)

    def random(self) -> dict[str, Any]:
        result = {}
        for budget in self.options.budgets:
            generator, losses = random.Random(self.seed), []
            for _ in range(15):
                start = candidate_of(self.config, random_subnetwork(self.config, generator))
                filled = fill(self.config, start, self.cost, budget * self.config.parent_size(), generator)
                losses.append(self.outside(filled.subnetwork(self.config)))
            result[str(budget)] = {"loss": statistics.median(losses), "of": len(losses)}
        return result

    def search(self) -> dict[str, Any]:
        def choose(limit: float) -> SubNetwork:
            return search(self.config, self.inside, limit, evaluations=self.options.evaluations, seed=self.seed)[0]

        return self.each_budget(choose)

    def trained(self, method: str, steps: int, **arguments) -> FlextronTrainer:
        """A trainer that has learned routers with a method."""
        common = self.common(steps=steps, learning_rate=2e-3) | {"warmup_steps": 0}
        stage = {"stage": "router", "router_method": method, "router_budgets": self.options.budgets}
        trainer = FlextronTrainer(
            self.model,
            FlextronTrainingArguments(**common, **stage, **arguments),
            train_dataset=self.rows.shuffle(seed=self.seed + 2),
            processing_class=self.tokenizer,
        )
        trainer.train()
        self.model.eval()
        return trainer

    def surrogate(self) -> dict[str, Any]:
        trainer = self.trained("surrogate", self.options.router_steps, subnetworks_per_step=4)
        learner, router = trainer.routers.learner, StaticRouter(self.config, self.config.static_router)
        result = self.each_budget(lambda limit: router.choose(self.cost, limit))
        result["between"] = {
            str(b): self.entry(router.choose(self.cost, b * self.config.parent_size())) for b in (0.62, 0.4)
        }
        result["error"], result["asked"] = learner.error, len(learner.asked)
        self.config.save_pretrained(self.folder / "routed")

        @torch.no_grad()
        def predicted(subnetwork: SubNetwork) -> float:
            return learner.surrogate(learner.places.encode(candidate_of(self.config, subnetwork))[None]).item()

        def choose(limit: float) -> SubNetwork:
            found = [
                search(self.config, predicted, limit, evaluations=1000, parents=40, seed=seed)[0] for seed in range(8)
            ]
            return min(dict.fromkeys(found), key=self.inside)

        self.searched = self.each_budget(choose)
        return result

    def surrogate_search(self) -> dict[str, Any]:
        return self.searched

    def gumbel(self) -> dict[str, Any]:
        self.trained("gumbel", self.options.router_steps // 2, subnetworks_per_step=4)
        router = StaticRouter(self.config, self.config.static_router)
        return self.each_budget(lambda limit: router.choose(self.cost, limit))

    def token(self) -> dict[str, Any]:
        self.config.static_router = json.loads((self.folder / "routed" / "config.json").read_text())["static_router"]
        self.trained("token", 3 * self.options.router_steps // 8, subnetworks_per_step=4)
        result = {}
        for entry in self.config.token_routing["targets"]:
            loss = self.outside(f"auto:{entry['target']}")
            routing = self.model.last_routing
            result[str(entry["target"])] = {
                "loss": loss, "cost": entry["cost"], "held_out_cost": routing.cost().item(), **routing.average()
            }  # fmt: skip
        return result


def main() -> None:
    """Measure, save after every part, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.3])
    parser.add_argument("--parent-steps", type=int, default=800)
    parser.add_argument("--elastic-steps", type=int, default=400)
    parser.add_argument("--router-steps", type=int, default=400)
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--work", default="routing-work", help="Folder of the trained models.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    result: dict = {"benchmark": "routing", "machine": machine("cpu"), "options": vars(options), "seeds": {}}
    for seed in options.seeds:
        models = Seed(seed, options)
        notes = models.folder / "measured.json"
        found = json.loads(notes.read_text()) if notes.is_file() else {}
        if not found:
            found |= {"parent": models.parent_loss, "full": models.outside(models.config.built)}
        fresh = copy.deepcopy(models.config)
        for method in options.methods:
            if method in found:
                continue
            models.config.frontier = copy.deepcopy(fresh.frontier)
            models.config.static_router = models.config.token_routing = None
            start = time.perf_counter()
            found[method] = getattr(models, method.replace(" ", "_"))()
            found[method]["seconds"] = round(time.perf_counter() - start, 1)
            notes.write_text(json.dumps(found))
            result["seeds"][seed] = found
            if not options.no_save:
                save("routing_cpu", result)
        result["seeds"][seed] = found
    if not options.no_save:
        save("routing_cpu", result)

    table = Table(title=f"held-out loss, mean of {len(options.seeds)} seeds (difference to uniform: mean ± spread)")
    table.add_column("method")
    for budget in options.budgets:
        table.add_column(f"{budget:g}", justify="right")
    for method in options.methods:
        cells = []
        for budget in options.budgets:
            losses = [seed[method][str(budget)]["loss"] for seed in result["seeds"].values()]
            base = [seed["uniform"][str(budget)]["loss"] for seed in result["seeds"].values()]
            differences = [loss - own for loss, own in zip(losses, base, strict=True)]
            spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
            cells.append(f"{statistics.mean(losses):.4f} ({statistics.mean(differences):+.4f} ± {spread:.4f})")
        table.add_row(method, *cells)
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
