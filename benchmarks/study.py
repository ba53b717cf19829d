"""Ways to get models of several sizes from one parent, in one table: what `bench_real.py` and `bench_quality.py` share.

Every line has its cost: operations of matrix products, and CPU seconds. The settings of a line are the best of one grid
that all lines share, chosen by text that no table shows. Every figure is written down as soon as it is there, and a
second start goes on where the first stopped, within a run from its last checkpoint.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import run_settings, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import collator
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import FlextronConfig, FlextronForCausalLM, flops_per_token
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import count_parameters

SELECTION = "selection"  # the text that chooses, and is in no table


@dataclass(frozen=True)
class Plan:
    """The lines of a table.

    Args:
        length: Tokens in a row of text.
        parents: Lines about the parent at full size, in which nothing is trained or converted.
        starts: Line -> arguments of `convert`; nothing is trained in these.
        families: Line of one run that trains all rows -> its start.
        recipes: Line of them -> arguments of training that differ from the defaults; `sampling_weights` are two whole
            numbers, of the full size and of every other row.
        singles: Line of models that are trained one by one -> its start.
        routers: Line of rows that a router chooses -> the line of families whose model it gets, with its settings.
        others: Lines of a benchmark's own, measured size by size without a grid.
        adapters: Line of singles whose weights are frozen -> settings of the LoRA that learns instead.
        compared: Lines whose difference is shown, of all columns: ours and the rival.
        hidden: Starts that are no lines.
    """

    length: int
    parents: tuple[str, ...]
    starts: dict[str, dict[str, Any]]
    families: dict[str, str]
    recipes: dict[str, dict[str, Any]]
    singles: dict[str, str]
    compared: tuple[tuple[str, str], ...]
    routers: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        starts = [name for name in self.starts if name not in self.hidden]
        return (*self.parents, *starts, *self.families, *self.routers, *self.singles, "control", *self.others)

    def start(self, line: str) -> str:
        """The start of a line; the control is trained like the singles of the first family."""
        first, line = next(iter(self.families.values())), self.routers.get(line, line)
        return self.families.get(line, self.singles.get(line, line if line in self.starts else first))


class Study:
    """Everything of one parent and one seed: order of the data, and which text calibrates.

    A benchmark's own has `parent`, `tokenizer`, the rows `tests` (text -> rows) and `selection`, `calibration` and
    `train_rows`.

    Args:
        options: Of the command line: `seeds`, `budgets`, `tokens`, `device`.
        plan: The lines.
        grid: Name of a setting -> `learning_rate` and `per_device_train_batch_size`.
        folder: Of all seeds.
        seed: Of `options.seeds`, of which the first chooses.
    """

    parent: Any
    tokenizer: Any
    tests: dict[str, list[dict[str, Any]]]
    selection: list[dict[str, Any]]
    calibration: Any

    def __init__(self, options: argparse.Namespace, plan: Plan, grid: dict[str, dict], folder: Path, seed: int):
        self.options, self.plan, self.grid, self.seed, self.folder = options, plan, grid, seed, folder / str(seed)
        self.note, self.chose = self.folder / "measured.json", folder / str(options.seeds[0]) / "measured.json"
        self.measured: dict[str, Any] = json.loads(self.note.read_text()) if self.note.is_file() else {}
        self.names = [f"{budget:g}" for budget in options.budgets]
        self.configs: dict[str, FlextronConfig] = {}  # of starts, by `config`

    def train_rows(self, count: int) -> Any:
        """So many rows to train on, in an order of the seed."""
        raise NotImplementedError

    def keep(self, key: str, value: Any) -> None:
        """Write a figure down."""
        self.measured[key] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.note, self.measured)
        print(f"{self.seed} {key}: {json.dumps(value)}", flush=True)

    def keep_new(self, key: str, make: Callable[[], Any]) -> None:
        """Make a figure and write it down, unless it is there."""
        if key not in self.measured:
            self.keep(key, make())

    def model_folder(self, key: str) -> Path:
        return self.folder / key.replace(" ", "-")

    # ----------------------------------------------------------------------------------------- models to begin with

    def start(self, name: str) -> Path:
        """The converted parent in a folder; made first if it is not there.

        What that costs is kept: operations of products with weights, of calibration, fits and searches.
        """
        folder = self.model_folder(name)
        if not (folder / "config.json").is_file():
            settings = {"calibration": self.calibration, "budgets": [1, *self.options.budgets]}
            parent, begin = self.parent, time.process_time()
            with FlopCounterMode(display=False) as counter:
                converted = convert(parent, seed=self.seed, **settings | self.arguments(name))
            cost = {"flops": counter.get_total_flops(), "cpu_seconds": time.process_time() - begin}
            self.keep(f"{name}, conversion", cost)  # first: the folder says that all is done
            converted.save_pretrained(folder)
        return folder

    def arguments(self, start: str) -> dict[str, Any]:
        """What `convert` gets for a start, beside text and budgets."""
        return self.plan.starts[start]

    def config(self, start: str) -> FlextronConfig:
        """The config of a start."""
        if start not in self.configs:
            self.configs[start] = FlextronConfig.from_pretrained(self.start(start))
        return self.configs[start]

    def rows(self, start: str) -> dict[str, Any]:
        """Name -> sub-network of the rows of a start that have a budget of ours."""
        found = held(self.config(start).frontier)
        return {name: found[name] for name in self.names if name in found}

    def row(self, start: str, name: str) -> FlextronForCausalLM:
        """One row of a start, loaded by itself."""
        return FlextronForCausalLM.from_pretrained(self.start(start), flextron_budget=None if name == "1" else name)

    def sizes(self) -> dict[str, dict[str, int]]:
        """Start -> row -> bytes of its stock checkpoint in bfloat16, for what was converted."""
        found = {}
        for name in self.plan.starts:
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
        model.to(self.options.device).eval()
        texts, batch = self.tests | {SELECTION: self.selection}, 1024 // self.plan.length
        return {name: evaluate_model(model, rows, batch, budget)["loss"] for name, rows in texts.items()}

    def family_losses(self, model: FlextronForCausalLM) -> dict[str, Any]:
        rows = held(model.config.frontier)
        return {name: self.losses(model, rows[name]) for name in ("1", *self.names) if name in rows}

    def per_token(self, start: str, trained: list[str], passes: float = 3, taught: bool = True) -> float:
        """Operations of a training token: `passes` forward passes of the rows `trained`, and one of the teacher."""
        config = self.config(start)
        rows, context = held(config.frontier), self.plan.length // 2
        teacher = flops_per_token(config, rows["1"], context) if taught else 0
        return teacher + passes * sum(flops_per_token(config, rows[name], context) for name in trained)

    # ----------------------------------------------------------------------------------------- training

    def whole(self, tokens: int, cell: str) -> int:
        """The tokens of the nearest number of steps, at least one."""
        step = self.grid[cell]["per_device_train_batch_size"] * self.plan.length
        return max(1, round(tokens / step)) * step

    def train(self, key: str, model: Any, tokens: int, cell: str, **arguments: Any) -> float:
        """Train a model in place with a setting of the grid; CPU seconds."""
        rate, batch = self.grid[cell]["learning_rate"], self.grid[cell]["per_device_train_batch_size"]
        steps, folder = self.whole(tokens, cell) // (batch * self.plan.length), self.model_folder(f"runs/{key}")
        on_cpu = self.options.device == "cpu"
        saved = {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 1, "logging_steps": 20}
        common = run_settings(str(folder), steps, rate, batch, self.seed) | {"use_cpu": on_cpu, "bf16": not on_cpu}
        trainer = FlextronTrainer(
            model, FlextronTrainingArguments(**common | saved | arguments),
            teacher=None if arguments.get("kd_weight") == 0 else self.parent,
            train_dataset=self.train_rows(steps * batch), processing_class=self.tokenizer,
            data_collator=collator(self.tokenizer),
        )  # fmt: skip
        return self.timed(trainer)

    def timed(self, trainer: Trainer) -> float:
        """Train, from the last checkpoint of an earlier start if there is one; CPU seconds, with those up to there."""
        folder = Path(trainer.args.output_dir)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        clock = Clock(folder / "seconds.json", resumed=last is not None)
        trainer.add_callback(clock)
        trainer.train(resume_from_checkpoint=last)
        return clock.seconds()

    def family(self, line: str, tokens: int, cell: str) -> dict[str, Any]:
        """One elastic run."""
        start, key, recipe = self.plan.families[line], f"{line} {tokens} {cell}", self.plan.recipes.get(line, {})
        names = ["1", *self.rows(start)]
        full, other = recipe.get("sampling_weights", (1, 1))
        if "sampling_weights" in recipe:
            recipe = recipe | {"sampling_weights": [full] + [other] * (len(names) - 1)}
        model = FlextronForCausalLM.from_pretrained(self.start(start))
        seconds = self.train(key, model, tokens, cell, **{"subnetworks_per_step": len(names)} | recipe)
        model.save_pretrained(self.model_folder(key))
        drawn = ["1"] * full + names[1:] * other  # of so many draws; in a step there are as many as names
        per_token = self.per_token(start, drawn, 3 * len(names) / len(drawn), taught=recipe.get("kd_weight") != 0)
        return self.family_losses(model) | {"flops": self.whole(tokens, cell) * per_token, "cpu_seconds": seconds}

    def routed(self, line: str, tokens: int, cell: str) -> dict[str, Any]:
        """Rows that a router chooses in the model of another line, each as large as the row of that; weights frozen."""
        start, names = self.plan.start(line), self.rows(self.plan.start(line))
        model = FlextronForCausalLM.from_pretrained(self.model_folder(f"{self.plan.routers[line]} {tokens} {cell}"))
        whole, sizes = model.config.parent_size(), {row.name: row.non_embedding_parameters for row in model.frontier}
        targets = {name: sizes[name] / whole for name in names}
        router = {"stage": "router", "router_method": "gumbel", "router_budgets": list(targets.values())}
        two = {"subnetworks_per_step": 2, "warmup_steps": 0}
        seconds = self.train(f"{line} {tokens} {cell}", model, tokens, cell, **router, **two)
        rows = {row.name: row for row in model.eval().frontier}
        found = {name: rows[f"routed-{target:g}"] for name, target in targets.items()}
        losses = {
            name: self.losses(model, row.subnetwork) | {"parameters": row.non_embedding_parameters}
            for name, row in found.items()
        }
        flops = self.whole(tokens, cell) * self.per_token(start, ["1", "1"], passes=2)
        return losses | {"flops": flops, "cpu_seconds": seconds}

    def single(self, line: str, name: str, tokens: int, cell: str) -> dict[str, Any]:
        """One row by itself."""
        start, tokens = self.plan.start(line), self.whole(tokens, cell)
        model, passes = self.row(start, name), self.passes(line)
        weights = [1.0] + [0.0] * (len(held(model.config.frontier)) - 1)
        alone = {"sampler": "weighted", "sampling_weights": weights, "subnetworks_per_step": 1}
        if line in self.plan.adapters:
            model = get_peft_model(model, LoraConfig(**self.plan.adapters[line]))
        seconds = self.train(f"{line} {name} {tokens} {cell}", model, tokens, cell, **alone)
        cost = {"flops": tokens * self.per_token(start, [name], passes), "cpu_seconds": seconds}
        return {name: self.losses(merged(model)), "tokens": tokens} | cost

    def passes(self, line: str) -> int:
        """Forward passes that a training token costs: without gradients of weights two instead of three."""
        return 2 if line in self.plan.adapters else 3

    def shared(self, line: str, tokens: int) -> int:
        """Tokens that each model of a line reads: of singles so many that all together cost one run of their family."""
        if line == "control" or line.endswith(", tokens"):
            return tokens
        start = self.plan.singles[line]
        rival = start if start in self.plan.families.values() else self.plan.start("control")
        elastic = self.per_token(rival, ["1", *self.rows(rival)])
        return int(
            tokens * elastic / sum(self.per_token(start, [name], self.passes(line)) for name in self.rows(start))
        )

    # ----------------------------------------------------------------------------------------- lines of the table

    def measure(self, line: str) -> None:
        """Measure what is missing of a line."""
        plan = self.plan
        if line in plan.parents:
            self.keep_new(line, lambda: self.of_parent(line))
        elif line in plan.starts:
            self.keep_new(line, lambda: self.family_losses(FlextronForCausalLM.from_pretrained(self.start(line))))
        elif line in plan.families or line in plan.routers:
            make = self.family if line in plan.families else self.routed
            for tokens, cell in self.settings(line):
                self.keep_new(f"{line} {tokens} {cell}", lambda t=tokens, c=cell: make(line, t, c))
        else:
            for name in ["1"] if line == "control" else self.rows(plan.singles[line]):
                for tokens, cell in self.settings(f"{line} {name}"):
                    key, own = f"{line} {name} {tokens} {cell}", self.shared(line, tokens)
                    self.keep_new(key, lambda n=name, t=own, c=cell: self.single(line, n, t, c))

    def of_parent(self, line: str) -> dict[str, Any]:
        """The losses and bytes of a line about the parent alone."""
        return {"1": self.losses(self.parent), "bytes": 2 * self.parent.num_parameters()}

    def settings(self, prefix: str) -> Iterator[tuple[int, str]]:
        """Tokens and settings to train a line with: with the fewest tokens the whole grid, then the best of it."""
        first, *more = sorted(self.options.tokens)
        if self.seed == self.options.seeds[0] and prefix not in self.plan.routers:  # the seed that chooses
            yield from ((first, cell) for cell in self.grid)
        chosen = best(json.loads(self.chose.read_text()), self.plan.routers.get(prefix, prefix), first, list(self.grid))
        yield from ((tokens, chosen) for tokens in (first, *more))


class Clock(TrainerCallback):
    """CPU seconds of a run, written down with every checkpoint, as one that is resumed has those before it as well.

    Args:
        note: The file.
        resumed: It has seconds of an earlier start; 0 if that did not write any.
    """

    def __init__(self, note: Path, resumed: bool):
        self.note, self.begin = note, time.process_time()
        self.before = json.loads(note.read_text()) if resumed and note.is_file() else 0.0

    def seconds(self) -> float:
        return self.before + time.process_time() - self.begin

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(self.note, self.seconds())


def check_settings(parser: argparse.ArgumentParser, work: Path, settings: dict[str, Any]) -> None:
    """Keep in a folder what all its figures depend on; an error of the command line if an earlier start had others."""
    note = work / "settings.json"
    before = json.loads(note.read_text()) if note.is_file() else settings
    if different := [name for name, value in settings.items() if before.get(name, value) != value]:
        was = ", ".join(f"{name} {before[name]}" for name in different)
        parser.error(f"{work} has figures of other settings: {was}. Pass those, or another --work.")
    work.mkdir(parents=True, exist_ok=True)
    write_json(note, settings)


def measured_in(folder: Path) -> dict[str, Any]:
    """Seed -> its figures, of all seeds that were measured in a folder at any time."""
    notes = sorted(folder.glob("*/measured.json"), key=lambda note: int(note.parent.name))
    return {note.parent.name: json.loads(note.read_text()) for note in notes}


def merged(model: Any) -> Any:
    """A model without adapters: they are added to the weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def best(measured: dict[str, Any], prefix: str, tokens: int, cells: list[str]) -> str:
    """The setting with the lowest mean loss of all trained sizes on the text that chooses."""

    def loss(cell: str) -> float:
        found = measured[f"{prefix} {tokens} {cell}"]
        return statistics.mean(value[SELECTION] for value in found.values() if isinstance(value, dict))

    return min(cells, key=loss)


