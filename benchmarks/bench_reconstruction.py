"""What sub-networks are worth before any training: orders of units, and what linear algebra repairs.

    python benchmarks/bench_reconstruction.py MODEL --calibration prose.txt --test other_prose.txt code.txt
    python benchmarks/bench_reconstruction.py MODEL ... --ways '' ' unweighted' --calibration-blocks 64
    python benchmarks/bench_reconstruction.py --table                   # what was measured so far

MODEL is a folder or a Hub id. For each of several calibration samples and each budget of non-embedding parameters the
losses above the parent's are those of
    importance      units in the order of mean activation
    norms, variance, obs    the other orders (`flextron_trainer/conversion/orders.py`)
    chosen + norms          the order that the sample's held-out blocks choose, with norms fitted to the parent's
    chosen + low rank       that order with corrections of a low rank, at most --corrections of the row's parameters
    chosen + least squares  the same at full rank: the bound of what such corrections can do

Rows are uniform: of each budget the largest one that cuts neurons alone, and what `convert` chooses by size. Everything
measured is written at once, and a second start goes on where the first was stopped.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, save
from transformers import AutoModelForCausalLM

from flextron_trainer.conversion.convert import _elastic_config, _permute, _take
from flextron_trainer.conversion.corrections import put_corrections
from flextron_trainer.conversion.importance import measure
from flextron_trainer.conversion.orders import RANKINGS, rankings
from flextron_trainer.conversion.reconstruction import Corrections, reconstruct, within
from flextron_trainer.conversion.rows import choose_rows, mean_loss
from flextron_trainer.data import load_tokenizer
from modeling_flextron import SubNetwork, count_parameters
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import uniform_subnetworks

WAYS = {  # how corrections are fitted
    "": {},
    " and norms": {"norms": True},
    " of the parent's moments": {"sequential": False},
    " unweighted": {"weighted": False},
}


def blocks(path: Path, tokenizer: Any, length: int, count: int, seed: int) -> list[torch.Tensor]:
    """Random blocks of a text file, in batches of four."""
    ids = torch.tensor(tokenizer(path.read_text(errors="ignore"), verbose=False).input_ids)
    found = ids[: len(ids) // length * length].view(-1, length)
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return list(found[chosen].split(4))


def rows_of(config: Any, budgets: list[float]) -> dict[str, SubNetwork]:
    """Of each budget the largest uniform row that cuts neurons alone, and the one that is chosen by size."""
    size, found = config.parent_size(), {}
    chosen = held(choose_rows(config, {f"{budget:g}": budget for budget in budgets}, None))
    for budget in budgets:
        fitting = [s for s in uniform_subnetworks(config) if _size(config, s) <= budget * size]
        narrow = [s for s in fitting if s.heads[0] == config.built.heads[0] and s.layers == config.built.layers]
        if narrow:
            found[f"{budget:g} mlp"] = max(narrow, key=lambda s: _size(config, s))
        if (row := chosen.get(f"{budget:g}")) is not None and row not in found.values():
            found[f"{budget:g} chosen"] = row
    return found


def _size(config: Any, subnetwork: SubNetwork) -> int:
    return count_parameters(config, subnetwork, embeddings=False)


class Sample:
    """The figures of one calibration sample, kept in a file as soon as each is there.

    Args:
        model: Elastic, at full size; units in any order.
        rows: Name -> sub-network.
        tests: Name -> batches of a text.
        held_out: Batches of the sample that choose the order.
        losses: Line -> row -> text -> loss; filled here.
        keep: Writes the file.
    """

    def __init__(self, model: Any, rows: dict[str, SubNetwork], tests: dict[str, list], held_out: list, losses: dict,
                 keep: Callable[[], object]):  # fmt: skip
        self.model, self.rows, self.tests, self.held_out = model, rows, tests, held_out
        self.losses, self.keep = losses, keep

    def note(self, line: str, row: str, make: Callable[[], Corrections] | None = None) -> None:
        """Measure a row, with the corrections that `make` makes, unless it was measured before."""
        if row in self.losses.get(line, {}):
            return
        subnetwork, texts = self.rows.get(row, self.model.config.built), dict(self.tests)
        begin = time.perf_counter()
        corrections = make() if make else Corrections({}, {})
        place: dict[str, float] = {}
        if make:
            place["seconds"] = time.perf_counter() - begin
            place["share"] = corrections.parameters() / _size(self.model.config, subnetwork)
        elif row in self.rows:
            texts["held out"] = self.held_out
        put_corrections(self.model, {row: (subnetwork, corrections)} if make else {})
        for name, test in texts.items():
            place[name] = mean_loss(self.model, subnetwork, test)
        put_corrections(self.model, {})
        self.losses.setdefault(line, {})[row] = place
        self.keep()


def measured(args: argparse.Namespace, result: dict[str, Any], keep: Callable[[], object]) -> None:
    """Fill `result`, and `keep` it after every figure."""
    parent = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model)
    config = _elastic_config(parent.config, dict.fromkeys(("mlp", "heads", "hidden", "depth")))
    tests = {path.stem: blocks(path, tokenizer, args.length, args.test_blocks, 99) for path in args.test}
    rows = rows_of(config, args.budgets)
    result["rows"] = {name: row.to_dict() | {"share": _size(config, row) / config.parent_size()}
                      for name, row in rows.items()}  # fmt: skip
    for number in range(args.samples):
        model = _take(parent, config, release=False)
        batches = blocks(args.calibration, tokenizer, args.length, args.calibration_blocks, number)
        few = max(1, len(batches) // 8)
        seen, losses = batches[:-few], result["losses"].setdefault(str(number), {})
        sample = Sample(model, rows, tests, batches[-few:], losses, keep)
        sample.note("parent", "1")
        begin = time.perf_counter()
        found = rankings(model, measure(model, seen), seen, RANKINGS)
        result.setdefault("seconds", {}).setdefault("orders", time.perf_counter() - begin)
        for order, scores in found.items():
            _permute(model, scores)
            for row in rows:
                sample.note(order, row)
        best = min(found, key=lambda order: sum(losses[order][row]["held out"] for row in rows))
        result.setdefault("chosen", {})[str(number)] = best
        _permute(model, found[best])
        for row, subnetwork in rows.items():
            fit = partial(reconstruct, model, subnetwork, seen)
            sample.note("chosen + norms", row, lambda fit=fit: fit(ranks={}, norms=True)[0])
            for way in args.ways:
                low = partial(within, model, subnetwork, seen, args.corrections, **WAYS[way])
                sample.note(f"chosen + low rank{way}", row, low)
                sample.note(f"chosen + least squares{way}", row, lambda fit=fit, way=way: fit(**WAYS[way])[0])


def table(result: dict[str, Any]) -> str:
    """Losses above the parent, means over the samples that have them."""
    samples = result["losses"].values()
    texts = list(next(iter(samples), {}).get("parent", {}).get("1", {}))
    lines = [f"| nats above the parent | {' | '.join(f'{row}, {text}' for row in result['rows'] for text in texts)} |"]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    for line in dict.fromkeys(line for sample in samples for line in sample if line != "parent"):
        cells = []
        for row in result["rows"]:
            for text in texts:
                found = [
                    s[line][row][text] - s["parent"]["1"][text] for s in samples if text in s.get(line, {}).get(row, {})
                ]
                cells.append(f"{statistics.mean(found):.3f}" + f" ({len(found)})" if found else "-")
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id of the parent")
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--test", type=Path, nargs="+", default=[], help="text files that are not in it")
    parser.add_argument("--name", help="of the result; default: that of the model")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--corrections", type=float, default=0.03, help="share of a row's parameters")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=[""], help="how corrections are fitted")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--calibration-blocks", type=int, default=32)
    parser.add_argument("--test-blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    args = parser.parse_args()

    name = f"reconstruction-{args.name or Path(args.model or '').name}"
    path = RESULTS / f"{name}.json"
    if args.table:
        for each in [path] if path.exists() else sorted(RESULTS.glob("reconstruction-*.json")):
            print(f"{each.stem}\n\n{table(json.loads(each.read_text()))}\n")
        return
    settings = {
        key: str(value) for key, value in vars(args).items() if key in ("length", "calibration_blocks", "test_blocks")
    }
    result = (
        json.loads(path.read_text())
        if path.exists()
        else {"machine": machine("cpu"), "settings": settings, "losses": {}}
    )
    if result["settings"] != settings:
        parser.error(f"{path} was measured with {result['settings']}; pass the same, or another --name.")
    measured(args, result, lambda: save(name, result))
    print(table(result))


if __name__ == "__main__":
    main()
