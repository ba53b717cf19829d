"""What elastic training is worth: the loss at every size, against every other way to get a model of that size.

    python benchmarks/bench_quality.py                              # LLaMA and GPT, three seeds: many hours on 2 cores
    python benchmarks/bench_quality.py --families llama --seeds 0 --parent-steps 60 --methods slice elastic
    python benchmarks/bench_quality.py --methods                    # the tables of what was measured so far

For each family and seed a byte-pair model of about a million parameters is trained on the sources of Python's
standard library. Everything else starts from that parent and reads at most 7.63 % of its training tokens, unless its
name says otherwise. At each budget of non-embedding parameters the losses (nats per token, held-out text) are those of
    slice           the importance-ranked slice, not trained
    elastic         ours: one run that trains all sizes
    searched        elastic training of rows that a search on the untrained slices found: sizes of each layer of its own
    routed          elastic training of random sizes, then a router that picks them (its tokens come on top)
    token routed    then every token picks its own
    mlp only        elastic training of MLP widths alone (MatFormer)
    random order    elastic training without importance
    cross entropy   elastic training on the text alone, without a teacher
    single, shared  each size pruned and distilled on its own, the tokens of the elastic run divided among the sizes
    single, each    each size pruned and distilled on its own, each with all the tokens of the elastic run
    searched single, ...  the same from the searched rows
    scratch, compute  trained from scratch with the compute of the whole elastic run, teacher included
    scratch, tokens   trained from scratch with the tokens of the parent
and, where `--peers` has their environments (benchmarks/peers/install.sh), minitron, torch_pruning and fastnas: pruned
by that program and, as "..., distilled", trained like "single, shared"; and autonas, which trains a family of its own.
`recipes` compares settings of the elastic run on other held-out text, from which its defaults were chosen.
All are real networks of that size. Models and measurements are kept in `--work`, so that a second run goes on where the
first stopped; several may run side by side for other seeds. The last line is JSON, also saved under docs/results/.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from common import machine, save, stdlib_blocks, write_json
from datasets import DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import collator
from flextron_trainer.demo import settings
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.checkpoint import write_beside

LENGTH = 128
SHARE = 0.0763  # of the parent's tokens: Flextron, abstract
METHODS = (
    "recipes", "slice", "elastic", "searched", "single, shared", "single, each", "searched single, shared",
    "searched single, each", "random order", "cross entropy", "mlp only", "routed", "token routed", "minitron",
    "torch_pruning", "fastnas", "autonas", "scratch, compute", "scratch, tokens",
)  # fmt: skip
PEERS = {"minitron": "minitron", "torch_pruning": "torch_pruning", "fastnas": "modelopt", "autonas": "modelopt"}
RECIPE = {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "subnetworks_per_step": 4, "ce_weight": 0.5}
RECIPES = {
    "without text": {"ce_weight": 0.0},
    "without text, learning rate 0.001": {"ce_weight": 0.0, "learning_rate": 1e-3},
    "without text, teacher self": {"ce_weight": 0.0, "teacher": "self"},
    "without text, batches of 4": {"ce_weight": 0.0, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    "without text, more of the full network": {
        "ce_weight": 0.0, "sampler": "weighted", "sampling_weights": [3.0, 1.0, 1.0, 1.0]
    },
    "learning rate 0.001": {"learning_rate": 1e-3},
    "more text": {"ce_weight": 2.0},
}  # fmt: skip
FASTER = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "ce_weight": 0.25}
SEARCHED_RECIPES = {
    "learning rate 0.004": {"learning_rate": 4e-3},
    "batches of 4": {"per_device_train_batch_size": 4},
    "faster": FASTER,
    "faster, epsilon 1e-4": FASTER | {"adam_epsilon": 1e-4},
    "faster, epsilon 1e-3": FASTER | {"adam_epsilon": 1e-3},
    "faster, learning rate 0.008, epsilon 1e-3": FASTER | {"learning_rate": 8e-3, "adam_epsilon": 1e-3},
    "faster, learning rate 0.004, epsilon 3e-4, text 0.5": FASTER
    | {"learning_rate": 4e-3, "adam_epsilon": 3e-4, "ce_weight": 0.5},
    "faster, epsilon 1e-4, text 1": FASTER | {"adam_epsilon": 1e-4, "ce_weight": 1.0},
}


@cache
def texts(work: str) -> tuple:
    """Training blocks, held-out blocks for the tables and others for choices, and their tokenizer; kept in `work`."""
    folder = Path(work) / "text"
    if not folder.is_dir():
        rows, held_out, tokenizer = stdlib_blocks(LENGTH)
        with write_beside(folder) as beside:
            DatasetDict(rows=rows, held_out=held_out.select(range(352))).save_to_disk(beside)
            tokenizer.save_pretrained(beside)
    blocks = DatasetDict.load_from_disk(folder)
    held_out = blocks["held_out"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return blocks["rows"], held_out.select(range(256)), held_out.select(range(256, 352)), tokenizer


def untrained(family: str, tokenizer: Any) -> PreTrainedModel:
    """A parent of about a million parameters."""
    common = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "llama":
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**shape, **common, max_position_embeddings=LENGTH))
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=8, n_head=4, n_positions=LENGTH, **dropout, **common))


class Study:
    """The models of one family and seed, trained or read from an earlier run, and what is measured on them."""

    def __init__(self, family: str, seed: int, options: argparse.Namespace):
        self.family, self.seed, self.options = family, seed, options
        self.folder = Path(options.work) / f"{family}-{options.parent_steps}-{seed}"
        self.rows, self.held_out, self.choosing, self.tokenizer = texts(options.work)
        self.parent_tokens = 16 * LENGTH * options.parent_steps
        self.tokens = int(SHARE * self.parent_tokens)
        self.parent = self.train_parent()

    def loss(self, model: Any, budget: Any = None) -> float:
        """Held-out loss."""
        return evaluate_model(model.eval(), self.held_out, 32, budget)["loss"]

    def common(self, tokens: int, rows: int, learning_rate: float) -> dict[str, Any]:
        """Training arguments for so many tokens in batches of so many rows."""
        steps = max(1, tokens // (rows * LENGTH))
        return settings(self.folder / "run", "cpu", steps, self.seed, learning_rate) | {
            "per_device_train_batch_size": rows, "disable_tqdm": True,
        }  # fmt: skip

    def train_parent(self) -> Any:
        """Train the parent, or read it."""
        note = self.folder / "parent.json"
        if not note.is_file():
            set_seed(self.seed)
            model = untrained(self.family, self.tokenizer)
            arguments = TrainingArguments(**self.common(self.parent_tokens, 16, 3e-3) | {"logging_steps": 50})
            rows = self.rows.shuffle(seed=self.seed)
            trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator(self.tokenizer))
            trainer.train()
            model.save_pretrained(self.folder / "parent")
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            write_json(note, {"loss": self.loss(model), "training_losses": losses})
        return AutoModelForCausalLM.from_pretrained(self.folder / "parent").eval()

    def convert(self, **arguments) -> FlextronForCausalLM:
        """The elastic model, not trained."""
        budgets = [1, *self.options.budgets]
        default = {"heads": [1, 0.75, 0.5, 0.25], "hidden": [1], "budgets": budgets, "sequence_length": LENGTH}
        return convert(self.parent, self.rows.select(range(256)), **default | arguments, seed=self.seed)

    def train(self, model: Any, tokens: int | None = None, *, teacher: Any = "parent", **arguments) -> Any:
        """Elastic training with our recipe; returns the model."""
        recipe = RECIPE | arguments
        common = self.common(
            tokens or self.tokens, recipe.pop("per_device_train_batch_size"), recipe.pop("learning_rate")
        )
        FlextronTrainer(
            model,
            FlextronTrainingArguments(**common | recipe),
            teacher=self.parent if teacher == "parent" else teacher,
            train_dataset=self.rows.shuffle(seed=self.seed + 1),
            processing_class=self.tokenizer,
        ).train()
        return model.eval()

    def alone(self, model: Any, tokens: int, **arguments) -> Any:
        """Train a model at its full size only."""
        weights = [1.0] + [0.0] * (sum(row["subnetwork"] is not None for row in model.config.frontier) - 1)
        one = {"sampler": "weighted", "sampling_weights": weights, "subnetworks_per_step": 1}
        return self.train(model, tokens, **one | arguments)

    def family_losses(self, model: Any) -> dict[str, float]:
        """The loss of every row that costs at most its budget."""
        fitting = [row for row in model.config.frontier if row["name"] in self.names]
        return {row["name"]: self.loss(model, row["subnetwork"]) for row in fitting}

    @property
    def names(self) -> list[str]:
        return [str(b) for b in (1, *self.options.budgets)]

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A trained model from its folder, made first if it is not there."""
        folder = self.folder / name
        if not (folder / "config.json").is_file():
            make().save_pretrained(folder)
        return FlextronForCausalLM.from_pretrained(folder).eval()

    def sliced(self, search: bool = False) -> FlextronForCausalLM:
        """The elastic model, not trained, with uniform rows or with searched ones."""
        name = "sliced-searched" if search else "sliced"
        return self.kept(name, lambda: self.convert(search_evaluations=192 if search else 0))

    def pruned(self, name: str, search: bool = False) -> Any:
        """The untrained slice of a row as a model of its own."""
        family = self.sliced(search)
        row = next(row for row in family.frontier if row["name"] == name)
        return FlextronForCausalLM.from_pretrained(family.name_or_path, flextron_budget=row["subnetwork"])

    # ------------------------------------------------------------------------------------------- the methods

    def recipes(self) -> dict[str, Any]:
        def losses(model: Any) -> dict[str, float]:
            rows = model.eval().frontier
            return {row["name"]: evaluate_model(model, self.choosing, 32, row["subnetwork"])["loss"] for row in rows}

        result = {"parent": {"1": evaluate_model(self.parent, self.choosing, 32)["loss"]}}
        result["uniform, recipe"] = losses(self.trained())
        result["searched, recipe"] = losses(self.trained(search=True))
        skipping = self.convert(search_evaluations=192, depth=[1, 0.875, 0.75, 0.625, 0.5])
        result["searched, layers may be skipped"] = losses(self.train(skipping))
        for search, recipes in ((False, RECIPES), (True, SEARCHED_RECIPES)):
            for name, changed in recipes.items():
                trained = self.train(self.sliced(search), **changed)
                result[f"{'searched' if search else 'uniform'}, {name}"] = losses(trained)
                print(name, result, flush=True)
        return result

    def slice(self) -> dict[str, Any]:
        model = self.sliced()
        costs = {row["name"]: row["non_embedding_parameters"] for row in model.config.frontier}
        return self.family_losses(model) | {"non_embedding_parameters": costs}

    def trained(self, search: bool = False) -> FlextronForCausalLM:
        """The elastic model, trained."""
        return self.kept("searched" if search else "elastic", lambda: self.train(self.sliced(search)))

    def elastic(self) -> dict[str, Any]:
        return self.family_losses(self.trained())

    def searched(self) -> dict[str, Any]:
        model = self.trained(search=True)
        return self.family_losses(model) | {"rows": [row.to_dict() for row in model.config.frontier]}

    def mlp_only(self) -> dict[str, Any]:
        # A budget that widths alone cannot reach gets a row of another name, and no cell in the table.
        return self.family_losses(self.train(self.convert(heads=[1])))

    def random_order(self) -> dict[str, Any]:
        return self.family_losses(self.train(self.convert(order="random")))

    def cross_entropy(self) -> dict[str, Any]:
        return self.family_losses(self.train(self.convert(), teacher=None, ce_weight=1.0))

    def single(self, tokens: int, search: bool = False) -> dict[str, Any]:
        return {name: self.loss(self.alone(self.pruned(name, search), tokens)) for name in self.names[1:]}

    def single_shared(self) -> dict[str, Any]:
        return self.single(self.tokens // len(self.options.budgets))

    def single_each(self) -> dict[str, Any]:
        return self.single(self.tokens)

    def searched_single_shared(self) -> dict[str, Any]:
        return self.single(self.tokens // len(self.options.budgets), search=True)

    def searched_single_each(self) -> dict[str, Any]:
        return self.single(self.tokens, search=True)

    def scratch(self, tokens: Callable[[float], float]) -> dict[str, Any]:
        result = {}
        for name, budget in zip(self.names[1:], self.options.budgets, strict=True):
            set_seed(self.seed)
            model, text = FlextronForCausalLM(self.pruned(name).config), int(tokens(budget))
            change = {"learning_rate": 3e-3, "per_device_train_batch_size": 16}
            result[name] = self.loss(self.alone(model, text, teacher=None, **change))
        return result

    def scratch_tokens(self) -> dict[str, Any]:
        return self.scratch(lambda budget: self.parent_tokens)

    def scratch_compute(self) -> dict[str, Any]:
        # A forward pass of the teacher is a third of a training step.
        compute = self.tokens * (1 + sum(self.options.budgets) + 1 / 3)
        return self.scratch(lambda budget: compute / budget)

    def mixed(self) -> FlextronForCausalLM:
        """The elastic model that was trained with random sizes in its layers."""
        return self.train(self.convert(budgets=[1, self.options.budgets[-1]]))

    def route(self, model: Any, method: str, steps: int) -> FlextronForCausalLM:
        """Learn routers with frozen weights."""
        common = self.common(steps * 16 * LENGTH, 16, 2e-3) | {"warmup_steps": 0}
        stage = {"stage": "router", "router_method": method, "router_budgets": list(self.options.budgets)}
        FlextronTrainer(
            model,
            FlextronTrainingArguments(**common, **stage, subnetworks_per_step=4),
            train_dataset=self.rows.shuffle(seed=self.seed + 2),
            processing_class=self.tokenizer,
        ).train()
        return model.eval()

    def routed(self) -> dict[str, Any]:
        mixed = partial(self.kept, "mixed", self.mixed)
        model = self.kept("routed", lambda: self.route(mixed(), "surrogate", self.options.router_steps))
        names = {f"routed-{b}": str(b) for b in self.options.budgets}
        found = {row["name"]: row["subnetwork"] for row in model.config.frontier}
        losses = {short: self.loss(model, found[name]) for name, short in names.items()}
        return {"1": self.loss(model), **losses}

    def token_routed(self) -> dict[str, Any]:
        self.routed()
        routed = partial(FlextronForCausalLM.from_pretrained, self.folder / "routed")
        model = self.kept("tokens", lambda: self.route(routed(), "token", self.options.router_steps // 2))
        result, cost = {}, {}
        for budget in self.options.budgets:
            result[str(budget)] = self.loss(model, f"auto:{budget}")
            cost[str(budget)] = model.last_routing.cost().item()
        return result | {"held_out_cost": cost}

    def peer(self, name: str) -> dict[str, Any]:
        """What another program made of the parent, as it is and distilled."""
        result: dict[str, Any] = {"said": self.peer_says(name)}
        for entry in result["said"]:
            budget = str(entry["ratio_asked"])
            if entry["ratio"] > float(budget):  # it cannot be made that small
                continue
            model = AutoModelForCausalLM.from_pretrained(self.folder / name / budget)
            result[budget] = self.loss(model)
            if name != "autonas":
                same = {"mlp": [1], "heads": [1], "hidden": [1], "depth": [1], "budgets": [1]}
                whole = convert(model, self.rows.select(range(8)), **same, sequence_length=LENGTH)
                trained = self.alone(whole, self.tokens // len(self.options.budgets))
                result.setdefault("distilled", {})[budget] = self.loss(trained)
        return result

    def peer_says(self, name: str) -> list[dict[str, Any]]:
        """Prune with another program in its own environment, unless it was; what it says of each ratio."""
        out = self.folder / name
        note, calibration = out / "said.json", self.folder / "calibration.npy"
        if note.is_file():
            return json.loads(note.read_text())
        numpy.save(calibration, numpy.array(self.rows.select(range(256))["input_ids"]))
        python = Path(self.options.peers) / PEERS[name] / "bin" / "python"
        script = Path(__file__).parent / "peers" / f"{name}.py"
        command = [python, script, self.folder / "parent", out, "--calibration", calibration, "--seed", self.seed]
        command += ["--ratio", *self.options.budgets]
        if name == "autonas":
            train, rows = self.folder / "train.npy", RECIPE["per_device_train_batch_size"]
            numpy.save(train, numpy.array(self.rows.shuffle(seed=self.seed + 1).select(range(4096))["input_ids"]))
            command += ["--train", train, "--steps", int(self.tokens // (rows * LENGTH)), "--batch-size", rows]
            command += ["--learning-rate", RECIPE["learning_rate"]]
        done = subprocess.run([str(part) for part in command], text=True, stdout=subprocess.PIPE, check=True)
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        write_json(note, said)
        return said

    def measure(self, method: str) -> dict[str, Any]:
        """Run a method by its name in the table."""
        if method in PEERS:
            return self.peer(method)
        return getattr(self, method.replace(",", "").replace(" ", "_"))()


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs measured so far, per family and seed."""
    found: dict[str, Any] = {}
    for note in sorted(Path(options.work).glob(f"*-{options.parent_steps}-*/measured.json")):
        family, _, seed = note.parent.name.split("-")
        parent = json.loads((note.parent / "parent.json").read_text())
        found.setdefault(family, {})[seed] = {"parent": parent, **json.loads(note.read_text())}
    return found


def lines(seeds: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """For every line of the table and every budget, the losses of all seeds."""
    found: dict[str, dict[str, list[float]]] = {"parent": {"1": [s["parent"]["loss"] for s in seeds.values()]}}
    for method in METHODS[1:]:
        for measured in (s[method] for s in seeds.values() if method in s):
            for name, losses in ((method, measured), (f"{method}, distilled", measured.get("distilled", {}))):
                for budget, loss in losses.items():
                    if isinstance(loss, float):
                        found.setdefault(name, {}).setdefault(budget, []).append(loss)
    return found


def goals(seeds: dict[str, Any], budgets: list[str], ours: str, single: str) -> dict[str, Any]:
    """Per budget, how `ours` stands to other ways: means over the seeds that have them."""

    def mean(method: str, budget: str, of: dict[str, Any]) -> float:
        return statistics.mean(s[method][budget] for s in of.values())

    result: dict[str, Any] = {}
    whole = {n: s for n, s in seeds.items() if all(m in s for m in (ours, f"{single}, shared", f"{single}, each"))}
    if not whole:
        return result
    parent = statistics.mean(s["parent"]["loss"] for s in whole.values())
    result["full against parent, percent"] = round(100 * (mean(ours, "1", whole) / parent - 1), 3)
    for b in budgets:
        loss, start = mean(ours, b, whole), mean("slice", b, whole)
        shared, each = mean(f"{single}, shared", b, whole), mean(f"{single}, each", b, whole)
        entry = {
            f"{ours} - {single}, shared": round(loss - shared, 4),
            f"percent closed from slice to {single}, each": round(100 * (start - loss) / (start - each), 1),
            f"percent closed from {single}, shared to each": round(100 * (shared - loss) / (shared - each), 1),
        }
        for name in ("scratch, tokens", "scratch, compute"):
            if both := {n: s for n, s in whole.items() if name in s}:
                entry[f"{ours} - {name}"] = round(mean(ours, b, both) - mean(name, b, both), 4)
        result[b] = entry
    return result


def reached(seeds: dict[str, Any], budgets: list[str]) -> dict[str, Any]:
    """The goals, for uniform and for searched rows, each against singles of the same shapes."""
    pairs = {"elastic": "single", "searched": "searched single"}
    return {ours: goals(seeds, budgets, ours, single) for ours, single in pairs.items()}


def show(console: Console, result: dict[str, Any]) -> None:
    """A table for each family."""
    budgets = [str(b) for b in result["options"]["budgets"]]
    for family, seeds in result["families"].items():
        table = Table("", "seeds", "1", *budgets, title=f"{family}: loss, mean and spread of the seeds")
        for name, losses in lines(seeds).items():
            cells = []
            for b in ("1", *budgets):
                values = losses.get(b, [])
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
            table.add_row(name, str(max(map(len, losses.values()))), *cells)
        console.print(table)
        console.print(reached(seeds, budgets))


def main() -> None:
    """Measure, save after every part, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llama", "gpt2"], choices=["llama", "gpt2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--parent-steps", type=int, default=2048, help="Of 2,048 tokens each.")
    parser.add_argument("--router-steps", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=METHODS[1:], metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--peers", help="Folder of the peers' environments; without it they are left out.")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--work", default="quality-work", help="Folder of the trained models.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    methods = [m for m in options.methods if options.peers or m not in PEERS]
    for family in options.families:
        for seed in options.seeds:
            measure(family, seed, methods, options)
    chosen = {name: getattr(options, name) for name in ("budgets", "parent_steps", "router_steps")}
    result: dict[str, Any] = {"benchmark": "quality", "machine": machine("cpu"), "options": chosen, "recipe": RECIPE}
    result["families"] = collected(options)
    result["goals"] = {
        family: reached(seeds, [str(b) for b in options.budgets]) for family, seeds in result["families"].items()
    }
    show(Console(), result)
    if not options.no_save:
        save("quality_cpu", result)
    print(json.dumps(result))


def measure(family: str, seed: int, methods: list[str], options: argparse.Namespace) -> None:
    """Measure what was not measured before, and write it down after every method."""
    note = Path(options.work) / f"{family}-{options.parent_steps}-{seed}" / "measured.json"
    measured = json.loads(note.read_text()) if note.is_file() else {}
    missing = [method for method in methods if method not in measured]
    study = Study(family, seed, options) if missing else None
    for method in missing:
        start = time.time()
        measured[method] = study.measure(method)
        write_json(note, measured)
        print(f"{family} {seed} {method}: {measured[method]} ({time.time() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