def budgets_of(result: dict[str, Any]) -> list[str]:
    """Names of the columns of a result."""
    return ["1", *(f"{budget:g}" for budget in result["options"]["budgets"])]


def chosen(result: dict[str, Any], plan: Plan) -> dict[tuple[str, int | None], dict[str, str]]:
    """Line and number of tokens -> budget -> name of the figures at the best setting, as far as that is known."""
    options, first = result["options"], result["seeds"].get(str(result["options"]["seeds"][0]), {})
    budgets, few = budgets_of(result), min(options["tokens"])
    cells = options.get("grid") or [f"{rate:g}" for rate in options["rates"]]
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for line in plan.lines:
        if line in plan.starts or line in plan.parents:
            found[line, None] = dict.fromkeys(budgets, line)
            continue
        if line in plan.others:
            found[line, None] = {budget: f"{line} {budget}" for budget in budgets}
            continue
        for tokens in sorted(options["tokens"]):
            whole = line in plan.families or line in plan.routers
            prefixes = {budget: line if whole else f"{line} {budget}" for budget in budgets}
            found[line, tokens] = {
                budget: f"{prefix} {tokens} {best(first, plan.routers.get(line, prefix), few, cells)}"
                for budget, prefix in prefixes.items()
                if all(f"{plan.routers.get(line, prefix)} {few} {cell}" in first for cell in cells)
            }
    return found


