"""The `flextron` command: a thin layer over the Python API. Every verb ends with one JSON line on stdout."""

import json
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Make a trained LLaMA or GPT elastic, train it at many sizes at once, and use any of them. Whatever goes wrong"
    " is one line and exit code 2; `--traceback`, anywhere, shows all of it.",
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a Flextron model.", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda; by default a GPU when there is one.")]
Budget = Annotated[
    str | None,
    typer.Option(help="0.5, 350M, 6GiB, 25ms, auto:0.5, the name of a row, or the fields of a SubNetwork as JSON."),
]
Boundaries = Annotated[
    bool, typer.Option("--document-boundaries", help="Keep documents in a sample apart: attention stops between them.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that files of the parent or the tokenizer bring along.")
]
STREAMED_EVAL_ROWS = 64
PRESETS = "the name of a file of hub_configs/, such as llama-3.2-1b, or the path of one."
DATA = "'stdlib', a folder, a text, jsonl, csv or parquet file, a pattern such as 'text/*.jsonl', or a Hub dataset id."


def finish(**result: Any) -> None:
    """Print the JSON line that ends a verb."""
    print(json.dumps(result), flush=True)


def numbers(name: str, text: str | None) -> list[int | float] | None:
    """Parse `1,0.75,512`, the value of option `name`."""
    from modeling_flextron.errors import invalid

    if text is None:
        return None
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise invalid(name, text, "They are numbers with commas between.", "Write for instance 1,0.5.") from None


def budget_value(text: str | None) -> Any:
    """A budget as typed: JSON fields, or the grammar's own text."""
    from modeling_flextron.errors import invalid

    if not text or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise invalid("budget", text, f"It is not JSON: {error}.", 'Write for instance {"mlp": 96}.') from None


def copy_tokenizer(source: str, output: Path, trust_remote_code: bool) -> None:
    """Save the tokenizer of `source` in `output`, if it has one."""
    from .data import load_tokenizer

    try:
        load_tokenizer(source, trust_remote_code=trust_remote_code).save_pretrained(output)
    except ValueError as error:
        print(f"No tokenizer was copied: {error}", file=sys.stderr)


def words(value: Any) -> list[str]:
    """How a value of a recipe is typed as an argument."""
    if isinstance(value, list):
        return [str(part) for part in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def fitting_length(length: int | None, config: Any) -> int:
    """Tokens of a sample: as asked for, and by default 1024 or as many as the model has positions for."""
    from modeling_flextron.errors import invalid

    limit = config.max_position_embeddings
    if length is not None and config.learned_positions and length > limit:
        rule = f"The model has {limit} learned positions."
        raise invalid("sequence_length", length, rule, "Pass at most so many, or leave it out.")
    return length or min(1024, limit)


def device_or_default(device: str | None) -> str:
    import torch

    from modeling_flextron.errors import invalid

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        rule = f"This machine cannot use it: {str(error).splitlines()[0]}."
        raise invalid("device", device, rule, "Leave it out, or pass cpu.") from None
    return device


def dtype_named(name: str) -> Any:
    """The dtype of torch with this name, or `"auto"`."""
    import torch

    from modeling_flextron.errors import invalid

    dtype = getattr(torch, name, None)
    if name != "auto" and not isinstance(dtype, torch.dtype):
        raise invalid("dtype", name, "It is no dtype of torch.", "Pass auto, float32, bfloat16 or float16.")
    return dtype or name


def local_folder(model: str) -> Path:
    """The folder of a model, downloaded with all its weights when it is not one already."""
    from huggingface_hub import snapshot_download

    from modeling_flextron.hub import retried

    from .models import reading

    if Path(model).is_dir():
        return Path(model)
    with reading("model", model):
        return Path(retried(lambda: snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])))


def must_be_a_model(folder: Path) -> None:
    """Refuse what is not the folder of a saved model."""
    from modeling_flextron.errors import invalid

    if not (folder / "config.json").is_file():
        rule = "It is not the folder of a saved model."
        raise invalid("folder", str(folder), rule, "Pass the output of `flextron convert` or `flextron train`.")


