"""Scores on benchmarks of the Hub, as files that it shows on the model's page: `.eval_results/*.yaml`.

The metadata of the card has every figure; here are those of a task whose data lie in a dataset of the Hub.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from modeling_flextron.errors import is_number
from modeling_flextron.frontier import FrontierRow
from modeling_flextron.measured import Measured

from ..files import write_file_beside
from ..hub import SCORES

DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def write_eval_results(rows: Iterable[FrontierRow], folder: Path) -> None:
    """Write a file for each row that has such scores, and remove those that an earlier call wrote and that are over.

    Args:
        rows: Of the frontier.
        folder: Of the saved model.
    """
    written = set()
    for number, row in enumerate(rows):
        if entries := entries_of(row):
            name = re.sub(r"[^A-Za-z0-9.-]+", "-", row.name)[:64]
            path = folder / SCORES.format(f"{number}-{name}")
            with write_file_beside(path) as new:
                new.write_text(yaml_dump(eval_result_entries_to_yaml(entries)), encoding="utf-8")
            written.add(path)
    for path in set(folder.glob(SCORES.format("*"))) - written:
        path.unlink()


def entries_of(row: FrontierRow) -> list[EvalResultEntry]:
    """The first score of every task with a dataset of the Hub: an entry has one value, and names no metric."""
    first: dict[Measured, str] = {}
    for name, value in row.metrics.items():
        if is_number(value) and not name.endswith("_stderr"):
            first.setdefault(row.measured_on(name), name)
    return [
        EvalResultEntry(
            dataset_id=on.dataset,
            task_id=on.text,
            value=round(row.metrics[name], 4),
            date=on.date,
            notes=f"flextron_budget={row.name}, {name}, by Flextron {on.version}",
        )
        for on, name in first.items()
        if on.text and on.dataset and DATASET.fullmatch(on.dataset)
    ]
