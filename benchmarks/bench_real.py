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
    magnitude         by the norms of the weights, uniform, nothing trained and no text read
    elastic           one run that trains all rows from the repaired slices, with the library's defaults
    elastic, plain    the same without corrections
    elastic, uniform  the same from the slices
    routed            its model, frozen: a router chooses rows with the sizes of each layer, as large as its own ones
    elastic, ...      the same with another recipe: see RECIPES
    singles           each repaired slice trained by itself; together they cost what the elastic run cost, teacher
                      included, and all of them read as many tokens
    singles, tokens   each repaired slice trained by itself on as many tokens as the elastic run
    depth, singles    the models with fewer layers, trained by themselves at the cost of the elastic run
    magnitude, singles   those by the norms of the weights, likewise
    lora, singles     each repaired slice frozen, a LoRA of its linear layers trained by the same loss, and merged; also
                      at the cost of the elastic run: two forward passes for a slice, those of the LoRA not counted
    control           the full size alone, same recipe and tokens
--tasks adds the accuracies on tasks of lm-eval, with standard errors, of every model whose weights are in --work; tasks
of your own have paths relative to where this is started. --times adds prefill and decoding of every row of what is not
trained, against its stock export and against the parent.
Compute is that of matrix products: three forward passes for a trained network and one for the teacher. The learning
rate of every line is the best of --rates with the fewest tokens, by a part of the training text that no table shows.
Every figure is kept in --work as soon as it is there; a second start goes on where the first stopped, within a run from
its last checkpoint.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_quantized import formats
from common import RESULTS, against, interleaved, machine, run_settings, save, text_blocks, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from real_lines import (
    BATCH,
    FAMILIES,
    GOES_ON,
    LENGTH,
    LINES,
    LORA,
    PARENTS,
    RECIPES,
    SELECTION,
    SINGLES,
    STARTS,
    best_rate,
    chosen,
)
from real_tables import bought, draw, tables
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.answers import write_answers
from flextron_trainer.conversations import documents_of
from flextron_trainer.data import collator, load_tokenizer
from flextron_trainer.evaluation.harness import evaluate_tasks, task_manager
from flextron_trainer.evaluation.quality import evaluate_model
from flextron_trainer.losses import IGNORED
from flextron_trainer.measuring.bench import TASKS, variants_of
from modeling_flextron import FlextronConfig, FlextronForCausalLM, flops_per_token
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import count_parameters

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
        self.configs: dict[str, FlextronConfig] = {}  # of starts, by `config`

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
        folder = self.model_folder(name)
        if not (folder / "config.json").is_file():
            begin = time.process_time()
            blocks = self.data.text[self.seed * self.options.calibration_blocks :][: self.options.calibration_blocks]
            layers = self.parent.config.num_hidden_layers
            depth = {"depth": [layers - i for i in range(layers * 5 // 6)]} if name == "depth" else {}
            settings = {"calibration": blocks, "budgets": [1, *self.options.budgets], **STARTS[name], **depth}
            converted = convert(self.parent, seed=self.seed, **settings)
            converted.save_pretrained(folder)
            self.keep(f"{name}, conversion", {"cpu_seconds": time.process_time() - begin})
        return folder

    def config(self, name: str) -> FlextronConfig:
        """The config of a start."""
        if name not in self.configs:
            self.configs[name] = FlextronConfig.from_pretrained(self.start(name))
        return self.configs[name]

    def rows(self, name: str) -> dict[str, Any]:
        """Name -> sub-network of the rows of a start that have a budget of ours."""
        found = held(self.config(name).frontier)
        return {budget: found[budget] for budget in self.names if budget in found}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Start -> row -> bytes of its stock checkpoint in bfloat16, for what was converted."""
        found = {}
        for name in STARTS:
            if (self.model_folder(name) / "config.json").is_file():
                config = self.config(name)
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

    def per_token(self, start: str, trained: list[str], passes: int = 3) -> float:
        """Floating-point operations of a training token that goes through the teacher and the rows `trained`."""
        config = self.config(start)
        rows = held(config.frontier)
        teacher = flops_per_token(config, rows["1"], LENGTH // 2)
        return teacher + passes * sum(flops_per_token(config, rows[name], LENGTH // 2) for name in trained)

    # ----------------------------------------------------------------------------------------- training

    def train(self, key: str, model: Any, tokens: int, rate: float, **arguments: Any) -> float:
        """Train a model in place, from the last checkpoint of an earlier start if there is one; CPU seconds."""
        steps, folder = max(1, tokens // (BATCH * LENGTH)), self.run_folder(key)
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

    def model_folder(self, key: str) -> Path:
        return self.folder / key.replace(" ", "-")

    def run_folder(self, key: str) -> Path:
        return self.model_folder(f"runs/{key}")

    def family(self, line: str, tokens: int, rate: float) -> dict[str, Any]:
        """One elastic run."""
        start = FAMILIES[line]
        names = ["1", *self.rows(start)]
        model = FlextronForCausalLM.from_pretrained(self.start(start))
        recipe = {"subnetworks_per_step": len(names)} | RECIPES.get(line, {})
        seconds = self.train(f"{line} {tokens} {rate:g}", model, tokens, rate, **recipe)
        model.save_pretrained(self.model_folder(f"{line} {tokens} {rate:g}"))
        cost = {"flops": tokens * self.per_token(start, names), "cpu_seconds": seconds}
        return self.family_losses(model) | cost

    def routed(self, line: str, tokens: int, rate: float) -> dict[str, Any]:
        """Rows that a router chooses in the model of another line, each as large as the row of that."""
        key, names = f"{line} {tokens} {rate:g}", self.rows(FAMILIES[line])
        model = FlextronForCausalLM.from_pretrained(self.model_folder(f"{GOES_ON[line]} {tokens} {rate:g}"))
        whole, sizes = model.config.parent_size(), {row.name: row.non_embedding_parameters for row in model.frontier}
        targets = {name: sizes[name] / whole for name in names}
        router = {"stage": "router", "router_method": "gumbel", "router_budgets": list(targets.values())}
        seconds = self.train(key, model, tokens, rate, subnetworks_per_step=2, warmup_steps=0, **router)
        rows = {row.name: row for row in model.eval().frontier}
        found = {name: rows[f"routed-{target:g}"] for name, target in targets.items()}
        cost = {"flops": tokens * self.per_token(FAMILIES[line], ["1", "1"], 2), "cpu_seconds": seconds}
        return {
            name: self.losses(model, row.subnetwork) | {"parameters": row.non_embedding_parameters}
            for name, row in found.items()
        } | cost

    def single(self, line: str, name: str, tokens: int, rate: float) -> dict[str, Any]:
        """One row by itself."""
        start, passes = self.start_and_passes(line)
        model = self.row(start, name)
        weights = [1.0] + [0.0] * (len(held(model.config.frontier)) - 1)
        if line in LORA:
            model = get_peft_model(model, LoraConfig(**LORA[line]))
        seconds = self.train(
            f"{line} {name} {tokens} {rate:g}", model, tokens, rate,
            sampler="weighted", sampling_weights=weights, subnetworks_per_step=1,
        )  # fmt: skip
        cost = {"flops": tokens * self.per_token(start, [name], passes), "cpu_seconds": seconds}
        return {name: self.losses(merged(model)), "tokens": tokens} | cost

    def row(self, start: str, name: str) -> Any:
        """One row of a start, loaded by itself."""
        return FlextronForCausalLM.from_pretrained(self.start(start), flextron_budget=None if name == "1" else name)

    def start_and_passes(self, line: str) -> tuple[str, int]:
        """What singles start from, and how many forward passes a token's training costs; 2 where weights are frozen."""
        return SINGLES.get(line, "repaired slices"), 2 if line in LORA else 3

    def shared(self, line: str, tokens: int) -> int:
        """Tokens that each of the singles of a line may read."""
        if line == "singles, tokens":
            return tokens
        elastic = tokens * self.per_token(FAMILIES["elastic"], ["1", *self.rows(FAMILIES["elastic"])])
        start, passes = self.start_and_passes(line)
        return int(elastic / sum(self.per_token(start, [name], passes) for name in self.rows(start)))

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
            make = self.routed if line in GOES_ON else self.family
            for tokens, rate in self.settings(line):
                self.keep_new(f"{line} {tokens} {rate:g}", lambda t=tokens, r=rate: make(line, t, r))
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
        if self.seed == self.options.seeds[0] and prefix not in GOES_ON:  # the seed that chooses
            yield from ((first, rate) for rate in self.options.rates)
        noted = json.loads(self.note_that_chose.read_text())
        best = best_rate(noted, GOES_ON.get(prefix, prefix), first, self.options.rates)
        yield from ((tokens, best) for tokens in (first, *more))

    @property
    def note_that_chose(self) -> Path:
        return self.options.work / str(self.options.seeds[0]) / "measured.json"

    def load_quantized(self, line: str) -> Any:
        settings = next(value for name, value in formats().items() if name.startswith(f"torchao {line}"))
        return AutoModelForCausalLM.from_pretrained(self.options.parent, **settings).eval()

    def quantized(self, line: str) -> dict[str, Any]:
        """The parent with quantized weights, and the bytes of its tensors: scales and the rest in bfloat16."""
        model = self.load_quantized(line)
        bits, embedding = int(line[3:]), self.parent.get_input_embeddings().weight
        linear = [value for value in self.parent.parameters() if value.ndim == 2 and value is not embedding]
        quantized = sum(value.numel() for value in linear)
        scales = quantized // 16 if bits == 4 else sum(map(len, linear))  # of groups of 16, or of every output
        rest = self.parent.num_parameters() - quantized
        return {"1": self.losses(model), "bytes": quantized * bits // 8 + 2 * (scales + rest)}

    # ----------------------------------------------------------------------------------------- tasks and times

    def load(self, line: str, key: str, names: list[str]) -> tuple[Any, dict[str, Any]] | None:
        """The model whose losses are `key`, and its budgets of these names; None where its weights are not there."""
        if line in PARENTS:
            return (self.parent if line == "parent" else self.load_quantized(line)), {"1": None}
        if line in STARTS or line in FAMILIES:
            folder = self.model_folder(key)
            if not folder.is_dir():
                return None
            model = FlextronForCausalLM.from_pretrained(folder).to(self.options.device)
            rows = held(model.config.frontier)  # nothing is trained in a start: its full network is the parent
            budgets = {name: rows[name] for name in names if name in rows and (line in FAMILIES or name != "1")}
            return model.eval(), budgets
        (name,), rate, tokens = names, key.rpartition(" ")[2], self.measured[key]["tokens"]
        run = self.run_folder(f"{line} {name} {tokens} {rate}")
        folder = get_last_checkpoint(str(run)) if run.is_dir() else None
        if folder is None:
            return None
        if line in LORA:
            model = merged(PeftModel.from_pretrained(self.row(SINGLES[line], name), folder))
        else:
            model = FlextronForCausalLM.from_pretrained(folder)
        return model.eval().to(self.options.device), {name: None}

    def measure_tasks(self, line: str, key: str, names: list[str]) -> None:
        """Measure the tasks that are missing of the model whose losses are `key`."""
        limits = self.options.task_limit * (1 if len(self.options.task_limit) > 1 else len(self.options.tasks))
        limit_of = dict(zip(self.options.tasks, limits, strict=True))
        missing = [task for task in limit_of if self.measured.get(f"{key}, {task}", {}).get("limit") != limit_of[task]]
        found = self.load(line, key, names) if missing else None
        if found is None:
            return
        model, budgets = found
        for task in missing:
            manager, limit = task_manager([task], self.options.include_path), limit_of[task]
            scores = evaluate_tasks(
                model, self.tokenizer, [task], manager, budgets=budgets, limit=limit or None, batch_size=16
            )
            self.keep(f"{key}, {task}", {"limit": limit, **scores})

    def times(self, start: str) -> list[dict[str, Any]]:
        """Prefill and decoding of every row against stock models, in the same rounds.

        The reference is the stock export of the row, and `control` another one. Where sizes differ between layers there
        is none: both are then the row itself, loaded, and `padded` is the stock model that holds it beside zeros.
        """
        folder, found = self.start(start), []
        model = FlextronForCausalLM.from_pretrained(folder).eval().to(self.options.device)
        ids = torch.randint(model.config.vocab_size, (1, LENGTH), device=self.options.device)
        for name, row in self.rows(start).items():
            variants = variants_of(model, folder, name)
            reference = next(iter(variants))
            padded = {} if reference == "native" else {"padded": (model.extract(row, pad=True), {})}
            compared = variants | padded | {"parent": (self.parent, {})}
            for what, task in TASKS.items():
                seconds = interleaved(
                    {label: task(*pair, ids) for label, pair in compared.items()},
                    self.options.rounds,
                    self.options.device,
                )
                found.append({"budget": name, "what": what, "reference": reference, **against(seconds, reference)})
        return found


def merged(model: Any) -> Any:
    """A model without adapters: they are added to the weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


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
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval to measure as well")
    parser.add_argument("--include-path", type=Path, help="folder with tasks of your own")
    parser.add_argument("--task-limit", type=int, nargs="+", default=[0], help="items of all tasks, or of each; 0: all")
    parser.add_argument("--times", action="store_true", help="measure prefill and decoding of what is not trained, too")
    parser.add_argument("--rounds", type=int, default=15, help="of --times")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=Path("real-work"), help="folder of models and figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result and its picture")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    options = parser.parse_args()

    name = f"real-{options.name or Path(options.parent or '').name}"
    if options.table:
        for path in sorted(options.results.glob("real-*.json")):
            result = json.loads(path.read_text())
            print(f"{path.stem}\n\n{tables(result)}\n")
            draw(result, path.with_suffix(".png"))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    kept = ("budgets", "tokens", "rates", "seeds", "calibration_blocks", "test_blocks", "chats")
    result: dict[str, Any] = {
        "machine": machine(options.device),
        "options": {key: getattr(options, key) for key in kept},
    }
    talks = getattr(load_tokenizer(options.parent), "chat_template", None) is not None
    result["texts"] = [path.stem for path in options.test] + ["chats"] * talks
    studies = [Study(options, seed) for seed in options.seeds]
    result |= {"seeds": {str(study.seed): study.measured for study in studies}, "bytes": {}}

    def note() -> None:
        for study in studies:
            result["bytes"] |= study.sizes()
        save(name, result, options.results)

    for line in options.lines:
        for study in studies:
            study.measure(line)
            if options.times and line in STARTS:
                study.keep_new(f"{line}, times", lambda one=study, start=line: one.times(start))
            note()
    for (line, _), keys in chosen(result).items() if options.tasks else ():
        for study in studies if line in options.lines else ():
            for key in dict.fromkeys(keys.values()):
                if key in study.measured:
                    study.measure_tasks(line, key, [budget for budget in keys if keys[budget] == key])
                    note()
    result |= {"parameters": studies[0].parent.num_parameters(), "bought": bought(result)}
    note()
    print(tables(result))
    draw(result, options.results / f"{name}.png")


if __name__ == "__main__":
    main()