def table(result: dict[str, Any], plan: Plan) -> str:
    """Losses of every line and number of tokens, means over the seeds that have them, and paired differences.

    `result["counted"]` names the seeds that count, where that is not all of them.
    """
    budgets, texts = budgets_of(result), result["texts"]
    columns = [(budget, text) for budget in budgets for text in texts]
    counted = result.get("counted", list(result["seeds"]))
    seeds, lines = [result["seeds"][seed] for seed in counted if seed in result["seeds"]], chosen(result, plan)
    head = " | ".join(f"{budget}, {text}" if len(texts) > 1 else budget for budget, text in columns)
    rule = "---:|" * len(columns)
    out = [f"| | tokens | TFLOP | CPU min | {head} |", f"|---|---:|---:|---:|{rule}"]

    def losses(seed: dict[str, Any], keys: dict[str, str]) -> dict[tuple[str, str], float]:
        parts = {budget: seed[key].get(budget, {}) for budget, key in keys.items() if key in seed}
        return {(budget, text): part[text] for budget, part in parts.items() for text in texts if text in part}

    def cost(keys: list[str], what: str, scale: float) -> str:
        sums = [sum(seed[key].get(what, 0) for key in keys if key in seed) for seed in seeds]
        return f"{statistics.mean(each for each in sums if each) / scale:.1f}" if any(sums) else ""

    for (line, tokens), keys in lines.items():
        found = [losses(seed, keys) for seed in seeds]
        cells = [[each[column] for each in found if column in each] for column in columns]
        if any(cells):
            paid = [f"{line}, conversion"] if line in plan.starts else sorted(set(keys.values()))
            row = [f"{tokens:,}" if tokens else "", cost(paid, "flops", 1e12), cost(paid, "cpu_seconds", 60)]
            row += [f"{statistics.mean(cell):.3f}" if cell else "" for cell in cells]
            out.append(f"| {line} | {' | '.join(row)} |")

    paired: list[str] = []
    for line, rival in plan.compared:
        for tokens in sorted(result["options"]["tokens"]):
            ours, theirs = ([losses(seed, lines[each, tokens]) for seed in seeds] for each in (line, rival))
            pairs = list(zip(ours, theirs, strict=True))
            cells = [[a[column] - b[column] for a, b in pairs if column in a and column in b] for column in columns]
            if any(cells):
                paired.append(f"| {line} - {rival} | {tokens:,} | {' | '.join(map(difference, cells))} |")
    if paired:
        out += ["", f"| difference, standard deviation over seeds | tokens | {head} |", f"|---|---:|{rule}", *paired]
    return "\n".join(out)


def difference(values: list[float]) -> str:
    """Mean of paired differences, and their standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{spread}"
