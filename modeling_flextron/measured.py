"""Measured figures, and what they were measured on.

A row of the frontier, and a target of token routing, has its `loss` and named `metrics`, and of every figure the text,
split, tokens, date and version of the code behind it. A figure without these was written by an older version, and its
text is unknown. Under one name all rows have figures of one text: writing those of another text erases the rest.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from transformers.utils import logging

from .errors import invalid, is_number, require_int

logger = logging.get_logger(__name__)
FIGURE_FIELDS = ("loss", "metrics", "measured")
Scored = TypeVar("Scored", bound="Figures")


@dataclass(frozen=True)
class Measured:
    """The text that figures were measured on, when, and by which code.

    Args:
        text: Name of the text or task; None where it is unknown.
        split: Split of it.
        tokens: How many tokens counted.
        date: Day, as `2026-01-31`.
        version: Version of the code that measured.
        dataset: Id of the Hub where the text lies; None for another place.
    """

    text: str | None = None
    split: str | None = None
    tokens: int | None = None
    date: str | None = None
    version: str | None = None
    dataset: str | None = None

    @property
    def label(self) -> str:
        """Text and split, in a few words."""
        return (self.text or "an unknown text") + (f" ({self.split})" if self.split else "")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measured figures of one sub-network.

    Args:
        loss: In nats per token; None where it was not measured.
        metrics: Other figures by their names.
        measured: Name of a figure -> what it was measured on, where that is known.
    """

    loss: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    measured: Mapping[str, Measured] = field(default_factory=dict, hash=False)

    @property
    def by_name(self) -> dict[str, Any]:
        """All figures by their names, `loss` first."""
        return ({} if self.loss is None else {"loss": self.loss}) | dict(self.metrics)

    def measured_on(self, figure: str) -> Measured:
        """The text that a figure was measured on; an unknown one where nothing is known."""
        return self.measured.get(figure, Measured())

    def figures(self) -> dict[str, Any]:
        """JSON form: `loss`, `metrics`, and in `measured` an entry for each text, which lists its figures."""
        entries: dict[Measured, list[str]] = {}
        for name, on in self.measured.items():
            entries.setdefault(on, []).append(name)
        measured = [{**asdict(on), "figures": sorted(names)} for on, names in entries.items()]
        for entry in measured:
            if entry["dataset"] is None:  # older versions know no such field
                del entry["dataset"]
        return {"loss": self.loss, "metrics": dict(self.metrics), "measured": measured}


def read_figures(at: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Figures` from their JSON form; older versions wrote no `measured`.

    Raises:
        ValueError: what is not of the right kind, with the field `at` which it is.
    """
    loss, metrics, entries = values["loss"], values["metrics"], values.get("measured", [])
    if loss is not None and not is_number(loss):
        raise invalid(f"{at}['loss']", loss, "It is in nats per token.", "Pass a finite number or None.")
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise invalid(f"{at}['metrics']", metrics, "It maps names to values.", "Pass a dict.")
    known = {each.name for each in fields(Measured)} | {"figures"}
    if not isinstance(entries, list) or any(not isinstance(e, dict) or {*e, "dataset"} != known for e in entries):
        rule = f"It is a list of entries with {', '.join(sorted(known))}."
        raise invalid(f"{at}['measured']", entries, rule, "Write figures with `config.record`.")
    measured: dict[str, Measured] = {}
    for entry in entries:
        for key in known - {"tokens", "figures"}:
            if not isinstance(entry.get(key), str | None):
                raise invalid(f"{at}['measured'][{key!r}]", entry[key], "It is a text.", "Pass a text, or None.")
        if entry["tokens"] is not None:
            require_int(f"{at}['measured']['tokens']", entry["tokens"])
        if not isinstance(entry["figures"], list) or not all(isinstance(name, str) for name in entry["figures"]):
            rule = "It lists names of figures of the row."
            raise invalid(f"{at}['measured']['figures']", entry["figures"], rule, "Pass a list of names.")
        on = Measured(**{key: value for key, value in entry.items() if key != "figures"})
        measured = {name: on for name in entry["figures"]} | measured
    held = Figures(loss=loss, metrics=metrics).by_name
    measured = {name: on for name, on in measured.items() if name in held}
    return {"loss": loss, "metrics": dict(metrics), "measured": measured}


def record(row: Scored, name: str, figures: Mapping[str, Mapping[str, float]], on: Measured) -> Scored:
    """Give a row, called `name`, its own of the `figures` of all rows; those of the same names and another text go.

    What is no finite number is left out, with a warning.
    """
    own = figures.get(name, {})
    others = {figure for values in figures.values() for figure in values if row.measured_on(figure) != on}
    finite = {figure: float(value) for figure, value in own.items() if math.isfinite(value)}
    if left_out := sorted(set(own) - set(finite)):
        logger.warning(f"What was measured of {name!r} is no finite number, and is left out: {left_out}.")
    kept = row.by_name.keys() - own.keys() - others
    values = {figure: value for figure, value in row.by_name.items() if figure in kept} | finite
    measured = {figure: each for figure, each in row.measured.items() if figure in kept} | dict.fromkeys(finite, on)
    return replace(row, loss=values.pop("loss", None), metrics=values, measured=measured)


def forget(row: Scored) -> Scored:
    """The row without any figures."""
    return replace(row, loss=None, metrics={}, measured={})
