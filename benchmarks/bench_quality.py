"""What elastic training of small models is worth, against other ways to get models of the same shapes at the same cost.

    python benchmarks/bench_quality.py                            # LLaMA and GPT, three seeds: a day on 2 cores
    python benchmarks/bench_quality.py --families llama --seeds 0 1 --parent-steps 512 8192 --tokens 81920 --work other
    python benchmarks/bench_quality.py --table                    # what was measured so far

For each family and seed a byte-pair model of about a million parameters, the parent, is trained on the sources of
Python's standard library. At each budget of non-embedding parameters the losses (nats per token, held-out text) are
those of
    slices            uniform, in the order of importance, nothing trained
    repaired slices   sizes of each layer of its own, and corrections of at most 3 % of a row, nothing trained
    searched slices   sizes that a search on the slices found, nothing trained
    MLP slices        repaired ones with all heads
    elastic           one run that trains all rows from the repaired slices, with the library's defaults
    elastic, ...      from other slices (uniform; searched; MLP, as MatFormer), or with another recipe: see RECIPES
    routed            the model of "elastic, uniform", frozen: a router chooses sizes of each layer, its rows as large
    singles           each repaired slice trained by itself; together they cost what the elastic run cost, teacher
                      included, and all of them read as many tokens
    singles, uniform  the same of uniform slices, against "elastic, uniform"
    singles, tokens   each repaired slice trained by itself on as many tokens as the elastic run
    control           the full size alone, same tokens
    scratch           the shapes of the repaired slices, trained as the parent was, on as many tokens
Cost is that of the line itself; that of its slices (calibration, fits, search) and of its parent stand in their
lines. Learning rate and batch size of every line are the best of one grid (--rates, --batches) for the first seed, by
text from files that no table shows; that seed is in no mean, unless it is alone. Where a smaller model from scratch
beats a larger one, the parents were not trained for long enough, and the table leaves that line out. Everything is
kept in --work, and a second start goes on where the first stopped. Routers are compared in `bench_routing.py`.
"""

import argparse
import dataclasses
import itertools
import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, save, stdlib_blocks
from datasets import Dataset, DatasetDict, concatenate_datasets
from study import Plan, Study, budgets_of, check_settings, measured_in, table
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

from flextron_trainer.data import collator
from flextron_trainer.demo import settings
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.checkpoint import write_beside

LENGTH, FAMILIES = 128, ("llama", "gpt2")
REPAIRED = {"uniform": False, "corrections": 0.03}
RECIPES: dict[str, dict[str, Any]] = {  # of lines that start as "elastic" does: what differs from the defaults
    "elastic, half a weight of text": {"ce_weight": 0.5},
    "elastic, text alone": {"kd_weight": 0.0, "ce_weight": 1.0},
}
PLAN = Plan(
    length=LENGTH,
    parents=("parent",),
    starts={
        name: start | {"sequence_length": LENGTH}
        for name, start in {
            "slices": {"order": "importance"},
            "repaired slices": REPAIRED,
            "searched slices": {"search_evaluations": 192},
            "MLP slices": REPAIRED | {"heads": [1]},
        }.items()
    },
    families={
        "elastic": "repaired slices",
        "elastic, uniform": "slices",
        "elastic, searched": "searched slices",
        "elastic, MLP": "MLP slices",
    }
    | dict.fromkeys(RECIPES, "repaired slices"),
    recipes=RECIPES,
    singles={"singles": "repaired slices", "singles, uniform": "slices", "singles, tokens": "repaired slices"},
    routers={"routed": "elastic, uniform"},
    others=("scratch",),
    compared=(
        *(("elastic", rival) for rival in ("singles", "singles, tokens", "control")),
        ("elastic, uniform", "singles, uniform"),
        ("routed", "elastic, uniform"),
        *((line, "elastic") for line in ("elastic, uniform", "elastic, searched", "elastic, MLP", *RECIPES)),
    ),
)


@cache
def texts(work: Path) -> tuple[DatasetDict, Any]:
    """Blocks to train on, for the table ("held_out") and to choose by, and their tokenizer; kept in `work`."""
    folder = work / "text"
    if not folder.is_dir():
        rows, held_out, choosing, tokenizer = stdlib_blocks(LENGTH)
        with write_beside(folder) as beside:
            DatasetDict(rows=rows, held_out=held_out, choosing=choosing).save_to_disk(beside)
            tokenizer.save_pretrained(beside)
    return DatasetDict.load_from_disk(folder), AutoTokenizer.from_pretrained(folder)


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


