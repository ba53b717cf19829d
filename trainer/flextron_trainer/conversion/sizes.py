"""Chooses which sizes an elastic model may have, and makes its config from that of its parent."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig

from modeling_flextron import FlextronConfig
from modeling_flextron.errors import invalid
from modeling_flextron.families import family_of
from modeling_flextron.subnetwork import AXES

from .parents import check_supported
from .rows import choose_rows, named_budgets

LEAST = {"mlp": 1 / 16, "heads": 1 / 4, "hidden": 1, "depth": 1}  # of the full size, where sizes are not given
DEFAULT_BUDGETS = (1, 0.75, 0.5, 0.25)
Choices = Sequence[int | float]


def elastic_config(
    parent: PreTrainedConfig,
    *,
    mlp: Choices | None = None,
    heads: Choices | None = None,
    hidden: Choices | None = None,
    depth: Choices | None = None,
    budgets: Sequence[Any] | Mapping[str, Any] = DEFAULT_BUDGETS,
) -> FlextronConfig:
    """Make the config that `convert` would give a parent, from its config alone.

    Its layers are dropped from the last one upwards, and its frontier has the largest sub-network within each budget;
    `convert` chooses by importance and by loss.

    Args:
        parent: Config of a dense model of a supported family.
        mlp, heads, hidden, depth, budgets: as in `convert`.

    Raises:
        ValueError: as in `convert`.
    """
    config = family_config(parent, {"mlp": mlp, "heads": heads, "hidden": hidden, "depth": depth})
    config.frontier = choose_rows(config, named_budgets(config, budgets), None)
    config.validate()
    return config


def family_config(parent, fractions: dict[str, Choices | None]) -> FlextronConfig:
    """The config of the elastic model: the parent's fields, and the allowed sizes."""
    check_supported(parent)
    family, kind = family_of(parent.model_type), parent.model_type
    fields: dict[str, Any] = {
        ours: copy.deepcopy(getattr(parent, theirs, None)) for ours, theirs in family.fields.items()
    }
    fields["intermediate_size"] = fields["intermediate_size"] or 4 * fields["hidden_size"]  # GPT-2 leaves it out
    if not family.partial_rotary and fields.get("rope_parameters"):
        fields["rope_parameters"].pop("partial_rotary_factor", None)  # the stock class rotates all channels
    if fields.get("sliding_window"):
        fields["layer_types"] = fields.get("layer_types") or ["sliding_attention"] * fields["num_hidden_layers"]
    if "sliding_attention" not in (fields.get("layer_types") or ()):
        fields |= {"sliding_window": None, "layer_types": None}
    config = FlextronConfig(**family.constants | fields, base_model_type=kind, dtype=parent.dtype)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    full = {"mlp": config.intermediate_size, "heads": heads, "hidden": config.hidden_size}
    full["depth"] = config.num_hidden_layers
    units = {"mlp": 1, "heads": kv_heads if heads > kv_heads else 1, "hidden": 1, "depth": 1}
    elastic = {axis: _sizes(axis, fractions[axis], full[axis], units[axis], config.head_dim) for axis in AXES}
    if fractions["hidden"] is None and not family.own_head_dim:
        elastic["hidden"] = [heads * config.head_dim for heads in elastic["heads"]]
    droppable = [layer for layer in reversed(range(full["depth"])) if layer not in config.anchors()]
    if full["depth"] - elastic["depth"][-1] > len(droppable):
        rule = f"The layers {sorted(config.anchors())}, the first of each kind of attention, always stay."
        raise invalid("depth", elastic["depth"][-1], rule, f"Keep at least {full['depth'] - len(droppable)} layers.")
    # Any ranking will do until the real one is known.
    config.elastic = {**elastic, "layer_ranking": droppable[: full["depth"] - elastic["depth"][-1]]}
    config.validate()
    return config


def _sizes(axis: str, given: Choices | None, full: int, unit: int, head_dim: int) -> list[int]:
    """Sizes from fractions or sizes; `unit` must divide each."""
    if given is None:
        parts = 64 if axis == "mlp" else 8
        step = unit * max(1, round(full / unit / parts))
        fine = [size for size in range(full, 0, -step) if size >= LEAST[axis] * full]
        if axis != "mlp":
            return fine
        # Small budgets need steps that are small for them.
        return [size for i, size in enumerate(fine) if i % 2 == 0 or 4 * size < full]
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise invalid(axis, given, "It is a list of sizes or fractions.", f"Pass for instance {axis}=[1, 0.5].")
    sizes: list[int] = []
    for size in given:
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size <= full:
            rule = f"A size is a fraction in (0, 1] or a number up to {full}."
            raise invalid(axis, size, rule, f"Pass for instance {axis}=[1, 0.5].")
        one = isinstance(size, int) and size == 1 and bool(sizes)  # behind larger sizes it is a size
        exact_size = full * size if size <= 1 and not one else size
        rounded = round(exact_size)
        if abs(exact_size - rounded) > 1e-6 or rounded % unit:
            good = head_dim if axis == "hidden" else unit
            nearest = min(full, max(good, round(exact_size / good) * good))
            what = f" of the {unit} KV heads" if unit > 1 else ""
            rule = f"It makes {exact_size:g} of {full}, which is not a whole multiple{what}."
            raise invalid(axis, size, rule, f"The nearest size is {nearest}.")
        sizes.append(rounded)
    if not sizes or sizes[0] != full:
        raise invalid(axis, list(given), "The first size is the full one.", f"Begin the list with 1 (or {full}).")
    if any(small >= large for large, small in pairwise(sizes)):
        raise invalid(axis, list(given), "The sizes must descend strictly.", "Sort them and drop repeated ones.")
    return sizes
