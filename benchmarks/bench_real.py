"""What one elastic run makes of a real model, against separate models of the same shapes that cost the same.

    python benchmarks/bench_real.py PARENT --train prose.txt --test other_prose.txt code.txt     # hours on 2 cores
    python benchmarks/bench_real.py PARENT ... --tokens 40960 163840 --seeds 0 1 2
    python benchmarks/bench_real.py --table                              # what was measured so far; draws it, too

PARENT is a folder or a Hub id. Three of four training rows are blocks of the text, one is a chat: the parent's own
answer to a prompt made from the text, where only the answer counts; a parent without a chat template has no chats. At
each budget of non-embedding parameters the losses (nats per token, held-out text; answers alone of held-out chats) are
those of
    parent            as it is
    int8, int4        the parent, its weights quantized, nothing trained
    slices            by activation order, uniform, nothing trained
    repaired slices   sizes of each layer of its own, and corrections of at most 3 % of a row, nothing trained
    depth             layers dropped, nothing trained
    elastic           one run that trains all rows from the repaired slices, with the library's defaults
    elastic, plain    the same without corrections
    elastic, ...      the same with another recipe: see RECIPES
    singles           each repaired slice trained by itself; together they cost what the elastic run cost, teacher
                      included, and all of them read as many tokens
    singles, tokens   each repaired slice trained by itself on as many tokens as the elastic run
    depth, singles    the models with fewer layers, trained by themselves at the cost of the elastic run
    control           the full size alone, same recipe and tokens
Compute is that of matrix products: three forward passes for a trained network and one for the teacher. The learning
rate of every line is the best of --rates with the fewest tokens, by a part of the training text that no table shows.
Every figure is kept in --work as soon as it is there; a second start goes on where the first stopped, within a run from
its last checkpoint.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_quantized import formats
from common import RESULTS, machine, run_settings, save, text_blocks, write_json
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.answers import write_answers
from flextron_trainer.conversations import documents_of
from flextron_trainer.data import collator, load_tokenizer
from flextron_trainer.evaluation.quality import evaluate_model
from flextron_trainer.losses import IGNORED
from modeling_flextron import FlextronConfig, FlextronForCausalLM, flops_per_token
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import count_parameters

LENGTH, BATCH = 256, 4
SELECTION = "selection"  # the text that chooses, and is in no table
STARTS: dict[str, dict[str, Any]] = {  # and for "depth" the numbers of layers
    "slices": {"order": "importance"},
    "repaired slices": {"uniform": False, "corrections": 0.03},
    "sizes by layer": {"uniform": False},
    "depth": {"mlp": [1], "heads": [1], "order": "importance"},
}
FAMILIES = {"elastic": "repaired slices", "elastic, plain": "sizes by layer"}
RECIPES: dict[str, dict[str, Any]] = {  # of lines that start as "elastic" does: what differs from the defaults
    "elastic, cross entropy": {"ce_weight": 0.5},
    "elastic, large epsilon": {"adam_epsilon": 1e-5},
    "elastic, full more often": {"sampler": "weighted", "sampling_weights": [3, 1, 1, 1], "subnetworks_per_step": 4},
}
FAMILIES |= dict.fromkeys(RECIPES, "repaired slices")
SINGLES = {"singles": "repaired slices", "singles, tokens": "repaired slices", "depth, singles": "depth"}
PARENTS = ("parent", "int8", "int4")
LINES = (*PARENTS, *[name for name in STARTS if name != "sizes by layer"], *FAMILIES, *SINGLES, "control")
PROMPTS = (
    "Summarize the following text in two sentences.\n\n{}",
    "Explain to a beginner what this is about.\n\n{}",
    "Which question does this text answer?\n\n{}",
    "Rewrite this in simpler words.\n\n{}",
)


class Data:
    """Rows to train on and rows to measure on, made once and kept.

    Args:
        options: Of the command line.
        parent: Answers the prompts.
        tokenizer: With a chat template.
    """

    def __init__(self, options: argparse.Namespace, parent: Any, tokenizer: Any):
        self.options, self.parent, self.tokenizer = options, parent, tokenizer
        text = torch.cat([text_blocks(path, tokenizer, LENGTH) for path in options.train])
        few = options.test_blocks
        self.text = text[few:]
        self.tests = {path.stem: _rows(text_blocks(path, tokenizer, LENGTH)[:few]) for path in options.test}
        self.talks = getattr(tokenizer, "chat_template", None) is not None
        if self.talks:
            self.tests["chats"] = self.chats("test", options.test[0], few)
        self.selection = _rows(text[:few])

    def train_rows(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Of four rows three of text and one chat, in an order of the seed; what ends begins anew."""
        chooser = torch.Generator().manual_seed(seed)
        text = _rows(self.text[torch.randperm(len(self.text), generator=chooser)])
        if not self.talks:
            return [text[i % len(text)] for i in range(count)]
        chats = self.chats("train", self.options.train[0], self.options.chats)
        turn = torch.randperm(len(chats), generator=chooser).tolist()
        return [
            chats[turn[i // 4 % len(chats)]] if i % 4 == 3 else text[(i - i // 4) % len(text)] for i in range(count)
        ]

    def chats(self, name: str, source: Path, count: int) -> list[dict[str, Any]]:
        """The parent's answers to prompts made from the paragraphs of a text, as rows; kept in a file."""
        file = self.options.work / f"chats-{name}.jsonl"
        paragraphs = [part for part in source.read_text(errors="ignore").split("\n") if 200 < len(part) < 600]
        step = max(1, len(paragraphs) // count)
        prompts = [
            {"prompt": PROMPTS[i % len(PROMPTS)].format(text)} for i, text in enumerate(paragraphs[::step][:count])
        ]
        write_answers(self.parent, self.tokenizer, prompts, file, batch_size=16, max_new_tokens=96)
        rows = map(json.loads, file.read_text().splitlines())
        documents = [documents_of(self.tokenizer, row, f"{file} row {i}")[0] for i, row in enumerate(rows, start=1)]
        return [
            {"input_ids": ids, "labels": [id if one else IGNORED for id, one in zip(ids, learned, strict=True)]}
            for ids, learned in documents
        ]


def _rows(blocks: torch.Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": block.tolist()} for block in blocks]


class Study:
    """Everything of one parent and one seed (order of the data, and which text calibrates).

    Args:
        options: Of the command line.
        seed: Of it.
    """

    def __init__(self, options: argparse.Namespace, seed: int):
        self.options, self.seed, self.folder = options, seed, options.work / str(seed)
        self.note = self.folder / "measured.json"
        self.measured: dict[str, Any] = json.loads(self.note.read_text()) if self.note.is_file() else {}
        self.names = [f"{budget:g}" for budget in options.budgets]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.options.parent)

    @cached_property
    def parent(self) -> Any:
        return (
            AutoModelForCausalLM.from_pretrained(self.options.parent, dtype=torch.float32)
            .eval()
            .to(self.options.device)
        )

    @cached_property
    def data(self) -> Data:
        return Data(self.options, self.parent, self.tokenizer)

    def keep(self, key: str, value: Any) -> None:
        """Write a figure down."""
        self.measured[key] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.note, self.measured)
        print(f"{self.seed} {key}: {json.dumps(value)}", flush=True)

    # ----------------------------------------------------------------------------------------- models to begin with

    def start(self, name: str) -> Path:
        """The converted parent in a folder; made first if it is not there."""
        folder = self.folder / name.replace(" ", "-")
        if not (folder / "config.json").is_file():
            begin = time.process_time()
            blocks = self.data.text[self.seed * self.options.calibration_blocks :][: self.options.calibration_blocks]
            layers = self.parent.config.num_hidden_layers
            depth = {"depth": [layers - i for i in range(layers * 5 // 6)]} if name == "depth" else {}
            budgets = [1, *self.options.budgets]
            converted = convert(self.parent, blocks, budgets=budgets, seed=self.seed, **STARTS[name], **depth)
            converted.save_pretrained(folder)
            self.keep(f"{name}, conversion", {"cpu_seconds": time.process_time() - begin})
        return folder

    def rows(self, name: str) -> dict[str, Any]:
        """Name -> sub-network of the rows of a start that have a budget of ours."""
        found = held(FlextronConfig.from_pretrained(self.start(name)).frontier)
        return {budget: found[budget] for budget in self.names if budget in found}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Start -> row -> bytes of its stock checkpoint in bfloat16, for what was converted."""
        found = {}
        for name in STARTS:
            if (self.folder / name.replace(" ", "-") / "config.json").is_file():
                config = FlextronConfig.from_pretrained(self.start(name))
                rows = held(config.frontier)
                found[name] = {
                    row: 2 * count_parameters(config, rows[row]) for row in ("1", *self.names) if row in rows
                }
        return found

    # ----------------------------------------------------------------------------------------- costs and losses

    def losses(self, model: Any, budget: Any = None) -> dict[str, float]:
        """Text -> loss."""
        texts = self.data.tests | {SELECTION: self.data.selection}
        model.to(self.options.device)
        return {name: evaluate_model(model, rows, 4, budget)["loss"] for name, rows in texts.items()}

    def family_losses(self, model: FlextronForCausalLM) -> dict[str, Any]:
        rows = held(model.config.frontier)
        return {name: self.losses(model, rows[name]) for name in ("1", *self.names) if name in rows}

    def per_token(self, start: str, trained: list[str]) -> float:
        """Floating-point operations of a training token that goes through the teacher and the rows `trained`."""
        config = FlextronConfig.from_pretrained(self.start(start))
        rows = held(config.frontier)
        teacher = flops_per_token(config, rows["1"], LENGTH // 2)
        return teacher + 3 * sum(flops_per_token(config, rows[name], LENGTH // 2) for name in trained)

    # ----------------------------------------------------------------------------------------- training

    def train(self, key: str, model: Any, tokens: int, rate: float, **arguments: Any) -> float:
        """Train a model in place, from the last checkpoint of an earlier start if there is one; CPU seconds."""
        steps, folder = max(1, tokens // (BATCH * LENGTH)), self.folder / "runs" / key.replace(" ", "-")
        on_cpu = self.options.device == "cpu"
        saved = {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 1, "logging_steps": 20}
        common = run_settings(str(folder), steps, rate, BATCH, self.seed) | {"use_cpu": on_cpu, "bf16": not on_cpu}
        settings = FlextronTrainingArguments(**common | saved | arguments)
        data = self.data.train_rows(self.seed, steps * BATCH)
        trainer = FlextronTrainer(
            model, settings, teacher=self.parent, train_dataset=data, processing_class=self.tokenizer,
            data_collator=collator(self.tokenizer),
        )  # fmt: skip
        begin = time.process_time()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
        return time.process_time() - begin

    def family(self, line: str, tokens: int, rate: float) -> dict[str, Any]:
        """One elastic run."""
        start = FAMILIES[line]
        names = ["1", *self.rows(start)]
        model = FlextronForCausalLM.from_pretrained(self.start(start))
        recipe = {"subnetworks_per_step": len(names)} | RECIPES.get(line, {})
        seconds = self.train(f"{line} {tokens} {rate:g}", model, tokens, rate, **recipe)
        model.save_pretrained(self.folder / f"{line} {tokens} {rate:g}".replace(" ", "-"))
        cost = {"flops": tokens * self.per_token(start, names), "cpu_seconds": seconds}
        return self.family_losses(model) | cost

    def single(self, line: str, name: str, tokens: int, rate: float) -> dict[str, Any]:
        """One row by itself."""
        start = SINGLES.get(line, "repaired slices")
        model = FlextronForCausalLM.from_pretrained(self.start(start), flextron_budget=None if name == "1" else name)
        weights = [1.0] + [0.0] * (len(held(model.config.frontier)) - 1)
        seconds = self.train(
            f"{line} {name} {tokens} {rate:g}", model, tokens, rate,
            sampler="weighted", sampling_weights=weights, subnetworks_per_step=1,
        )  # fmt: skip
        cost = {"flops": tokens * self.per_token(start, [name]), "cpu_seconds": seconds}
        return {name: self.losses(model), "tokens": tokens} | cost

    def shared(self, line: str, tokens: int) -> int:
        """Tokens that each of the singles of a line may read."""
        if line == "singles, tokens":
            return tokens
        elastic = tokens * self.per_token(FAMILIES["elastic"], ["1", *self.rows(FAMILIES["elastic"])])
        start = SINGLES[line]
        return int(elastic / sum(self.per_token(start, [name]) for name in self.rows(start)))

    # ----------------------------------------------------------------------------------------- lines of the table

    def measure(self, line: str) -> None:
        """Measure what is missing of a line."""
        if line in STARTS and line not in self.measured:
            self.keep(line, self.family_losses(FlextronForCausalLM.from_pretrained(self.start(line)).eval()))
        elif line == "parent":
            self.keep_new(line, lambda: {"1": self.losses(self.parent), "bytes": 2 * self.parent.num_parameters()})
        elif line in PARENTS:
            self.keep_new(line, lambda: self.quantized(line))
        elif line in FAMILIES:
            for tokens, rate in self.settings(line):
                self.keep_new(f"{line} {tokens} {rate:g}", lambda t=tokens, r=rate: self.family(line, t, r))
        elif line == "control":
            for tokens, rate in self.settings("control 1"):
                self.keep_new(f"{line} 1 {tokens} {rate:g}", lambda t=tokens, r=rate: self.single(line, "1", t, r))
        elif line in SINGLES:
            for name in self.rows(SINGLES[line]):
                for tokens, rate in self.settings(f"{line} {name}"):
                    own = self.shared(line, tokens)
                    key = f"{line} {name} {tokens} {rate:g}"
                    self.keep_new(key, lambda n=name, t=own, r=rate: self.single(line, n, t, r))

    def keep_new(self, key: str, make: Any) -> None:
        if key not in self.measured:
            self.keep(key, make())

    def settings(self, prefix: str) -> Iterator[tuple[int, float]]:
        """Tokens and learning rates to train a line with: with the fewest tokens all rates, then the best of them."""
        first, *more = sorted(self.options.tokens)
        if self.seed == self.options.seeds[0]:  # the seed that chooses
            yield from ((first, rate) for rate in self.options.rates)
        chosen = best_rate(json.loads(self.note_that_chose.read_text()), prefix, first, self.options.rates)
        yield from ((tokens, chosen) for tokens in (first, *more))

    @property
    def note_that_chose(self) -> Path:
        return self.options.work / str(self.options.seeds[0]) / "measured.json"

    def quantized(self, line: str) -> dict[str, Any]:
        """The parent with quantized weights, and the bytes of its tensors: scales and the rest in bfloat16."""
        settings = next(value for name, value in formats().items() if name.startswith(f"torchao {line}"))
        model = AutoModelForCausalLM.from_pretrained(self.options.parent, **settings).eval()
        bits, embedding = int(line[3:]), self.parent.get_input_embeddings().weight
        linear = [value for value in self.parent.parameters() if value.ndim == 2 and value is not embedding]
        quantized = sum(value.numel() for value in linear)
        scales = quantized // 16 if bits == 4 else sum(map(len, linear))  # of groups of 16, or of every output
        rest = self.parent.num_parameters() - quantized
        return {"1": self.losses(model), "bytes": quantized * bits // 8 + 2 * (scales + rest)}


def best_rate(measured: dict[str, Any], prefix: str, tokens: int, rates: list[float]) -> float:
    """The learning rate with the lowest mean loss of all trained sizes on the text that chooses."""

    def loss(rate: float) -> float:
        found = measured[f"{prefix} {tokens} {rate:g}"]
        return statistics.mean(value[SELECTION] for value in found.values() if isinstance(value, dict))

    return min(rates, key=loss)


def chosen(result: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, str]]:
    """Line and number of tokens -> budget -> name of the figures at the best learning rate, as far as that is known."""
    options, first = result["options"], result["seeds"][str(result["options"]["seeds"][0])]
    budgets, few = ["1", *(f"{budget:g}" for budget in options["budgets"])], min(options["tokens"])
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for line in LINES:
        if line in STARTS or line in PARENTS:
            found[line, None] = dict.fromkeys(budgets, line)
            continue
        for tokens in sorted(options["tokens"]):
            prefixes = {budget: line if line in FAMILIES else f"{line} {budget}" for budget in budgets}
            found[line, tokens] = {
                budget: f"{prefix} {tokens} {best_rate(first, prefix, few, options['rates']):g}"
                for budget, prefix in prefixes.items()
                if all(f"{prefix} {few} {rate:g}" in first for rate in options["rates"])
            }
    return found


def table(result: dict[str, Any]) -> str:
    """Losses of every line and number of tokens, means over the seeds that have them, and paired differences."""
    budgets, texts = ["1", *(f"{budget:g}" for budget in result["options"]["budgets"])], result["texts"]
    columns = [(budget, text) for budget in budgets for text in texts]
    seeds, lines = list(result["seeds"].values()), chosen(result)
    head = " | ".join(f"{budget}, {text}" for budget, text in columns)
    rule = "---:|" * len(columns)
    out = [f"| | tokens | TFLOP | CPU min | {head} |", f"|---|---:|---:|---:|{rule}"]

    def losses(seed: dict[str, Any], keys: dict[str, str]) -> dict[tuple[str, str], float]:
        parts = {budget: seed[key].get(budget, {}) for budget, key in keys.items() if key in seed}
        return {(budget, text): part[text] for budget, part in parts.items() for text in texts if text in part}

    def cost(keys: dict[str, str], what: str) -> float:
        sums = [sum(seed[key].get(what, 0) for key in set(keys.values()) if key in seed) for seed in seeds]
        return statistics.mean(each for each in sums if each) if any(sums) else 0

    for (line, tokens), keys in lines.items():
        found = [losses(seed, keys) for seed in seeds]
        cells = [[each[column] for each in found if column in each] for column in columns]
        if any(cells):
            cost_cells = [f"{cost(keys, 'flops') / 1e12:.1f}", f"{cost(keys, 'cpu_seconds') / 60:.1f}"]
            row = [f"{tokens:,}" if tokens else "", *(cost_cells if tokens else ["", ""])]
            row += [f"{statistics.mean(cell):.3f}" if cell else "" for cell in cells]
            out.append(f"| {line} | {' | '.join(row)} |")

    paired: list[str] = []
    rivals = [("elastic", rival) for rival in ("singles", "singles, tokens", "control")]
    for line, rival in rivals + [(line, "elastic") for line in FAMILIES if line != "elastic"]:
        for tokens in sorted(result["options"]["tokens"]):
            ours, theirs = ([losses(seed, lines[each, tokens]) for seed in seeds] for each in (line, rival))
            pairs = list(zip(ours, theirs, strict=True))
            cells = [[a[column] - b[column] for a, b in pairs if column in a and column in b] for column in columns]
            if any(cells):
                paired.append(f"| {line} - {rival} | {tokens:,} | {' | '.join(map(difference, cells))} |")
    if paired:
        out += ["", f"| difference, standard deviation over seeds | tokens | {head} |", f"|---|---:|{rule}", *paired]
    return "\n".join(out)


def bought(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Tokens -> budget -> nats that the elastic run is above the parent, first text, for `training/expectations.py`."""
    seeds, text = list(result["seeds"].values()), result["texts"][0]
    found = {}
    for (line, tokens), keys in chosen(result).items():
        if line in ("repaired slices", "elastic"):
            above = {
                budget: [
                    each[key][budget][text] - each["parent"]["1"][text]
                    for each in seeds
                    if "parent" in each and budget in each.get(key, {})
                ]
                for budget, key in keys.items()
            }
            found[str(tokens or 0)] = {
                budget: round(statistics.mean(each), 3) for budget, each in above.items() if each
            }
    return {tokens: row for tokens, row in found.items() if row}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw losses on the first text against the bytes of stock checkpoints, in bfloat16 or quantized."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, text, seeds = figure.subplots(), result["texts"][0], list(result["seeds"].values())
    for (line, tokens), keys in chosen(result).items():
        values = {
            budget: [seed[key][budget][text] for seed in seeds if text in seed.get(key, {}).get(budget, {})]
            for budget, key in keys.items()
        }
        if line in PARENTS:
            if values["1"]:
                axes.plot(seeds[0][line]["bytes"] / 1e6, statistics.mean(values["1"]), "*", markersize=12, label=line)
            continue
        start = FAMILIES.get(line, SINGLES.get(line, line))
        sizes = result["bytes"].get(start, {})
        points = [
            (sizes[budget] / 1e6, statistics.mean(each)) for budget, each in values.items() if each and budget in sizes
        ]
        if len(points) > 1:
            label = f"{line}, {tokens:,} tokens" if tokens else f"{line}, nothing trained"
            axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=label)
    axes.set_xlabel("MB of weights")
    axes.set_ylabel(f"loss on {text}, nats per token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def difference(values: list[float]) -> str:
    """Mean of paired differences, and their standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", help="folder or Hub id")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="text files to calibrate and train with")
    parser.add_argument("--test", type=Path, nargs="+", default=[], help="text files of other documents")
    parser.add_argument("--name", help="of the result; default: that of the parent")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.35])
    parser.add_argument("--tokens", type=int, nargs="+", default=[40960, 163840, 655360])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument("--test-blocks", type=int, default=24, help=f"blocks of {LENGTH} tokens of every text")
    parser.add_argument("--chats", type=int, default=384, help="answers of the parent to train with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=Path("real-work"), help="folder of models and figures")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    options = parser.parse_args()

    name = f"real-{options.name or Path(options.parent or '').name}"
    if options.table:
        for path in sorted(RESULTS.glob("real-*.json")):
            print(f"{path.stem}\n\n{table(json.loads(path.read_text()))}\n")
            draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    kept = ("budgets", "tokens", "rates", "seeds", "calibration_blocks", "test_blocks", "chats")
    result: dict[str, Any] = {
        "machine": machine(options.device),
        "options": {key: getattr(options, key) for key in kept},
    }
    talks = getattr(load_tokenizer(options.parent), "chat_template", None) is not None
    result["texts"] = [path.stem for path in options.test] + ["chats"] * talks
    for line in options.lines:
        for seed in options.seeds:
            study = Study(options, seed)
            study.measure(line)
            result.setdefault("seeds", {})[str(seed)] = study.measured
            result.setdefault("bytes", {}).update(study.sizes())
            save(name, result)
    save(name, result | {"parameters": study.parent.num_parameters(), "bought": bought(result)})
    print(table(result))
    draw(result, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
