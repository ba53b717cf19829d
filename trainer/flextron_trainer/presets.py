"""Presets of well-known parents: elastic choices, budgets, recipes and the sizes they lead to.

Each is a JSON file with these fields:
    parent: Hub id that the preset was made for, or null for a shape without public weights.
    config: Published dimensions of the parent, as in its `config.json`.
    convert: Keyword arguments of `convert`.
    stages: Arguments of `flextron train` for each stage. They follow what was published for larger models, not
        measurements of ours.
    sizes: Row of the frontier -> non-embedding and all parameters without calibration; with text others may be chosen.

`python -m flextron_trainer.presets` prints the table of hub_configs/README.md.
"""

import inspect
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from modeling_flextron import FlextronConfig
from modeling_flextron.errors import invalid

from .conversion.convert import convert
from .conversion.sizes import elastic_config
from .publishing.markdown import table_of_cells

# In the installed package, or in a checkout.
FOLDER = next(p for p in (Path(__file__).with_name("presets"), Path(__file__).parents[2] / "hub_configs") if p.is_dir())
CHOICES = ("mlp", "heads", "hidden", "depth", "budgets")
FIELDS = ("parent", "config", "convert", "stages", "sizes")
SHAPE = (
    "base_model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
# An argument of the user -> others of a recipe that go with the one it replaces.
REPLACES = {"num_train_epochs": ("max_steps",), "lr_scheduler_type": ("lr_scheduler_kwargs",)}


@dataclass(frozen=True)
class Preset:
    """One preset; the fields are described above."""

    name: str
    parent: str | None
    config: dict[str, Any]
    convert: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    sizes: dict[str, list[int]]

    def parent_config(self) -> PreTrainedConfig:
        """The config of the parent."""
        return AutoConfig.for_model(**self.config)

    def elastic_config(self) -> FlextronConfig:
        """Make the config that `convert` would make of it, without weights."""
        return elastic_config(
            self.parent_config(), **{key: self.convert[key] for key in CHOICES if key in self.convert}
        )

    def check(self, model: PreTrainedConfig) -> None:
        """Refuse a parent, or a Flextron model of one, that this preset was not made for.

        Raises:
            ValueError: another family, or other dimensions.
        """
        whole = {axis: [1] for axis in CHOICES}
        wanted = elastic_config(self.parent_config(), **whole)
        found = model if isinstance(model, FlextronConfig) else elastic_config(model, **whole)
        for name in SHAPE:
            if getattr(wanted, name) != getattr(found, name):
                rule = f"It is made for `{name}={getattr(wanted, name)}`, not {getattr(found, name)}."
                raise invalid("preset", self.name, rule, "Use another preset, or pass the choices themselves.")

    def recipe(self, stage: str, given: Iterable[str] = ()) -> dict[str, Any]:
        """Arguments of a stage, without those that the arguments `given` by the user replace.

        Raises:
            ValueError: it has no such stage.
        """
        if stage not in self.stages:
            rule = f"Preset {self.name!r} has the stages {', '.join(self.stages)}."
            raise invalid("stage", stage, rule, "Use one of them, or leave the preset out.")
        replaced = {name for one in given for name in (one, *REPLACES.get(one, ()))}
        return {name: value for name, value in self.stages[stage].items() if name not in replaced}


def names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_preset(name: str | os.PathLike) -> Preset:
    """Read a preset.

    Args:
        name: One of `names()`, or the path of a file of your own.

    Raises:
        ValueError: there is no such preset, or its file is not one.
    """
    path = Path(name) if str(name).endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        rule = f"The presets are {', '.join(names())}."
        raise invalid("preset", str(name), rule, "Name one of them, or the path of a JSON file.")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise invalid("preset", str(name), f"It is not JSON: {error}.", "Start from a copy of another.") from None
    fields: dict[str, Any] = {"parent": None, "stages": {}, "sizes": {}}
    fields |= read if isinstance(read, dict) else {}
    problems = [f"it has no {key!r}" for key in FIELDS if key not in fields]
    problems += [f"{key!r} is not one of them" for key in fields if key not in FIELDS]
    if not problems and "model_type" not in fields["config"]:
        problems.append("'config' has no 'model_type'")
    if not problems:
        allowed = inspect.signature(convert).parameters
        problems += [f"{key!r} is no argument of `convert`" for key in fields["convert"] if key not in allowed]
    if problems:
        rule = f"A preset has the fields {', '.join(FIELDS)}, and {problems[0]}."
        raise invalid("preset", str(name), rule, "See hub_configs/README.md.")
    return Preset(path.stem, **fields)


def sizes_table() -> str:
    """The sizes of all presets as a Markdown table."""
    heads = "preset", "row", "hidden", "layers", "mlp", "heads", "non-embedding", "parameters", "KV values per token"
    lines = []
    for name in names():
        config = load_preset(name).elastic_config()
        for row in config.frontier:
            s = config.resolve(row.subnetwork)
            sizes = (s.hidden, len(s.layers), s.mlp[0], s.heads[0])
            costs = (row.non_embedding_parameters, row.parameters, row.kv_values_per_token)
            label = f"`{name}`" if row is config.frontier[0] else ""
            lines.append([label, row.name, *(f"{number:,}" for number in sizes + costs)])
    return table_of_cells(heads, lines)


if __name__ == "__main__":
    print(sizes_table())
