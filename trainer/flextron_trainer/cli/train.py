"""`flextron train`."""

import sys
from dataclasses import fields
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    PRESETS,
    AssistantOnly,
    Boundaries,
    Model,
    Trust,
    as_datasets,
    command,
    fitting_length,
    local_folder,
    packed,
    parse_numbers,
    print_result,
)
from .refusals import invalid
from .verbs import refuse_unknown, write_options

STREAMED_EVAL_ROWS = 64
OPERATIONS_PER_HOUR = 3600 * 100e12  # at 100 TFLOP/s: what other devices do is a factor away


def train(
    context: typer.Context,
    model: Model,
    dataset: Annotated[str | None, typer.Argument(help=f"Training text: {DATA}", show_default=False)] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="More of it, to be mixed; repeatable.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Shares of the datasets, in samples: 0.5,0.5; default: equal ones.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the parent, a cache of `teach`, or 'self'. None: learn from the text."),
    ] = None,
    eval_dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation text, repeatable; by default 2 % of the samples of every dataset, of a stream the first"
            f" {STREAMED_EVAL_ROWS}."
        ),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a training sample: 1024")] = None,
    document_boundaries: Boundaries = None,
    assistant_only: AssistantOnly = None,
    split: Annotated[str, typer.Option(help="Split of a training text on the Hub.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the training text while training; needs --max_steps.")
    ] = False,
    shuffle_buffer: Annotated[int, typer.Option(help="With --streaming: samples to draw the next one from.")] = 1000,
    num_proc: Annotated[int | None, typer.Option(help="Processes to tokenize with.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Defaults for all arguments: {PRESETS}")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last complete checkpoint.")] = False,
    steps: Annotated[
        str | None,
        typer.Option(help="A number as --max_steps; auto: one pass over the text, and says what tokens may buy."),
    ] = None,
    plan: Annotated[
        bool, typer.Option(help="Print the memory that this would need and what tokens may buy, and stop.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train an elastic model at many sizes at once.

    Example: `flextron train elastic ./text --teacher meta-llama/Llama-3.2-1B --output_dir run --max_steps 1000 --bf16`

    Example: `flextron train run ./text --stage router --router_budgets 0.75 0.5 --output_dir routed --max_steps 400`

    Example: `flextron train elastic ./text --stage blocks --output_dir start --max_steps 200 --learning_rate 1e-3`

    Example: `flextron train elastic HuggingFaceFW/fineweb-edu --streaming --max_steps 1000 --output_dir run`

    Example: `flextron teach meta-llama/Llama-3.2-1B ./text cache`, then `train` with `--teacher cache`

    Example: `flextron train elastic ./text --dataset chats.jsonl --weights 0.5,0.5 --output_dir run --max_steps 1000`

    Does it fit? `flextron train elastic ./text --teacher meta-llama/Llama-3.2-1B --output_dir run --plan`

    Conversations are read through the tokenizer's chat template, and their answers are learned.

    Takes every argument of `transformers.TrainingArguments` under its own name, and: `--sampler` (sandwich, uniform,
    weighted, random), `--subnetworks_per_step`, `--sampling_weights`, `--kd_weight`, `--ce_weight`, `--temperature`,
    `--loss_chunk_size`, `--no_float32_weights`. With `--stage blocks`, which has one layer in memory at a time and
    comes before the others: `--block_parameters` (all, corrections), `--block_inputs` (own, parent); `--max_steps` are
    those of each layer. With `--stage router` or `--stage joint`: `--router_method` (surrogate, gumbel, token),
    `--router_budgets`, `--router_cost` (parameters, latency), `--router_uniform`, `--router_learning_rate`,
    `--latency_weight`. The trained model, its card and its plot end up in `--output_dir`.
    """
    from modeling_flextron import FlextronConfig

    from ..data import collator, load_tokenizer, mixed
    from ..models import read_config
    from ..publishing.card import write_model_card
    from ..training.arguments import ArgumentParser, FlextronTrainingArguments
    from ..training.block_stage import train_folder
    from ..training.trainer import FlextronTrainer

    (model, dataset), given = places_and_options(context)
    sources = [source for source in (dataset, *(datasets or ())) if source is not None]
    if not sources:
        raise invalid("dataset", dataset, "There is nothing to learn from.", "Pass text or conversations.")
    config = read_config(model, "model", FlextronConfig)
    settings = {name: value for name, value in (context.default_map or {}).items() if name not in context.params}
    refuse_unknown(settings, [*context.params, *(entry.name for entry in fields(FlextronTrainingArguments))])
    recipe = {} if preset is None else recipe_of(preset, config, settings, given)
    sequence_length = fitting_length(sequence_length or recipe.get("sequence_length"), config)
    recipe.pop("sequence_length", None)
    parser = ArgumentParser(FlextronTrainingArguments)
    parser.set_defaults(**as_defaults(recipe | settings))
    (arguments,) = parser.parse_args_into_dataclasses(given)
    if steps is not None:
        set_steps(arguments, steps)
    named_output = "output_dir" in settings or any(text.replace("_", "-").startswith("--output-dir") for text in given)
    if not plan and not named_output:
        rule = "The trained model is written there."
        raise invalid("output_dir", None, rule, "Pass for instance --output_dir run.")
    if plan:
        expected = planned(config, arguments, sequence_length, teacher, trust_remote_code)
        print(expected, file=sys.stderr)
        compute = planned_compute(config, arguments, sequence_length, teacher)
        return print_result("the same command without --plan", gib=expected.gib(), **compute)
    if steps == "auto" and arguments.stage == "elastic":
        print(bought(config), file=sys.stderr)
    if streaming and arguments.max_steps <= 0:
        rule = "A stream does not say how long it is."
        raise invalid("max_steps", arguments.max_steps, rule, "Pass --max_steps, or leave out --streaming.")
    if streaming and num_proc is not None:
        rule = "A stream is tokenized as it is read, in the process that reads it."
        raise invalid("num_proc", num_proc, rule, "Leave it out, or pass --dataloader_num_workers 1.")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    shares = parse_numbers("weights", weights)
    how: dict[str, Any] = {"assistant_only": assistant_only, "num_proc": num_proc}
    named = packed(
        sources, tokenizer, sequence_length, document_boundaries=document_boundaries, split=split, streaming=streaming,
        **how,
    )  # fmt: skip
    if arguments.process_index == 0:
        own = {**context.params, "model": model, "dataset": dataset, "sequence_length": sequence_length}
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_options(folder, "train", own | plain_arguments(arguments))
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    if arguments.stage == "blocks":
        if arguments.resume_from_checkpoint is not None:
            rule = "Stage 'blocks' goes on from its output folder."
            raise invalid("resume_from_checkpoint", arguments.resume_from_checkpoint, rule, "Pass --resume.")
        if assistant_only:
            rule = "Stage 'blocks' compares the states of all tokens, also of questions, which answers are read from."
            raise invalid("assistant_only", assistant_only, rule, "Leave it out.")
        rows = mixed(list(named.values()), shares, seed)
        if streaming:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        options: dict[str, Any] = {"resume": resume, "teacher": teacher, "eval_dataset": eval_dataset or None}
        trained, kept, errors = train_folder(local_folder(model), arguments, rows, collator(tokenizer), **options)
        tokenizer.save_pretrained(arguments.output_dir)
        write_model_card(trained, arguments.output_dir)
        kept.remove()
        same = as_datasets(sources)
        then = command("train", arguments.output_dir, *same, "--output-dir", "trained", "--max-steps", 1000)
        return print_result(then, output=arguments.output_dir, **errors)
    eval_sets: dict[str, Any] = {}
    for source in eval_dataset or ():
        eval_sets |= packed([source], tokenizer, sequence_length, document_boundaries=document_boundaries, **how)
    if not eval_sets:
        for name, rows in named.items():
            named[name], kept_rows, label = held_out(rows, name, streaming, seed)
            eval_sets[label] = kept_rows
    rows = mixed(list(named.values()), shares, seed)
    if streaming:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    eval_text, eval_rows = next(iter(eval_sets.items()))
    if len(eval_sets) > 1:
        eval_rows = eval_sets
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
    held = as_datasets(eval_dataset or ["./held-out"])
    then = command("evaluate", arguments.output_dir, *held, "--write", "--plot", "frontier.png")
    print_result(then, output=arguments.output_dir, **metrics)


def places_and_options(context: typer.Context) -> tuple[list[Any], list[str]]:
    """Model, dataset (or None) and the options that are not the verb's own, of the command line or of `--config`.

    What stands first on the command line is taken for the model, also an option that is not the verb's own.

    Raises:
        ValueError: there is no model.
    """
    names = "model", "dataset"
    kept = {"dataset": None, **(context.default_map or {})}
    typed = [name for name in names if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"]
    words = [context.params[name] for name in typed] + context.args
    first = list(takewhile(lambda word: not word.startswith("--"), words))[: len(names)]
    places = {**kept, **dict(zip(names, first, strict=False))}
    if "model" not in places:
        raise invalid("model", None, "It is missing.", "Write `flextron train MODEL DATASET`, options behind them.")
    return [places[name] for name in names], words[len(first) :]


def recipe_of(preset: str, config: Any, settings: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """The arguments of a preset for the stage that is trained, without those of `settings` and those `given`."""
    import torch

    from ..presets import load_preset

    chosen = load_preset(preset)
    chosen.check(config)
    stage = next((value for name, value in pairwise(given) if name == "--stage"), settings.get("stage", "elastic"))
    names = (text.partition("=")[0] for text in given if text.startswith("--"))
    recipe = chosen.recipe(stage, {*settings, *(name[2:].replace("-", "_") for name in names)})
    if not torch.cuda.is_available():
        recipe.pop("bf16", None)
    return recipe


def as_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Values as defaults of a parser, which reads text as it does that of the command line: `1e-3` of YAML is text."""
    plain = bool, list, dict
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


def plain_arguments(arguments: Any) -> dict[str, Any]:
    """The training arguments that a YAML file can hold, without tokens, and without what a machine lacks."""
    unkept = ("_token", "use_cpu")
    kept = [entry.name for entry in fields(arguments) if entry.init and not entry.name.endswith(unkept)]
    values = {name: getattr(arguments, name) for name in kept}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # of an enumeration
    return {name: value for name, value in values.items() if isinstance(value, (str, int, float, list, dict))}


def set_steps(arguments: Any, steps: str) -> None:
    """Train for so many optimizer steps, or with `auto` for one pass over the text.

    Raises:
        ValueError: not a number of steps, or another number was given as well.
    """
    if steps != "auto" and not (steps.isdecimal() and int(steps)):
        raise invalid("steps", steps, "It is a number of optimizer steps, or auto.", "Pass for instance 1000.")
    wanted = -1 if steps == "auto" else int(steps)
    if arguments.max_steps not in (-1, wanted):
        raise invalid("steps", steps, f"max_steps says {arguments.max_steps}.", "Leave out one of them.")
    arguments.max_steps = wanted
    if steps == "auto":
        arguments.num_train_epochs = 1.0


def bought(config: Any) -> str:
    """What tokens bought on the measured parent that is nearest in size."""
    from modeling_flextron.subnetwork import count_parameters

    from ..training.expectations import nearest

    return nearest(count_parameters(config, config.built)).text()


def planned(config: Any, arguments: Any, sequence_length: int, teacher: str | None, trust_remote_code: bool) -> Any:
    """Estimate the memory that a run would need; the weights of its teacher are counted without loading them."""
    import torch
    from transformers import AutoModelForCausalLM

    from modeling_flextron.subnetwork import bytes_per_value

    from ..models import read_config
    from ..training.plan import plan_memory
    from ..training.teacher_cache import is_cache

    teacher_config, teacher_bytes = None, 0
    if teacher not in (None, "self") and not is_cache(teacher):
        teacher_config = read_config(teacher, "teacher", trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            stock = AutoModelForCausalLM.from_config(teacher_config, trust_remote_code=trust_remote_code)
        teacher_bytes = stock.num_parameters() * bytes_per_value(config.dtype)
    sharded = bool(arguments.fsdp)
    return plan_memory(
        config, arguments, sequence_length, teacher=teacher_config, teacher_bytes=teacher_bytes, sharded=sharded
    )


def planned_compute(config: Any, arguments: Any, sequence_length: int, teacher: str | None) -> dict[str, float]:
    """Say how much a run of stage `elastic` computes; nothing of other stages."""
    from ..training.plan import plan_operations
    from ..training.teacher_cache import is_cache

    if arguments.stage != "elastic":
        return {}
    runs = teacher not in (None, "self") and not is_cache(teacher)
    step = plan_operations(config, arguments, sequence_length, runs)
    steps = max(0, arguments.max_steps)
    text = f"A step takes {step:.2g} floating-point operations"
    if steps:
        hours = step * steps / OPERATIONS_PER_HOUR
        text += f", {steps} steps {step * steps:.2g}: {hours:.2g} hours at 100 TFLOP/s"
    print(f"{text}.\n{bought(config)}", file=sys.stderr)
    return {"operations_per_step": step, "steps": steps}


def held_out(rows: Any, dataset: str, streaming: bool, seed: int) -> tuple[Any, Any, str]:
    """Keep samples from training to evaluate on: 2 %, or of a stream the first ones.

    Returns:
        The samples for training, those for evaluation, and what a card calls these.

    Raises:
        ValueError: there are no samples beside those for evaluation.
    """
    if not streaming:
        if len(rows) < 2:
            rule = "It is one sample, of which none can be kept from training to evaluate on."
            raise invalid("dataset", dataset, rule, "Pass more of it, a smaller --sequence-length, or --eval-dataset.")
        parts = rows.train_test_split(test_size=max(1, len(rows) // 50), seed=seed)
        return parts["train"], parts["test"], f"2 % of {dataset}, kept from training"
    first, rest = list(rows.take(STREAMED_EVAL_ROWS)), rows.skip(STREAMED_EVAL_ROWS)
    if next(iter(rest), None) is None:
        rule = f"Its first {len(first)} samples are for evaluation, and none is left to train on."
        raise invalid("dataset", dataset, rule, "Pass --eval-dataset, or leave out --streaming.")
    return rest, first, f"the first samples of {dataset}, kept from training"
