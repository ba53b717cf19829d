"""What every verb of the command takes beside its own options."""

import difflib
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import json_output
from .refusals import invalid

# Of one call, not of what it does.
NOT_KEPT = ("config", "as_json", "preset", "plan", "resume")
OURS = re.compile(r"# flextron \w+ --config .*run\.yaml\n")  # begins a file that we may replace


def read_options(context: typer.Context, path: Path | None) -> None:
    """Read options from a YAML file, which count where the command line does not name them.

    Those that are no options of the verb itself, where it takes others, are left in `context.default_map`.

    Raises:
        ValueError: there is no such file, or it is no mapping of options.
    """
    if path is None:
        return
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        rule = f"It cannot be read as YAML: {error}."
        raise invalid("config", str(path), rule, "Write for instance `max_steps: 100`.") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise invalid("config", str(path), "It names no options.", "Write for instance `max_steps: 100`.")
    values = {name.lstrip("-").replace("-", "_"): value for name, value in found.items() if value is not None}
    own = {parameter.name: parameter for parameter in context.command.params if parameter.name not in NOT_KEPT[:2]}
    if not context.allow_extra_args:
        refuse_unknown(values, own)
    context.default_map = {
        name: as_typed(value, getattr(own[name], "multiple", False)) if name in own else value
        for name, value in values.items()
    }


def as_typed(value: Any, multiple: bool) -> Any:
    """A value of a YAML file as an option would have it from the command line."""
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) and not multiple else value


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that a verb does not have, with the ones that look most alike."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            remedy = f"Did you mean {' or '.join(near)}?" if near else "`--help` lists the options."
            raise invalid("config", name, "There is no such option.", remedy)


def write_options(place: Path, verb: str, options: dict[str, Any]) -> None:
    """Write the options of a call beside what it wrote, so that `--config` repeats it; no file of others is replaced.

    Args:
        place: A folder, which gets a `run.yaml`; of a file NAME it is `.NAME.run.yaml`, hidden because its folder may
            be one of data.
        verb: The name of the verb.
        options: Name -> value; what is None or of this one call is left out.
    """
    import yaml

    from ..files import write_file_beside

    file = place / "run.yaml" if place.is_dir() else place.with_name(f".{place.name}.run.yaml")
    if file.exists() and not OURS.match(file.read_text(encoding="utf-8", errors="replace")):
        print(f"{file} stays as it is, because no call of this command wrote it.", file=sys.stderr)
        return
    kept = {name: value for name, value in options.items() if value is not None and name not in NOT_KEPT}
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
    text = yaml.safe_dump(kept, allow_unicode=True)
    with write_file_beside(file) as path:
        path.write_text(f"# flextron {verb} --config {file.name}\n{text}", encoding="utf-8")


Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=read_options, help="YAML file with values of these options."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON, and nothing else, on stdout.")
]
COMMON = (
    inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config),
    inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
)


def verb(function: Callable[..., dict[Path, dict[str, Any]] | None]) -> Callable[..., None]:
    """Let a verb take `--config` and `--json`, and keep its options beside what it wrote.

    Args:
        function: The verb. It returns the places that it wrote, each with the options that it chose itself. With
            `--json` what it and its libraries print goes to stderr.
    """

    @functools.wraps(function)
    def run(*, config: Path | None, as_json: bool, **given: Any) -> None:
        before = json_output.set(sys.stdout if as_json else None)
        try:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                written = function(**given) or {}
        finally:
            json_output.reset(before)
        for place, chosen in written.items():
            write_options(place, function.__name__, given | chosen)

    own = inspect.signature(function)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *COMMON])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, **{one.name: one.annotation for one in COMMON}}
    return run
