"""What every verb of the command takes beside its own options."""

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from .options import json_output

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON, and nothing else, on stdout.")
]
COMMON = (inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take `--json`: what it and its libraries print otherwise goes to stderr then."""

    @functools.wraps(function)
    def run(*, as_json: bool, **given: Any) -> None:
        if not as_json:
            return function(**given)
        before = json_output.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                function(**given)
        finally:
            json_output.reset(before)

    own = inspect.signature(function)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *COMMON])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, **{one.name: one.annotation for one in COMMON}}
    return run
