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
    elastic, ...      the same as "elastic" with another recipe: see RECIPES in real_lines.py
    routed            the model of "elastic, uniform", frozen: a router chooses sizes of each layer, its rows as large
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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_quantized import formats
from common import RESULTS, against, interleaved, machine, save, text_blocks
from peft import PeftModel
from real_lines import BATCH, LENGTH, PLAN
from real_tables import bought, draw, tables
from study import Study, check_settings, chosen, measured_in, merged
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from flextron_trainer.answers import write_answers
from flextron_trainer.conversations import documents_of
from flextron_trainer.data import load_tokenizer
from flextron_trainer.evaluation.harness import evaluate_tasks, task_manager
from flextron_trainer.losses import IGNORED
from flextron_trainer.measuring.bench import TASKS, variants_of
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.frontier import held

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
        if len(options.train) > 1:  # one file is in a random order
            text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
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


class RealStudy(Study):
    """Everything of one parent and one seed (order of the data, and which text calibrates).

    Args:
        options: Of the command line.
        seed: Of it.
    """

    def __init__(self, options: argparse.Namespace, seed: int):
        grid = {f"{rate:g}": {"learning_rate": rate, "per_device_train_batch_size": BATCH} for rate in options.rates}
        super().__init__(options, PLAN, grid, options.work, seed)

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

    @property
    def tests(self) -> dict[str, list[dict[str, Any]]]:
        return self.data.tests

    @property
    def selection(self) -> list[dict[str, Any]]:
        return self.data.selection

    @property
    def calibration(self) -> torch.Tensor:
        return self.data.text[self.seed * self.options.calibration_blocks :][: self.options.calibration_blocks]

    def train_rows(self, count: int) -> list[dict[str, Any]]:
        return self.data.train_rows(self.seed, count)

    def arguments(self, start: str) -> dict[str, Any]:
        layers = self.parent.config.num_hidden_layers
        depth = {"depth": [layers - i for i in range(layers * 5 // 6)]} if start == "depth" else {}
        return super().arguments(start) | depth

    def of_parent(self, line: str) -> dict[str, Any]:
        return super().of_parent(line) if line == "parent" else self.quantized(line)

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
        if line in PLAN.parents:
            return (self.parent if line == "parent" else self.load_quantized(line)), {"1": None}
        if line in PLAN.routers:  # nothing but the rows is new, and they are not saved
            return None
        if line in PLAN.starts or line in PLAN.families:
            folder = self.model_folder(key)
            if not folder.is_dir():
                return None
            model = FlextronForCausalLM.from_pretrained(folder).to(self.options.device)
            rows = held(model.config.frontier)  # nothing is trained in a start: its full network is the parent
            budgets = {name: rows[name] for name in names if name in rows and (line in PLAN.families or name != "1")}
            return model.eval(), budgets
        (name,), rate, tokens = names, key.rpartition(" ")[2], self.measured[key]["tokens"]
        run = self.model_folder(f"runs/{line} {name} {tokens} {rate}")
        folder = get_last_checkpoint(str(run)) if run.is_dir() else None
        if folder is None:
            return None
        if line in PLAN.adapters:
            model = merged(PeftModel.from_pretrained(self.row(PLAN.singles[line], name), folder))
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
    parser.add_argument("--lines", nargs="+", choices=PLAN.lines, default=list(PLAN.lines))
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
    same = ("budgets", "calibration_blocks", "test_blocks", "chats")
    settings = {key: getattr(options, key) for key in same} | {"length": LENGTH, "batch": BATCH}
    settings["seed that chooses"] = options.seeds[0]
    settings |= {key: [[path.name, path.stat().st_size] for path in getattr(options, key)] for key in ("train", "test")}
    parent = Path(options.parent)
    check_settings(parser, options.work, settings | {"parent": str(parent.resolve() if parent.is_dir() else parent)})
    options.results.mkdir(parents=True, exist_ok=True)
    kept = (*same, "tokens", "rates", "seeds")
    result: dict[str, Any] = {
        "machine": machine(options.device),
        "options": {key: getattr(options, key) for key in kept},
    }
    talks = getattr(load_tokenizer(options.parent), "chat_template", None) is not None
    result["texts"] = [path.stem for path in options.test] + ["chats"] * talks
    studies = [RealStudy(options, seed) for seed in options.seeds]
    result["bytes"] = {}

    def note() -> None:
        result["seeds"] = measured_in(options.work)
        result["options"]["seeds"] = list(dict.fromkeys([*options.seeds, *map(int, result["seeds"])]))
        for seed in result["options"]["seeds"]:
            result["bytes"] |= RealStudy(options, seed).sizes()
        save(name, result, options.results)

    for line in options.lines:
        for study in studies:
            study.measure(line)
            if options.times and line in PLAN.starts:
                study.keep_new(f"{line}, times", lambda one=study, start=line: one.times(start))
            note()
    for (line, _), keys in chosen(result, PLAN).items() if options.tasks else ():
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
