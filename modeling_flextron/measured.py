"""Measured figures, and what they were measured on.

A row of the frontier, and a target of token routing, has its `loss` and named `metrics`, and in `measured` what stands
behind them: text, split, tokens, date and version of the code, with the names of the figures that come from there. A
figure of no entry was written by an older version, and its text is unknown. Under one name all rows have figures of
one text: writing those of another text erases the rest.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers.utils import logging

from .errors import invalid, require_int

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Measured:
    """What figures were measured on.

    Args:
        text: Name of the text or task; None where it is unknown.
        split: Split of it.
        tokens: How many tokens counted.
        date: Day, as `2026-01-31`.
        version: Version of the code that measured.
    """

    text: str | None = None
    split: str | None = None
    tokens: int | None = None
    date: str | None = None
    version: str | None = None

    @property
    def label(self) -> str:
        """Text and split, in a few words."""
        return (self.text or "an unknown text") + (f" ({self.split})" if self.split else "")


def unmeasured() -> dict[str, Any]:
    """The fields of a row that has no figures."""
    return {"loss": None, "metrics": {}, "measured": []}


def figures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row by their names, `loss` first."""
    return ({} if row["loss"] is None else {"loss": row["loss"]}) | row["metrics"]


def measured_on(row: Mapping[str, Any], figure: str) -> Measured:
    """What a figure of a row was measured on."""
    return next((_on(entry) for entry in row["measured"] if figure in entry["figures"]), Measured())


def record(rows: Mapping[str, dict[str, Any]], figures: Mapping[str, Mapping[str, float]], on: Measured) -> None:
    """Write figures of one text into rows; those of the same names and another text go, in all rows.

    Args:
        rows: Name -> row.
        figures: Name of a row -> name of a figure -> value. What is no finite number is left out, with a warning.
        on: What they were measured on.
    """
    names = {figure for values in figures.values() for figure in values}
    for row in rows.values():
        _erase(row, {figure for figure in names if measured_on(row, figure) != on})
    for name, values in figures.items():
        finite = {figure: float(value) for figure, value in values.items() if math.isfinite(value)}
        if left_out := sorted(set(values) - set(finite)):
            logger.warning(f"What was measured of {name!r} is no finite number, and is left out: {left_out}.")
        _erase(rows[name], set(values))
        if finite:
            same = next((entry for entry in rows[name]["measured"] if _on(entry) == on), None)
            if same is None:
                rows[name]["measured"].append(same := {**asdict(on), "figures": []})
            same["figures"] = sorted({*same["figures"], *finite})
            rows[name]["loss"] = finite.pop("loss", rows[name]["loss"])
            rows[name]["metrics"] |= finite


def forget(rows: Iterable[dict[str, Any]]) -> None:
    """Erase all figures of rows."""
    for row in rows:
        row |= unmeasured()


def check_measured(at: str, row: dict[str, Any]) -> None:
    """Refuse figures, and what stands behind them, that are not of the right kinds; rows of older versions get theirs.

    Raises:
        ValueError: what is wrong, with the field `at` which it is.
    """
    loss, metrics, measured = row["loss"], row["metrics"], row.setdefault("measured", [])
    if loss is not None and (type(loss) not in (int, float) or not math.isfinite(loss)):
        raise invalid(f"{at}['loss']", loss, "It is in nats per token.", "Pass a finite number or None.")
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise invalid(f"{at}['metrics']", metrics, "It maps names to values.", "Pass a dict.")
    known = {field.name for field in fields(Measured)} | {"figures"}
    if not isinstance(measured, list) or any(not isinstance(e, dict) or set(e) != known for e in measured):
        rule = f"It is a list of entries with {', '.join(sorted(known))}."
        raise invalid(f"{at}['measured']", measured, rule, "Write figures with `config.record`.")
    for entry in measured:
        for field in known - {"tokens", "figures"}:
            if not isinstance(entry[field], str | None):
                raise invalid(f"{at}['measured'][{field!r}]", entry[field], "It is a text.", "Pass a text, or None.")
        if entry["tokens"] is not None:
            require_int(f"{at}['measured']['tokens']", entry["tokens"])
        if not isinstance(entry["figures"], list) or not all(isinstance(name, str) for name in entry["figures"]):
            rule = "It lists names of figures of the row."
            raise invalid(f"{at}['measured']['figures']", entry["figures"], rule, "Pass a list of names.")
    _erase(row, {name for entry in measured for name in entry["figures"]} - set(figures_of(row)))


def _on(entry: Mapping[str, Any]) -> Measured:
    return Measured(**{name: value for name, value in entry.items() if name != "figures"})


def _erase(row: dict[str, Any], figures: set[str]) -> None:
    """Take figures out of a row, and what stands behind them where nothing else does."""
    row["loss"] = None if "loss" in figures else row["loss"]
    row["metrics"] = {name: value for name, value in row["metrics"].items() if name not in figures}
    kept = ({**entry, "figures": [n for n in entry["figures"] if n not in figures]} for entry in row["measured"])
    row["measured"] = [entry for entry in kept if entry["figures"]]
