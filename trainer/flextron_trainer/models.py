"""Models from folders and the Hub: whole, or refused; and no code but what is installed, unless a user asks for it."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, cached_file

import modeling_flextron
from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronPreTrainedModel
from modeling_flextron.errors import invalid

from .files import write_file_beside
from .hub import retried


def load_elastic(source: str | os.PathLike, kind: type = FlextronForCausalLM, **kwargs: Any) -> Any:
    """A Flextron model, of a class of this package: the code that lies beside the weights is not run.

    Args:
        source: Its folder or Hub id.
        kwargs: As of `from_pretrained`, such as `flextron_budget` and `dtype`.

    Raises:
        ValueError: tensors are missing, too many or of other shapes, or a file says what no model's file says.
        OSError: a file is missing or damaged.
    """
    return _whole(kind, "model", source, "Save or download it again.", kwargs)


def load_stock(
    source: str | os.PathLike, argument: str = "parent", *, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model of any kind.

    Args:
        source: Its folder or Hub id.
        argument: What the user calls it, for errors.
        trust_remote_code: Run the code that its files name, where they name some.
        kwargs: As of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError, OSError: as `load_elastic`; or its class is not installed, and its own code may not be run.
    """
    remedy = "Use a complete checkpoint of a causal language model."
    return _whole(AutoModelForCausalLM, argument, source, remedy, {**kwargs, "trust_remote_code": trust_remote_code})


def kind_of(config: FlextronConfig) -> type[FlextronPreTrainedModel]:
    """The class of this package that the weights beside a config are of.

    Raises:
        ValueError: it names none.
    """
    names = config.architectures or ["FlextronForCausalLM"]
    kind = getattr(modeling_flextron, str(names[0]), None) if isinstance(names, list) else None
    if not (isinstance(kind, type) and issubclass(kind, FlextronPreTrainedModel)):
        rule = "It names the class of the model, which is one of this package."
        raise invalid("architectures", names, rule, "Save the model again with `save_pretrained`.")
    return kind


def read_config(
    source: str | os.PathLike,
    argument: str = "parent",
    kind: Any = AutoConfig,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """The config alone of a model, of any kind or of the class `kind`; the rest as for `load_stock`."""
    kwargs |= {"return_unused_kwargs": True, "trust_remote_code": trust_remote_code}
    with reading(argument, source):
        config, _ = retried(lambda: kind.from_pretrained(source, **kwargs))
    return config


def file_of(source: str | os.PathLike, name: str, **hub: Any) -> str | None:
    """The path of a file of a folder or Hub id; None where there is none, or it cannot be had."""
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(os.fspath(source), name, **hub, **quiet)


@contextmanager
def reading(argument: str, source: str | os.PathLike) -> Iterator[None]:
    """Let no error of a library about the files in `source` out that does not name it.

    Raises:
        ValueError: it is a path where nothing is, or a file, or what is there says what no file of a model says.
        OSError: a file is missing or damaged, or the Hub does not give it.
    """
    name = str(source)
    if os.path.isfile(name):
        raise invalid(argument, name, "It is a file, and a model is a folder.", "Pass the folder that holds it.")
    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        remedy = f"Check the path{_near(name)}, or pass the id of a repo on the Hub."
        raise invalid(argument, name, "There is no such folder.", remedy)
    try:
        yield
    except ValueError:
        raise
    except OSError as error:
        if not os.path.exists(name):
            rule = f"There is no such folder, and it cannot be read from the Hub either: {str(error).rstrip('.')}."
            raise OSError(str(invalid(argument, name, rule, f"Check the path or the id{_near(name)}."))) from error
        if name in str(error):
            raise
        raise OSError(f"{name}: {error}") from error
    except Exception as error:  # every library has its own kinds
        rule = f"Reading it ended in {type(error).__name__}: {error}."
        remedy = (
            "If a file is damaged, save or download it again; `flextron verify` looks at all of a checkpoint in levels."
        )
        raise invalid(argument, name, rule, remedy) from error


def _near(path: str) -> str:
    """Name the folder that someone may have meant by a path where nothing is."""
    folder, name = os.path.split(os.path.expanduser(path).rstrip("/"))
    try:
        there = [entry.name for entry in os.scandir(folder or ".") if entry.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(name, there, n=1)
    return f" (did you mean {os.path.join(folder, found[0])!r}?)" if found else ""


def _whole(kind: Any, argument: str, source: str | os.PathLike, remedy: str, kwargs: dict[str, Any]) -> Any:
    """A model by `from_pretrained`, if its files hold every tensor that it has, in its shape, and no others."""
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(argument, source):
        model, found = retried(lambda: kind.from_pretrained(source, **{**kwargs, **reported}))
    for problem in ("missing", "unexpected", "mismatched"):
        refuse_tensors(argument, source, problem, found[f"{problem}_keys"], remedy)
    return model


def check_files(argument: str, folder: str | os.PathLike, model: Any) -> None:
    """Refuse the weights in a folder, such as a checkpoint of a run, that are not those of a model."""
    held: set[str] = set()
    with reading(argument, folder):
        for path in Path(folder).glob("model*.safetensors"):
            with safe_open(path, framework="pt") as tensors:
                held.update(tensors.keys())
    if held:  # else there is nothing that could be read, or something else
        own, remedy = set(model.state_dict()), "Go on from another checkpoint."
        refuse_tensors(argument, folder, "missing", own - held - set(model.all_tied_weights_keys), remedy)
        refuse_tensors(argument, folder, "unexpected", held - own, remedy)


def refuse_tensors(argument: str, source: str | os.PathLike, problem: str, names: Iterable[Any], remedy: str) -> None:
    """Refuse files in which some tensors are missing, unexpected or mismatched."""
    found = sorted(str(name) for name in names if not str(name).endswith(".masked_bias"))  # of old GPT-2
    if found:
        rule = f"Its checkpoint has {problem} tensors: {', '.join(found[:3])}."
        raise invalid(argument, str(source), rule, remedy)


def write_config(model: Any, folder: str | os.PathLike, config: Any = None) -> None:
    """Write a config into the folder of a saved model, with the code that reads it; the weights stay.

    Args:
        model: Whose code it is.
        folder: Of the model.
        config: By default that of the model.
    """
    custom_object_save(model, folder)
    with write_file_beside(Path(folder) / CONFIG_NAME) as path:
        (config or model.config).to_json_file(path)
