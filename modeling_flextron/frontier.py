"""Rows of the frontier: recommended sub-networks, what they cost, and what was measured of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import invalid, require_int
from .measured import FIGURE_FIELDS, Figures, read_figures
from .subnetwork import Shape, SubNetwork, count_parameters, kv_values_per_token, subnetwork_of

COSTS = ("parameters", "non_embedding_parameters", "kv_values_per_token")  # the first alone has embeddings
ROW_FIELDS = ("name", "subnetwork", *COSTS, *FIGURE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class FrontierRow(Figures):
    """A recommended sub-network. Rows do not change: `dataclasses.replace` makes another one.

    `row["loss"]` gives a field as `config.json` has it.

    Args:
        name: By which it is asked for.
        subnetwork: Its sizes; None where only a larger checkpoint has its weights.
        parameters: Exact number of parameters.
        non_embedding_parameters: Those outside of embeddings and output head.
        kv_values_per_token: Numbers that its KV cache keeps for a token.
        loss, metrics, measured: as in `Figures`.
    """

    name: str
    subnetwork: SubNetwork | None
    parameters: int
    non_embedding_parameters: int
    kv_values_per_token: int

    def __getitem__(self, field: str) -> Any:
        return self.to_dict()[field]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, in which `layers` is a number of layers."""
        sizes = self.subnetwork and {**self.subnetwork.to_dict(), "layers": len(self.subnetwork.layers)}
        costs = {cost: getattr(self, cost) for cost in COSTS}
        return {"name": self.name, "subnetwork": sizes, **costs, **self.figures()}

    @classmethod
    def of(cls, config: Shape, name: str, subnetwork: SubNetwork) -> "FrontierRow":
        """The row of a sub-network, with its exact costs and nothing measured."""
        return cls(
            name=name,
            subnetwork=subnetwork,
            parameters=count_parameters(config, subnetwork),
            non_embedding_parameters=count_parameters(config, subnetwork, embeddings=False),
            kv_values_per_token=kv_values_per_token(config, subnetwork),
        )

    @classmethod
    def from_dict(cls, config: Shape, values: Any, at: str = "row") -> "FrontierRow":
        """Read the JSON form, called `at` in errors.

        Raises:
            ValueError: it is no row, or one of sizes that the model does not have.
        """
        if not isinstance(values, dict) or {*values, "measured"} != set(ROW_FIELDS):  # which older ones do not have
            raise invalid(at, values, f"A row has the fields {', '.join(ROW_FIELDS)}.", "Build it with `config.row`.")
        if not isinstance(values["name"], str) or not values["name"]:
            rule = "Every row has a name of its own."
            raise invalid(f"{at}['name']", values["name"], rule, "Pass a non-empty string that no other row has.")
        figures = read_figures(at, values)
        for cost in COSTS:
            require_int(f"{at}[{cost!r}]", values[cost])
        sizes = values["subnetwork"]
        if not isinstance(sizes, dict | None):
            raise invalid(f"{at}['subnetwork']", sizes, "It holds sizes.", "Pass a dict.")
        subnetwork = None if sizes is None else subnetwork_of(config, sizes)
        return cls(name=values["name"], subnetwork=subnetwork, **{cost: values[cost] for cost in COSTS}, **figures)


def held(rows: Iterable[FrontierRow]) -> dict[str, SubNetwork]:
    """Name -> sub-network of those rows that the weights hold."""
    return {row.name: row.subnetwork for row in rows if row.subnetwork is not None}


def plain_rows(frontier: Any) -> Any:
    """The JSON form of a frontier, which may be that already; what is no list stays as it is."""
    if not isinstance(frontier, list):
        return frontier
    return [row.to_dict() if hasattr(row, "to_dict") else row for row in frontier]


def read_rows(config: Shape, frontier: Any) -> list[FrontierRow]:
    """The rows of a frontier from their JSON form, or anew from rows, as what their sizes mean follows the config.

    Raises:
        ValueError: it is no list of rows of this model, or two have one name.
    """
    if not isinstance(frontier, list) or not frontier:
        raise invalid("frontier", frontier, "It is a list of rows.", "Pass None for the full size alone.")
    rows: dict[str, FrontierRow] = {}
    for i, values in enumerate(plain_rows(frontier)):
        row = FrontierRow.from_dict(config, values, f"frontier[{i}]")
        if row.name in rows:
            rule = "Every row has a name of its own."
            raise invalid(f"frontier[{i}]['name']", row.name, rule, "Pass a non-empty string that no other row has.")
        rows[row.name] = row
    return list(rows.values())