def different_folders(source: str, output: Path) -> None:
    """Refuse to write over what is read."""
    from modeling_flextron.errors import invalid

    if Path(source).exists() and output.exists() and output.samefile(source):
        raise invalid("output", str(output), "It is the folder that is read.", "Write to another folder.")


@app.command()
def convert(
    parent: Annotated[
        str, typer.Argument(help="Folder or Hub id of a trained model, or of an adapter.", show_default=False)
    ],
    output: Output,
    preset: Annotated[str | None, typer.Option(help=f"Defaults for the options below: {PRESETS}")] = None,
    calibration: Annotated[
        str | None, typer.Option(help=f"Text to rank with: {DATA} 'weights': none, rank by the norms of the weights.")
    ] = None,
    mlp: Annotated[str | None, typer.Option(help="Neurons, fractions or sizes; default: sixteenths.")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads; default: quarters.")] = None,
    hidden: Annotated[str | None, typer.Option(help="Residual channels; default: all, for GPT as heads.")] = None,
    depth: Annotated[str | None, typer.Option(help="Layers: 1,0.75; default: all.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Budgets of the frontier: 1,0.75,0.5,0.25")] = None,
    max_samples: Annotated[int | None, typer.Option(help="Calibration samples: 1024")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample: 512")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a forward pass: 8")] = None,
    order: Annotated[str | None, typer.Option(help="importance; random or reverse are controls.")] = None,
    search_evaluations: Annotated[
        int | None,
        typer.Option(help="Search each budget's row among networks whose layers differ, e.g. 200; default: 0."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the result; auto keeps the parent's.")] = "auto",
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Make a trained model elastic: LLaMA, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX and Pythia.

    Example: `flextron convert meta-llama/Llama-3.2-1B elastic --calibration ./text --mlp 1,0.75,0.5,0.25`

    With a preset: `flextron convert Qwen/Qwen3-0.6B elastic --calibration ./text --preset qwen3-0.6b`

    The importance scores stay in OUTPUT/importance.safetensors, so a second conversion with other sizes is quick.
    """
    from modeling_flextron.model_card import write_model_card

    from .convert import convert as run
    from .data import load_text, load_tokenizer
    from .models import read_config
    from .parents import place_of
    from .presets import load_preset

    different_folders(parent, output)
    options: dict[str, Any] = {}
    if preset is not None:
        chosen = load_preset(preset)
        chosen.check(read_config(place_of(parent, "config.json"), trust_remote_code=trust_remote_code))
        options |= chosen.convert
    given = {
        "mlp": numbers("mlp", mlp),
        "heads": numbers("heads", heads),
        "hidden": numbers("hidden", hidden),
        "depth": numbers("depth", depth),
        "budgets": None if budgets is None else [part.strip() for part in budgets.split(",")],
        "max_samples": max_samples,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "order": order,
        "search_evaluations": search_evaluations,
        "seed": seed,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    place = place_of(parent, "tokenizer_config.json")
    text = None if calibration in (None, "weights") else load_text(calibration)
    elastic = run(
        parent,
        calibration if text is None else text,
        tokenizer=None if text is None else load_tokenizer(place, trust_remote_code=trust_remote_code),
        importance=output / "importance.safetensors",
        device=device_or_default(device),
        dtype=dtype_named(dtype),
        trust_remote_code=trust_remote_code,
        **options,
    )
    elastic.save_pretrained(output)
    copy_tokenizer(place, output, trust_remote_code)
    write_model_card(elastic, output)
    finish(output=str(output), frontier=[row.to_dict() for row in elastic.frontier])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    model: Model,
    dataset: Annotated[str, typer.Argument(help=f"Training text: {DATA}", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the parent, or 'self'. None: learn from the text alone.")
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            help=f"Evaluation text; by default 2 % of the samples, of a stream the first {STREAMED_EVAL_ROWS}."
        ),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a training sample: 1024")] = None,
    document_boundaries: Boundaries = False,
    split: Annotated[str, typer.Option(help="Split of a training text on the Hub.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the training text while training; needs --max_steps.")
    ] = False,
    shuffle_buffer: Annotated[int, typer.Option(help="With --streaming: samples to draw the next one from.")] = 1000,
    num_proc: Annotated[int | None, typer.Option(help="Processes to tokenize with.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Defaults for all arguments: {PRESETS}")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last complete checkpoint.")] = False,
    plan: Annotated[bool, typer.Option(help="Print the memory that this would need, and stop.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train an elastic model at many sizes at once.

    Example: `flextron train elastic ./text --teacher meta-llama/Llama-3.2-1B --output_dir run --max_steps 1000 --bf16`

    Example: `flextron train run ./text --stage router --router_budgets 0.75 0.5 --output_dir routed --max_steps 400`

    Example: `flextron train elastic HuggingFaceFW/fineweb-edu --streaming --max_steps 1000 --output_dir run`

    Does it fit? `flextron train elastic ./text --teacher meta-llama/Llama-3.2-1B --output_dir run --plan`

    Takes every argument of `transformers.TrainingArguments` under its own name, and: `--sampler` (sandwich, uniform,
    weighted, random), `--subnetworks_per_step`, `--sampling_weights`, `--kd_weight`, `--ce_weight`, `--temperature`,
    `--loss_chunk_size`, `--no_float32_weights`. With `--stage router` or `--stage joint`: `--router_method` (surrogate,
    gumbel, token), `--router_budgets`, `--router_cost` (parameters, latency), `--router_uniform`,
    `--router_learning_rate`, `--latency_weight`. The trained model, its card and its plot end up in `--output_dir`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from modeling_flextron import FlextronConfig
    from modeling_flextron.errors import invalid
    from modeling_flextron.subnetwork import bytes_per_value

    from .arguments import ArgumentParser, FlextronTrainingArguments
    from .data import load_text, load_tokenizer, pack
    from .evaluation import name_of
    from .models import read_config
    from .plan import plan_memory
    from .presets import load_preset
    from .trainer import FlextronTrainer

    config = read_config(model, "model", FlextronConfig)
    recipe: dict[str, Any] = {}
    if preset is not None:
        chosen = load_preset(preset)
        chosen.check(config)
        given = (text.partition("=")[0] for text in context.args if text.startswith("--"))
        stage = next((b for a, b in pairwise(context.args) if a == "--stage"), "elastic")
        recipe = chosen.recipe(stage, {option[2:].replace("-", "_") for option in given})
        if not torch.cuda.is_available():
            recipe.pop("bf16", None)
    sequence_length = fitting_length(sequence_length or recipe.pop("sequence_length", None), config)
    recipe.pop("sequence_length", None)
    defaults = [text for name, value in recipe.items() for text in (f"--{name}", *words(value))]
    (arguments,) = ArgumentParser(FlextronTrainingArguments).parse_args_into_dataclasses(defaults + context.args)
    if plan:
        teacher_config, size = None, 0
        if teacher not in (None, "self"):
            teacher_config = read_config(teacher, "teacher", trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                stock = AutoModelForCausalLM.from_config(teacher_config, trust_remote_code=trust_remote_code)
            parameters = stock.num_parameters()
            size = parameters * bytes_per_value(config.dtype)
        expected = plan_memory(
            config, arguments, sequence_length, teacher=teacher_config, teacher_bytes=size, sharded=bool(arguments.fsdp)
        )
        print(expected, file=sys.stderr)
        return finish(gib=expected.gib())
    if streaming and arguments.max_steps <= 0:
        rule = "A stream does not say how long it is."
        raise invalid("max_steps", arguments.max_steps, rule, "Pass --max_steps, or leave out --streaming.")
    if streaming and num_proc is not None:
        rule = "A stream is tokenized as it is read, in the process that reads it."
        raise invalid("num_proc", num_proc, rule, "Leave it out, or pass --dataloader_num_workers 1.")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"num_proc": num_proc, "document_boundaries": document_boundaries}
    rows = pack(load_text(dataset, split, streaming), tokenizer, sequence_length, **options)
    if eval_dataset is not None:
        eval_text = name_of(eval_dataset)
        eval_rows = pack(load_text(eval_dataset), tokenizer, sequence_length, **options)
    elif streaming:
        eval_text = f"the first samples of {name_of(dataset)}, kept from training"
        eval_rows, rows = list(rows.take(STREAMED_EVAL_ROWS)), rows.skip(STREAMED_EVAL_ROWS)
        if next(iter(rows), None) is None:
            rule = f"Its first {len(eval_rows)} samples are for evaluation, and none is left to train on."
            raise invalid("dataset", dataset, rule, "Pass --eval-dataset, or leave out --streaming.")
    else:
        eval_text = f"2 % of {name_of(dataset)}, kept from training"
        parts = rows.train_test_split(test_size=max(1, len(rows) // 50), seed=arguments.data_seed or arguments.seed)
        rows, eval_rows = parts["train"], parts["test"]
    if streaming:
        rows = rows.shuffle(seed=arguments.data_seed or arguments.seed, buffer_size=shuffle_buffer)
    trainer = FlextronTrainer(
        model, arguments, teacher=teacher, trust_remote_code=trust_remote_code, train_dataset=rows,
        eval_dataset=eval_rows, eval_text=eval_text, processing_class=tokenizer,
    )  # fmt: skip
    if streaming:  # else it says so itself
        print(trainer.plan(sequence_length), file=sys.stderr)
    trainer.train(resume_from_checkpoint=resume or arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()
    finish(output=arguments.output_dir, **metrics)


@app.command()
def evaluate(
    model: Model,
    dataset: Annotated[str | None, typer.Argument(help=f"Held-out text: {DATA}", show_default=False)] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between; the text may be left out then.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, for --lm-eval.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Samples of each task, for a trial.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Measure this budget; repeatable. Default: all rows.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample: 1024")] = None,
    document_boundaries: Boundaries = False,
    max_samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 8,
    write: Annotated[
        bool, typer.Option(help="Write losses and scores into the frontier of the model's config, and its card.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against parameters into this PNG.")] = None,
    routing_report: Annotated[
        Path | None, typer.Option(help="Draw which tokens get more compute into this PNG; see --budget auto:0.5.")
    ] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure loss, perplexity and next-token accuracy of every size, and its scores on the tasks of lm-eval.

    Example: `flextron evaluate elastic ./held-out --write --plot frontier.png`

    Example: `flextron evaluate elastic --lm-eval arc_easy,hellaswag --write` (needs `pip install "lm-eval[hf]"`)

    Example: `flextron evaluate elastic ./held-out --budget auto:0.5 --routing-report tokens.png`
    """
    from modeling_flextron import count_parameters
    from modeling_flextron.checkpoint import write_config
    from modeling_flextron.errors import invalid
    from modeling_flextron.frontier import held
    from modeling_flextron.markdown import table_of_cells
    from modeling_flextron.model_card import metric_columns, plot_frontier, write_model_card

    from .data import load_text, load_tokenizer, pack
    from .evaluation import evaluate_frontier, evaluate_model, name_of, routed_widths
    from .harness import evaluate_tasks, task_manager
    from .models import load_elastic
    from .plots import plot_routing

    if dataset is None and lm_eval is None:
        raise invalid("dataset", dataset, "There is nothing to measure.", "Pass held-out text, --lm-eval, or both.")
    if write and budget:
        raise invalid("budget", budget, "`--write` writes a whole frontier.", "Leave out one of the two.")
    if write and not Path(model).is_dir():
        rule = "There is no such folder, and `--write` writes into one."
        raise invalid("model", model, rule, "Check the path, or download the model first.")
    if write and lm_eval_limit is not None:
        rule = "Scores of a part of a task cannot be compared with those of others."
        raise invalid("lm_eval_limit", lm_eval_limit, rule, "Leave out it or --write.")
    for name, path in (("plot", plot), ("routing_report", routing_report)):
        if path is not None and not path.parent.is_dir():
            raise invalid(name, str(path), "Its folder does not exist.", "Make the folder first.")
        if path is not None and dataset is None:
            raise invalid(name, str(path), "What it shows is measured on text.", "Pass the text, too.")
    tasks = [] if lm_eval is None else [name.strip() for name in lm_eval.split(",")]
    manager = task_manager(tasks, include_path) if tasks else None
    loaded = load_elastic(model).to(device_or_default(device))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    asked = {text: budget_value(text) for text in budget} if budget else None
    results: dict[str, dict[str, float]] = {}
    if dataset is not None:
        length = fitting_length(sequence_length, loaded.config)
        rows = pack(load_text(dataset), tokenizer, length, document_boundaries=document_boundaries)
        rows = rows.select(range(min(max_samples, len(rows))))
        if routing_report is not None:
            auto = next((text for text in budget or () if text.startswith("auto")), "auto")
            widths = routed_widths(loaded, rows[0], auto)
            tokens = [tokenizer.decode([token]) for token in rows[0]["input_ids"]]
            plot_routing(tokens, widths, routing_report, f"{model} at {auto}")
        if asked is None:
            results = evaluate_frontier(loaded, rows, batch_size, name_of(dataset))
        else:
            results = {text: evaluate_model(loaded, rows, batch_size, value) for text, value in asked.items()}
    if tasks:
        scores = evaluate_tasks(
            loaded, tokenizer, tasks, manager, budgets=asked, limit=lm_eval_limit, batch_size=batch_size
        )
        for name, found in scores.items():
            results[name] = results.get(name, {}) | found
    columns = metric_columns(list(results.values()))
    lines = zip(results, *columns.values(), strict=True)
    print(table_of_cells(["budget", *columns], list(lines)), file=sys.stderr)
    if write:
        write_config(loaded, model)
        write_model_card(loaded, model)
    if plot is not None:
        static = {name: result for name, result in results.items() if not name.startswith("auto")}
        meant = asked or held(loaded.frontier)
        sizes = {name: count_parameters(loaded.config, loaded.resolve_budget(meant[name])) for name in static}
        plot_frontier({model: [(sizes[name], result["loss"]) for name, result in static.items()]}, plot)
    finish(model=model, dataset=dataset, results=results)


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="Folder of a Flextron model.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens read and kept while one more is made; default: 512, if they fit.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each network is timed.")] = 15,
    dtype: Annotated[str, typer.Option(help="Dtype to measure in; auto is that of the weights.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    device: Device = None,
    seed: int = 0,
) -> None:
    """Time every choice of a model on this machine, so that `flextron_budget="25ms"` means something.

    Example: `flextron measure elastic --device cuda --dtype bfloat16`

    The table is written to FOLDER/latency/ and listed in FOLDER/config.json; those of other devices stay. Measured
    rounds are kept, and the same command goes on after a stop.
    """
    import torch

    from modeling_flextron import FlextronConfig
    from modeling_flextron.checkpoint import write_config
    from modeling_flextron.frontier import held
    from modeling_flextron.latency import FOLDER

    from .measuring.latency import measure_latency
    from .models import load_elastic

    must_be_a_model(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_elastic(folder, dtype=dtype_named(dtype)).to(device_or_default(device))
    progress = folder / FOLDER / ".rounds.json"
    table = measure_latency(model, batch=batch, context=context, rounds=rounds, seed=seed, progress=progress)
    table.save(folder / table.file_name)
    config = FlextronConfig.from_pretrained(folder)
    config.latency_tables[table.file_name] = table.summary
    write_config(model, folder, config)
    times = {name: table.predict(subnetwork) for name, subnetwork in held(model.frontier).items()}
    finish(
        table=str(folder / table.file_name),
        device=table.device,
        error={mode: {key: error[key] for key in ("median", "worst")} for mode, error in table.errors.items()},
        decode_ms={name: round(1e3 * seconds, 3) for name, seconds in times.items()},
    )


@app.command()
def bench(
    model: Model,
    budgets: Annotated[str | None, typer.Option(help="Budgets to measure: 1,0.5,0.25; default: all rows.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens read and kept while more are made; default: 512, if they fit.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at the same time.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="How often everything is timed.")] = 15,
    dtype: Annotated[str, typer.Option(help="Dtype to measure in; auto is that of the weights.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result into this file, too.")] = None,
) -> None:
    """Measure what elasticity costs here: time against stock models of the same size, speed and loading of every size.

    Example: `flextron bench elastic --budgets 1,0.5 --device cuda --dtype bfloat16`

    Compared are a sub-network of the whole family, a model loaded at the budget, and the stock model that `extract()`
    makes, with a second copy of it as a control: where that is far from 1, the machine was busy. Loading is measured in
    fresh processes, with the files dropped from the cache of the system. On a busy machine, use one thread.
    """
    import torch
    from rich.console import Console

    from modeling_flextron.checkpoint import write_file_beside
    from modeling_flextron.errors import invalid

    from .bench import bench as run
    from .bench import tables, warnings

    if json_file is not None and not json_file.parent.is_dir():
        raise invalid("json", str(json_file), "Its folder does not exist.", "Make the folder first.")
    if threads is not None:
        torch.set_num_threads(threads)
    sizes: Any = numbers("batch_sizes", batch_sizes)
    result = run(
        local_folder(model),
        budgets and [part.strip() for part in budgets.split(",")],
        context=context,
        batch_sizes=sizes,
        rounds=rounds,
        device=device_or_default(device),
        dtype=dtype_named(dtype),
    )
    result["model"] = model
    if json_file is not None:
        with write_file_beside(json_file) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console = Console(stderr=True)
    for table in tables(result):
        console.print(table)
    for sentence in warnings(result):
        console.print(sentence)
    finish(**result)


@app.command()
def export(
    model: Model,
    output: Output,
    budget: Budget = None,
    dense: Annotated[bool, typer.Option(help="Write a stock model of the parent's family.")] = False,
    pad: Annotated[bool, typer.Option(help="With --dense: zeros where the stock class needs larger sizes.")] = False,
    plain: Annotated[bool, typer.Option(help="Whole tensors instead of levels, for engines that read them.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    snap: Annotated[bool, typer.Option(help="With --dense: the largest size that fits it and costs no more.")] = False,
    gguf: Annotated[bool, typer.Option(help="Write a file for llama.cpp; layers may differ.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model in levels, so that whoever loads it at a budget reads only what that needs; or one size of it.

    Example: `flextron export elastic to-upload`

    Example: `flextron export elastic small --dense --budget 0.5`

    With `--budget` it holds nothing larger. With `--dense` the result is a stock checkpoint that needs no code of ours.
    Where the stock class cannot hold the sizes, such as different ones in every layer, `--pad` fills them up and
    `--snap` takes smaller ones. `--gguf` writes one file (LLaMA only). `--plain` is for vLLM with our own class.
    """
    from modeling_flextron.errors import invalid
    from modeling_flextron.model_card import write_model_card

    from .dense import export_dense
    from .gguf_file import export_gguf
    from .models import load_elastic

    different_folders(model, output)
    for name, value in (("pad", pad), ("snap", snap)):
        if value and not dense:
            rule = "It changes sizes for a stock class alone."
            raise invalid(name, value, rule, "Pass --dense as well, or leave it out.")
    if dense and gguf:
        raise invalid("gguf", gguf, "One is a folder and the other a file.", "Pass --dense or --gguf.")
    asked: Any = {"budget": budget_value(budget), "trust_remote_code": trust_remote_code}
    if dense:
        result = export_dense(model, output, **asked, pad=pad, snap=snap)
        if result["changed"]:
            print(f"The stock class cannot hold what was asked for: {result['changed']}.", file=sys.stderr)
        finish(output=str(output), dense=True, **result)
        return
    if gguf:
        finish(output=str(output), **export_gguf(model, output, **asked))
        return
    loaded = load_elastic(model, flextron_budget=budget_value(budget))
    write = loaded.save_pretrained if plain else loaded.export
    write(output, max_shard_size=max_shard_size)
    copy_tokenizer(model, output, trust_remote_code)
    write_model_card(loaded, output)
    finish(output=str(output), parameters=loaded.num_parameters(), dense=False)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model in levels.", show_default=False)],
) -> None:
    """Check every file of a model in levels: sizes, hashes, and that its blocks make up every tensor of every size.

    Example: `flextron verify me/flextron-llama`
    """
    from .verify import verify as run

    finish(model=model, **run(local_folder(model)))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub, user/name.", show_default=False)],
    private: Annotated[bool | None, typer.Option(help="Create the repo as private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created when it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag for the card; repeatable.")] = None,
    token: Annotated[str | None, typer.Option(help="By default the one of `hf auth login`.", envvar="HF_TOKEN")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Upload a saved model with its tokenizer to the Hub, in one commit; its card is written anew.

    Example: `flextron push elastic me/flextron-llama --private`
    """
    from modeling_flextron import FlextronConfig

    from .data import load_tokenizer
    from .models import kind_of, load_elastic

    must_be_a_model(folder)
    model = load_elastic(folder, kind_of(FlextronConfig.from_pretrained(folder)))
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        tokenizer = None
        print(f"No tokenizer is pushed: {error}", file=sys.stderr)
    commit = model.push_to_hub(
        repo_id, tokenizer=tokenizer, private=private, revision=revision, create_pr=create_pr, token=token, tags=tag,
        commit_message=commit_message,
    )  # fmt: skip
    finish(repo=commit.repo_url.repo_id, commit=commit.oid, pull_request=commit.pr_url)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most likely token.")] = False,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text at a budget.

    Example: `flextron generate elastic "def main():" --budget 0.5`
    """
    from transformers import set_seed

    from modeling_flextron.errors import invalid

    from .data import load_tokenizer
    from .models import load_elastic

    set_seed(seed)
    loaded = load_elastic(model, flextron_budget=budget_value(budget)).to(device_or_default(device))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise invalid("prompt", prompt, "It has no tokens to continue.", "Write at least a word.")
    ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample)
    finish(budget=budget, parameters=loaded.num_parameters(), text=tokenizer.decode(ids[0], skip_special_tokens=True))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("flextron-demo"),
    dataset: Annotated[str, typer.Option(help=f"Text: {DATA}")] = "stdlib",
    parent: Annotated[str | None, typer.Option(help="Hub id or folder of a trained model; default: train one.")] = None,
    parent_steps: Annotated[int, typer.Option(help="Training steps of the parent.")] = 600,
    elastic_steps: Annotated[int, typer.Option(help="Steps of elastic training.")] = 200,
    device: Device = None,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Train a small LLaMA, make it elastic, train it at every size, and load the result without this package.

    Example: `flextron demo --device cuda --parent meta-llama/Llama-3.2-1B --dataset ./text`
    """
    from .demo import run

    result = run(
        output, dataset=dataset, parent=parent, device=device, parent_steps=parent_steps, elastic_steps=elastic_steps,
        seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    finish(**result)


def in_one_line(error: Exception) -> str:
    """What an error says; of one that no one wrote for users also its kind, and how to see where it comes from."""
    text = " ".join(str(error).split())
    if text and isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (`--traceback` shows where it comes from.)"


def main() -> None:
    """Run the command; whatever goes wrong is one line and exit code 2, or a traceback where that is asked for."""
    arguments = [text for text in sys.argv[1:] if text != "--traceback"]
    try:
        app(arguments)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        else:
            print(f"Error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
