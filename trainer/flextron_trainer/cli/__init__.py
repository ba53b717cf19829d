"""The `flextron` command: a thin layer over the Python API. Every verb ends with `print_result`.

A verb is a module, which imports what it works with when it runs: `--help` needs neither torch nor transformers.
"""

import importlib.metadata
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from . import (
    answers,
    bench,
    convert,
    demo,
    evaluate,
    export,
    generate,
    measure,
    push,
    sizes,
    teach,
    train,
    transplant,
    ui,
    verify,
)
from .verbs import verb


def with_hyphens(name: str) -> str:
    """The name of an option as it is looked up: `--max_steps` is `--max-steps`."""
    return name.replace("_", "-")


app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": with_hyphens},
)  # fmt: skip
app.command()(verb(convert.convert))
# Whatever else it is given are arguments of `transformers.TrainingArguments`.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(verb(train.train))
for function in (
    teach.teach, answers.answers, evaluate.evaluate, sizes.sizes, measure.measure, bench.bench, export.export,
    verify.verify, push.push, generate.generate, transplant.transplant, demo.demo, ui.ui,
):  # fmt: skip
    app.command()(verb(function))


def print_version(asked: bool) -> None:
    """Print the version of the installed package and stop, where that is asked for."""
    if asked:
        print(importlib.metadata.version("flextron"))
        raise typer.Exit


@app.callback()
def flextron(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Make a trained LLaMA or GPT elastic, train it at many sizes at once, and use any of them.

    Example: `flextron convert meta-llama/Llama-3.2-1B elastic --calibration ./text`, and `flextron convert --help`

    Results are tables; with `--json` one line of JSON. Options may be written with hyphens or with underscores.

    Whatever goes wrong is one line and exit code 2; `--traceback`, anywhere, shows all of it.
    """


def in_one_line(error: Exception) -> str:
    """Tell an error; of one that no one wrote for users also its kind, and how to see where it comes from."""
    text = " ".join(str(error).split())
    if text and isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (`--traceback` shows where it comes from.)"


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show what a warning says, without the line of code that gave it."""
    print(f"Warning: {' '.join(str(message).split())}", file=sys.stderr)


def main() -> None:
    """Run the command; whatever goes wrong is one line and exit code 2, or a traceback where that is asked for."""
    arguments = [text for text in sys.argv[1:] if text != "--traceback"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            app(arguments)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        else:
            print(f"Error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