def grid_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings that all lines share."""
    return {
        f"{rate:g}, {batch}": {"learning_rate": rate, "per_device_train_batch_size": batch}
        for rate, batch in itertools.product(options.rates, options.batches)
    }


class QualityStudy(Study):
    """Everything of one family and seed.

    Args:
        options: Of the command line.
        family: "llama" or "gpt2".
        seed: Of the parent, the order of the data, and the text that calibrates.
    """

    def __init__(self, options: argparse.Namespace, family: str, seed: int):
        super().__init__(options, PLAN, grid_of(options), options.work / family, seed)
        blocks, self.tokenizer = texts(options.work)
        few, half = range(options.test_blocks), range(options.test_blocks // 2)
        self.text, self.tests = blocks["rows"], {"held out": blocks["held_out"].select(few)}
        self.selection = blocks["choosing"].select(half)
        self.family_name, self.steps = family, options.parent_steps[family != "llama"]

    @cached_property
    def parent(self) -> PreTrainedModel:
        """The parent, a folder of transformers; trained first if it is not there."""
        folder = self.folder / "parent"
        if not (folder / "config.json").is_file():
            set_seed(self.seed)
            model = untrained(self.family_name, self.tokenizer)
            self.keep("parent, training", self.pretrain("parent", model))
            self.tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    @property
    def calibration(self) -> Dataset:
        return self.text.shuffle(seed=self.seed).select(range(self.options.calibration_blocks))

    def train_rows(self, count: int) -> Dataset:
        rows = self.text.shuffle(seed=self.seed + 1)
        return concatenate_datasets([rows] * -(-count // len(rows))).select(range(count))

    def pretrain(self, key: str, model: Any) -> dict[str, float]:
        """Train a model on text alone with the parent's recipe; what that costs."""
        folder = self.folder / "runs" / key.replace(" ", "-")
        saved = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1, "disable_tqdm": True}
        arguments = TrainingArguments(**settings(folder, "cpu", self.steps, self.seed, 3e-3) | saved)
        rows = self.text.shuffle(seed=self.seed)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator(self.tokenizer))
        return {"cpu_seconds": self.timed(trainer), "tokens": 16 * LENGTH * self.steps}

    def of_parent(self, line: str) -> dict[str, Any]:
        losses, cost = super().of_parent(line), self.measured["parent, training"]
        return losses | cost | {"flops": cost["tokens"] * self.per_token("slices", ["1"], taught=False)}

    def measure(self, line: str) -> None:
        if line != "scratch":
            return super().measure(line)
        for name in self.rows("repaired slices"):
            self.keep_new(f"{line} {name}", lambda n=name: self.scratch(n))

    def scratch(self, name: str) -> dict[str, Any]:
        """A row's shape, trained as the parent was."""
        config = self.row("repaired slices", name).config
        set_seed(self.seed)
        model = FlextronForCausalLM(config)
        cost = self.pretrain(f"scratch {name}", model)
        flops = cost["tokens"] * self.per_token("repaired slices", [name], taught=False)
        return {name: self.losses(model), "flops": flops} | cost


def converged(result: dict[str, Any]) -> bool:
    """No model from scratch is better than one of a larger size, in the mean of the seeds that have all of them."""
    names = {budget: f"scratch {budget}" for budget in budgets_of(result)} | {"1": "parent"}
    seeds = [seed for seed in result["seeds"].values() if all(name in seed for name in names.values())]
    sums = [sum(seed[name][budget]["held out"] for seed in seeds) for budget, name in names.items()]
    return sums == sorted(sums)


def tables(result: dict[str, Any]) -> str:
    """A table for each family, as Markdown."""
    parts = []
    for family, found in result["families"].items():
        first = str(result["options"]["seeds"][0])
        counted = [seed for seed in found["seeds"] if seed != first] or list(found["seeds"])
        whole = found | {"options": result["options"], "texts": ["held out"], "counted": counted}
        plan = PLAN if converged(whole) else dataclasses.replace(PLAN, others=())
        parts.append(f"{family}\n\n{table(whole, plan)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="the first one chooses")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--parent-steps", type=int, nargs=2, default=[2048, 8192], metavar=("LLAMA", "GPT"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[327680], help="of the elastic runs")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help=f"rows of {LENGTH} tokens in a step")
    parser.add_argument("--calibration-blocks", type=int, default=256, help=f"of {LENGTH} tokens")
    parser.add_argument("--test-blocks", type=int, default=256, help="for the table, and half as many to choose by")
    parser.add_argument("--lines", nargs="*", choices=PLAN.lines, default=PLAN.lines)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="folder of models and figures")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if options.table:
        file = RESULTS / "quality_cpu.json"
        if not file.is_file():
            parser.error("Nothing was measured yet.")
        print(tables(json.loads(file.read_text())))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = "cpu"
    same = {key: getattr(options, key) for key in ("budgets", "parent_steps", "calibration_blocks", "test_blocks")}
    check_settings(parser, options.work, same | {"length": LENGTH, "seed that chooses": options.seeds[0]})
    result: dict[str, Any] = {"benchmark": "quality", "machine": machine("cpu")}
    result["options"] = same | {"tokens": options.tokens, "grid": list(grid_of(options))}

    def note() -> None:
        families = {family: {"seeds": measured_in(options.work / family)} for family in FAMILIES}
        result["families"] = {family: found for family, found in families.items() if found["seeds"]}
        others = sorted({int(seed) for found in families.values() for seed in found["seeds"]})
        result["options"]["seeds"] = list(dict.fromkeys([*options.seeds, *others]))
        if not options.no_save:
            save("quality_cpu", result)

    for family, line, seed in itertools.product(options.families, options.lines, options.seeds):
        QualityStudy(options, family, seed).measure(line)
        note()
    note()
    print(tables(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
