"""Lets a config follow when its shape changes: layers, choices, names and costs of rows.

What was stored together was made for one shape. Where a field of the shape is changed, what depends on it follows;
what no longer fits is dropped with a warning.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from transformers.utils import logging

from .budgets import Family, unreached
from .frontier import COSTS, FrontierRow, held, plain_rows
from .static_router import narrowed_router
from .subnetwork import AXES, Shape, SubNetwork

logger = logging.get_logger(__name__)
MADE_FOR_CHOICES = ("frontier", "corrections", "static_router", "token_routing")


def nothing_made(levels: Any) -> dict[str, Any]:
    """The fields of a config for whose choices nothing was made; the files of its `levels` stay one checkpoint."""
    levels = {**levels, "rows": []} if isinstance(levels, dict) else levels
    return {**dict.fromkeys(MADE_FOR_CHOICES), "levels": levels}


def belong_together(frontier: Any, elastic: Any) -> bool:
    """Whether the rows of `frontier` name sizes of `elastic`: then both were stored, for one shape."""
    try:
        rows = [row["subnetwork"] for row in plain_rows(frontier) if row["subnetwork"] is not None]
        sizes = [{**row, "depth": len(row["layers"]) if _is_list(row["layers"]) else row["layers"]} for row in rows]
        named = {axis: {size for row in sizes for size in _listed(row[axis])} for axis in AXES}
        return bool(rows) and all(named[axis] <= set(elastic[axis]) for axis in AXES)
    except (TypeError, KeyError):  # none given, or nothing like them
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _listed(value: Any) -> Any:
    return value if _is_list(value) else [value]


def fitted_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that follow others: layer kinds their number, the window the kinds, KV heads the heads."""
    layers, heads, kinds = values["num_hidden_layers"], values["num_attention_heads"], values["layer_types"]
    result: dict[str, Any] = {}
    if values["num_key_value_heads"] == values["elastic"]["heads"][0] != heads:  # each had its own
        result["num_key_value_heads"] = heads
    if _is_list(kinds) and kinds and type(layers) is int:
        fitted = [*kinds[:layers], *kinds[-1:] * (layers - len(kinds))]
        if values["sliding_window"] is None:
            fitted = ["full_attention" if kind == "sliding_attention" else kind for kind in fitted]
        elif "sliding_attention" in kinds and "sliding_attention" not in fitted:
            result["sliding_window"] = None
        result["layer_types"] = fitted
    return result


def misfits(
    elastic: Mapping[str, list[int]], built: SubNetwork, anchors: set[int], kv_heads: Callable[[int], int]
) -> dict[str, list[int]]:
    """Axis -> the sizes that are built, where the choices are not those of this shape; see `check_elastic`."""
    held = {"mlp": built.mlp, "heads": built.heads, "hidden": (built.hidden,), "depth": (len(built.layers),)}

    def fits(axis: str, sizes: tuple[int, ...]) -> bool:
        choices = elastic[axis]
        if choices[0] != max(sizes) or not set(sizes) <= set(choices):
            return False
        if axis == "heads":
            return not any(heads % kv_heads(heads) for heads in choices)
        return axis != "depth" or not anchors & set(elastic["layer_ranking"])

    return {axis: sorted(set(sizes), reverse=True) for axis, sizes in held.items() if not fits(axis, sizes)}


def narrowed_fields(config: Family, subnetwork: SubNetwork) -> dict[str, Any]:
    """The fields of the `FlextronConfig` of a model that holds only `subnetwork`: its shape, its choices, its rows."""
    layers = subnetwork.layers
    sizes = {"mlp": max(subnetwork.mlp), "heads": max(subnetwork.heads), "hidden": subnetwork.hidden}
    sizes["depth"] = len(layers)
    elastic = {axis: [size for size in config.choices(axis) if size <= sizes[axis]] for axis in AXES}
    ranking = [layers.index(layer) for layer in config.elastic["layer_ranking"] if layer in layers]
    router, counts = config.static_router, {axis: len(elastic[axis]) for axis in AXES}
    inner = {name: s.within(subnetwork) for name, s in held(config.frontier).items() if subnetwork.contains(s)}
    return {
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["depth"],
        "intermediate_size": sizes["mlp"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": config.kv_heads(sizes["heads"]),
        "layer_types": [config.layer_types[layer] for layer in layers],
        "elastic": {**elastic, "layer_ranking": ranking},
        "static_router": router and narrowed_router(router, layers, counts),
        "frontier": [replace(row, subnetwork=inner.get(row.name)) for row in config.frontier],
        "parent_non_embedding_parameters": config.parent_size(),
        "flextron_budget": None,
    }


def with_exact_costs(shape: Shape, rows: list[FrontierRow]) -> tuple[list[FrontierRow], bool]:
    """Let the costs of rows follow the shape; of rows that are not held only their embeddings can.

    Returns:
        The rows, without those whose cost is no longer known; and whether they were of another shape.
    """
    result: list[FrontierRow] = []
    scales: set[Fraction | None] = set()  # of the embeddings; None where more has changed
    for row in rows:
        if row.subnetwork is None:
            result.append(row)
            continue
        exact = FrontierRow.of(shape, row.name, row.subnetwork)
        before, after = (costs.parameters - costs.non_embedding_parameters for costs in (row, exact))
        same = before > 0 and all(getattr(row, cost) == getattr(exact, cost) for cost in COSTS[1:])
        scales.add(Fraction(after, before) if same else None)
        result.append(replace(row, **{cost: getattr(exact, cost) for cost in COSTS}))
    changed = bool(scales - {Fraction(1)})
    others = [row.name for row in rows if row.subnetwork is None]
    if not others or not changed:
        return result, changed
    scale, *more = scales
    if scale is not None and not more:
        return [row if row.subnetwork else _with_embeddings(row, scale) for row in result], changed
    names = ", ".join(map(repr, others))
    logger.warning(f"What the rows {names} cost is not known for this shape, and they are dropped.")
    return [row for row in result if row.subnetwork is not None], changed


def _with_embeddings(row: FrontierRow, scale: Fraction) -> FrontierRow:
    """A row whose embeddings cost so many times as much."""
    embeddings = row.parameters - row.non_embedding_parameters
    return replace(row, parameters=row.non_embedding_parameters + int(embeddings * scale))


def renamed(rows: list[FrontierRow], parent_size: int) -> list[FrontierRow]:
    """Rows of which those get another name that cost more than their names say."""
    wrong = [row.name for row in unreached(rows, parent_size)]
    for name in wrong:
        logger.warning(f"Row {name!r} costs more of this shape than its name says, and is called 'row-{name}'.")
    return [replace(row, name=f"row-{row.name}") if row.name in wrong else row for row in rows]
