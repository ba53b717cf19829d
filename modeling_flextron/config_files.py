"""The `config.json` of a model: how it is read, written and told from that of another version."""

import hashlib
import json
import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from .errors import invalid
from .frontier import plain_rows
from .latency import copy_tables
from .reshaping import MADE_FOR_CHOICES, nothing_made

logger = logging.get_logger(__name__)
WHERE = ("revision", "subfolder", "cache_dir", "local_files_only")  # of a repo its files are; tokens are not kept
VERSION = "0.2.0"  # of this code, wherever it runs from; the package has the same
AUTO_MAP = {
    "AutoConfig": "configuration_flextron.FlextronConfig",
    "AutoModel": "modeling_flextron.FlextronModel",
    "AutoModelForCausalLM": "modeling_flextron.FlextronForCausalLM",
    "AutoModelForSequenceClassification": "modeling_flextron.FlextronForSequenceClassification",
}


def where_in_repo(keywords: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of a load those that say where in a repo its files are."""
    return {name: keywords[name] for name in WHERE if keywords.get(name)}


def _digest(values: dict[str, Any]) -> str:
    written = {name: value for name, value in values.items() if name not in ("_name_or_path", "_read_at")}
    return hashlib.sha256(json.dumps(written, sort_keys=True, default=str).encode()).hexdigest()


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


class StoredConfig(PreTrainedConfig):
    """Reads and writes the file of a `FlextronConfig`.

    `_read_from` is a digest of the file that a config is, until it is saved itself; `_read_at` says where in its repo
    the files beside it are.
    """

    flextron_version: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Read a config, which knows where it was read, as one of `AutoConfig` does."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Read the file; a folder without one is refused, of which the base class would make a default model."""
        remedy = "Download or write it again; `flextron convert` and `flextron train` write whole folders."
        try:
            found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError, LookupError, RecursionError) as error:
            rule = f"Its {CONFIG_NAME} is none of a model ({type(error).__name__}: {error})."
            raise invalid("config", str(pretrained_model_name_or_path), rule, remedy) from error
        if "model_type" not in found:
            rule = f"There is no {CONFIG_NAME}, or it names no `model_type`."
            raise invalid("config", str(pretrained_model_name_or_path), rule, remedy)
        return {**found, "_name_or_path": str(pretrained_model_name_or_path), "_read_at": where_in_repo(kwargs)}, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Make a config of what was read, with our own keywords handed to the constructor.

        The base class sets keywords only after construction, where no check would see them.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            # The base class would go on: with query heads in the order of another architecture.
            raise invalid("model_type", kind, "It is no Flextron model.", "Make it one with `flextron convert`.")
        inherited = PreTrainedConfig.__dataclass_fields__
        names = [name for name in (*cls.__dataclass_fields__, "per_layer_config") if name not in inherited]
        ours: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        values = config_dict | ours
        at = values.pop("_read_at", None)
        if values.get("elastic") != config_dict.get("elastic"):
            logger.warning(f"Made for other choices, and dropped unless given: {', '.join(MADE_FOR_CHOICES)}.")
            values |= nothing_made(config_dict.get("levels")) | ours
        try:
            result = super().from_dict(values, **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config._read_from, config._read_at = _digest(config_dict), at
            config.validate()  # with the other keywords, set by now
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            # The base class reads its own fields without a look at their types.
            rule = f"One of its fields has an impossible value ({type(error).__name__}: {error})."
            raise invalid("config", config_dict.get("_name_or_path"), rule, "Download or write it again.") from error
        config._say_which_code_runs()
        return result

    def check_still_there(self, source: str, subfolder: str) -> None:
        """Refuse a folder whose `config.json` was written again since this config was read from it."""
        if self._read_from is None or source != self.name_or_path or not os.path.isdir(source):
            return
        if _digest(PreTrainedConfig.get_config_dict(source, subfolder=subfolder)[0]) != self._read_from:
            rule = "The `config.json` of this folder was written again after the config was read."
            raise invalid("config", source, rule, "Try again; a config that is passed as an object must be read again.")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write the file, and beside it the latency tables that the config lists."""
        copy_tables(self, save_directory)
        self.flextron_version = VERSION  # this code is what a model saves
        self._read_from = None
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; what is written beside our code does not name that of another repo."""
        written = super().to_dict()
        written.pop("_read_from", None)
        written.pop("_read_at", None)
        written["frontier"] = plain_rows(self.frontier)
        names = {kind: written["auto_map"].get(kind, ours) for kind, ours in AUTO_MAP.items()}
        return written | {"auto_map": {k: AUTO_MAP[k] if "--" in str(name) else name for k, name in names.items()}}

    def _say_which_code_runs(self) -> None:
        """One line in the log when the repo's own code is another version than this one, which runs."""
        if self.flextron_version in (None, VERSION):
            return
        newer = _parts(self.flextron_version) > _parts(VERSION)
        logger.warning_once(
            f"The code beside {self.name_or_path or 'this config'} is Flextron {self.flextron_version}; what runs is"
            f" {'the older' if newer else 'the newer'} {VERSION} in {os.path.dirname(__file__)}."
            + (" Upgrade it if something is missing: `pip install -U flextron`." if newer else "")
        )
