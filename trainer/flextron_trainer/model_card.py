"""The README of a Hub repo, written from what was measured."""

import importlib.metadata
import os
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from modeling_flextron.checkpoint import write_file_beside
from modeling_flextron.subnetwork import count_parameters, weight_bytes

from .arguments import FlextronTrainingArguments


def frontier_table(model) -> str:
    """The frontier of a model as a Markdown table."""
    lines = [
        "| budget | parameters | weights | layers | hidden | MLP | heads | loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in model.frontier:
        subnetwork = model.resolve_budget(row["subnetwork"])
        size = weight_bytes(model.config, subnetwork, model.dtype)
        loss = "not measured" if row["loss"] is None else f"{row['loss']:.4f}"
        lines.append(
            f"| `{row['name']}` | {count_parameters(model.config, subnetwork):,} | {size / 2**20:,.1f} MiB"
            f" | {len(subnetwork.layers)} | {subnetwork.hidden} | {_range(subnetwork.mlp)}"
            f" | {_range(subnetwork.heads)} | {loss} |"
        )
    return "\n".join(lines)


def _range(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}"


def non_default_arguments(arguments: FlextronTrainingArguments) -> dict[str, Any]:
    """The training arguments that were changed, without paths, logging and other matters of the machine."""
    local = {"output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "hub_token", "use_cpu"}
    defaults = FlextronTrainingArguments(output_dir=str(arguments.output_dir), use_cpu=arguments.use_cpu)
    changed = {}
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        plain = isinstance(value, (str, int, float, list))
        if field.name not in local and plain and value != getattr(defaults, field.name):
            changed[field.name] = getattr(value, "value", value)  # of an enumeration
    return changed


def write_model_card(
    model, folder: str | os.PathLike, arguments: FlextronTrainingArguments | None = None, repo: str | None = None
) -> None:
    """Write `README.md` into a folder that holds a saved model.

    Args:
        model: The elastic model.
        folder: Where it is saved.
        arguments: How it was trained; None when it was only converted.
        repo: What the commands on the card load; by default the name of the folder.
    """
    name = Path(folder).resolve().name
    training = "Not trained after conversion: the smaller sizes are plain slices of the parent."
    if arguments is not None:
        changed = "\n".join(f"- `{key}`: `{value}`" for key, value in non_default_arguments(arguments).items())
        training = f"Trained with `FlextronTrainer`; arguments that differ from their defaults:\n\n{changed}"
    card = (files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8")
    card = card.format(
        title=name,
        parent_type=model.config.base_model_type,
        table=frontier_table(model),
        repo=repo or name,
        small=model.frontier[-1]["name"],
        training=training,
        versions=package_versions(),
    )
    with write_file_beside(Path(folder) / "README.md") as path:
        path.write_text(card, encoding="utf-8")


def package_versions() -> str:
    """The versions that made a model, for a card."""
    return ", ".join(f"{package} {_version(package)}" for package in ("flextron", "transformers", "torch"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from source"
