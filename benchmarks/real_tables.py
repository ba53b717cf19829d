"""What `bench_real.py` measured, as tables and as a picture."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from real_lines import PLAN
from study import chosen, table


def tables(result: dict[str, Any]) -> str:
    """All that was measured."""
    return "\n\n".join(part for part in (table(result, PLAN), task_table(result), time_table(result)) if part)


def task_table(result: dict[str, Any]) -> str:
    """Accuracies in percent with standard errors, means over the seeds that have them; empty without any.

    The error of a difference is that of two sets of items: as the items are the same, it is smaller in truth.
    """
    seeds = list(result["seeds"].values())
    limits = {
        key.rpartition(", ")[2]: value["limit"]
        for seed in seeds
        for key, value in seed.items()
        if isinstance(value, dict) and "limit" in value
    }

    def scores(key: str, budget: str) -> list[tuple[float, float]]:
        """Accuracy and standard error of every task, and of their mean before them; empty where one is missing."""
        found = []
        for task in limits:
            parts = [seed.get(f"{key}, {task}", {}).get(budget) for seed in seeds]
            values = [(part[f"{task}/acc"], part[f"{task}/acc_stderr"]) for part in parts if part]
            if not values:
                return []
            found.append((statistics.mean(a for a, _ in values), statistics.mean(error for _, error in values)))
        mean, error = statistics.mean(a for a, _ in found), math.hypot(*(e for _, e in found)) / len(found)
        return [(mean, error), *found]

    if not limits:
        return ""
    of_parent, out = scores("parent", "1"), []
    for (line, tokens), keys in chosen(result, PLAN).items():
        for budget, key in keys.items():
            if found := scores(key, budget):
                cells = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in found]
                less = ""
                if of_parent and line != "parent":
                    errors = math.hypot(found[0][1], of_parent[0][1])
                    less = f"{100 * (found[0][0] - of_parent[0][0]):+.1f} ± {100 * errors:.1f}"
                out.append(f"| {' | '.join([line, f'{tokens:,}' if tokens else '', budget, *cells, less])} |")
    named = [f"{task} ({limit or 'all'})" for task, limit in limits.items()]
    head = f"| | tokens | budget | accuracy, mean | {' | '.join(named)} | mean - parent's |"
    return "\n".join([head, f"|---|---:|---:|{'---:|' * (len(limits) + 2)}", *out])


def time_table(result: dict[str, Any]) -> str:
    """Time of loaded rows against that of stock models in the same rounds; empty where none was taken."""
    columns, out = ("control", "loaded", "family", "padded", "parent"), []
    timed = {key: rows for seed in result["seeds"].values() for key, rows in seed.items() if key.endswith(", times")}
    for start in PLAN.starts:
        for row in timed.get(f"{start}, times", []):
            cells = [f"{row[name]['ratio']:.2f}" if name in row else "" for name in columns]
            of = f"{row['reference']} | {row[row['reference']]['milliseconds']:.1f}"
            out.append(f"| {start} | {row['budget']} | {row['what']} | {of} | {' | '.join(cells)} |")
    if not out:
        return ""
    head = f"| time / that of the reference | budget | | reference | ms | {' | '.join(columns)} |"
    return "\n".join([head, f"|---|---|---|---|---:|{'---:|' * len(columns)}", *out])


def bought(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Tokens -> budget -> nats that the elastic run is above the parent, first text, for `training/expectations.py`."""
    seeds, text = list(result["seeds"].values()), result["texts"][0]
    found = {}
    for (line, tokens), keys in chosen(result, PLAN).items():
        if line in ("repaired slices", "elastic"):
            above = {
                budget: [
                    each[key][budget][text] - each["parent"]["1"][text]
                    for each in seeds
                    if "parent" in each and budget in each.get(key, {})
                ]
                for budget, key in keys.items()
            }
            found[str(tokens or 0)] = {
                budget: round(statistics.mean(each), 3) for budget, each in above.items() if each
            }
    return {tokens: row for tokens, row in found.items() if row}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw losses on the first text against the bytes of stock checkpoints, in bfloat16 or quantized."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, text, seeds = figure.subplots(), result["texts"][0], list(result["seeds"].values())
    for (line, tokens), keys in chosen(result, PLAN).items():
        values = {
            budget: [seed[key][budget][text] for seed in seeds if text in seed.get(key, {}).get(budget, {})]
            for budget, key in keys.items()
        }
        if line in PLAN.parents:
            if values["1"]:
                size = next(seed[line]["bytes"] for seed in seeds if line in seed)
                axes.plot(size / 1e6, statistics.mean(values["1"]), "*", markersize=12, label=line)
            continue
        sizes = result["bytes"].get(PLAN.start(line), {})
        points = [
            (sizes[budget] / 1e6, statistics.mean(each)) for budget, each in values.items() if each and budget in sizes
        ]
        if len(points) > 1:
            label = f"{line}, {tokens:,} tokens" if tokens else f"{line}, nothing trained"
            axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=label)
    axes.set_xlabel("MB of weights")
    axes.set_ylabel(f"loss on {text}, nats per token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
