"""What sub-networks are worth before any training: orders of units, sizes of layers, and what linear algebra repairs.

    python benchmarks/bench_reconstruction.py MODEL --calibration prose.txt --test other_prose.txt code.txt
    python benchmarks/bench_reconstruction.py MODEL ... --orders importance obs --calibration-blocks 128
    python benchmarks/bench_reconstruction.py --table                   # what was measured so far

MODEL is a folder or a Hub id. For each of several calibration samples and each budget of non-embedding parameters the
losses above the parent's are those of
    importance      units in the order of mean activation
    norms, variance, obs    the other orders (`flextron_trainer/conversion/orders.py`)
    chosen          of these the one that the sample's held-out blocks choose
    chosen + corrections    that order with corrections of at most --corrections of the row's parameters, fitted to what
                    the parent's layers write
    chosen + corrections, sequential    fitted layer by layer to what the corrected layers write, norms included
                    (--sequential)
    chosen + least squares  the first kind at full rank: the bound of what such corrections can do (--bounds)
With --hidden 0.75, too, of sub-networks that keep so many channels of the residual stream and everything else
    channels        those of the greatest activation
    channels, rotated   the leading principal axes (`convert(rotate=True)`)
    ... + corrections   the same with corrections, the better kind by held-out blocks

Rows are, of each budget, the largest uniform one that cuts neurons alone, what `convert` chooses by size, and ("by
layer") what it chooses with `uniform=False`. Everything measured is written at once, and a second start goes on where
the first was stopped.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, save, text_blocks
from transformers import AutoModelForCausalLM

from flextron_trainer import convert
from flextron_trainer.conversion.corrections import SEQUENTIAL, put_corrections
from flextron_trainer.conversion.importance import fingerprint, fingerprint_of_data, measure
from flextron_trainer.conversion.moment_files import moment_files
from flextron_trainer.conversion.orders import RANKINGS, rankings
from flextron_trainer.conversion.reconstruction import Corrections, from_inputs, reconstruct, sorted_moments
from flextron_trainer.conversion.rows import choose_rows, mean_loss
from flextron_trainer.conversion.sensitivity import (
    SENSITIVITY_TOKENS,
    predicted_losses,
    rows_by_prediction,
    sensitivities,
)
from flextron_trainer.conversion.sizes import family_config
from flextron_trainer.conversion.weights import permute, take
from flextron_trainer.data import load_tokenizer
from flextron_trainer.layerwise import portions_of
from modeling_flextron import SubNetwork, count_parameters
from modeling_flextron.frontier import held
from modeling_flextron.subnetwork import uniform_subnetworks

KINDS = ("mlp", "chosen", "by layer")


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
        begin = time.process_time()
        corrections = make() if make else Corrections({}, {})
        place: dict[str, float] = {}
        if make:
            place["cpu_seconds"] = time.process_time() - begin
            place["share"] = corrections.owner(row, subnetwork).parameters(self.model.config)
            place["share"] /= _size(self.model.config, subnetwork)
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
    config = family_config(parent.config, dict.fromkeys(("mlp", "heads", "hidden")) | {"depth": args.depth})
    tests = {
        path.stem: list(text_blocks(path, tokenizer, args.length, 99)[: args.test_blocks].split(4))
        for path in args.test
    }
    uniform, size = rows_of(config, args.budgets), config.parent_size()
    uniform = {name: row for name, row in uniform.items() if name.partition(" ")[2] in args.kinds}
    shares = {name: row.to_dict() | {"share": _size(config, row) / size} for name, row in uniform.items()}
    result.setdefault("rows", {}).update(shares)
    for number in range(args.samples):
        model = take(parent, config, release=False)
        text = text_blocks(args.calibration, tokenizer, args.length, number)
        batches = list(text[: args.calibration_blocks].split(4))
        few = max(1, len(batches) // 8)
        seen, losses = batches[:-few], result["losses"].setdefault(str(number), {})
        sample = Sample(model, dict(uniform), tests, batches[-few:], losses, keep)
        sample.note("parent", "1")
        seconds = result.setdefault("cpu_seconds", {}).setdefault(str(number), {})

        def timed(name: str, make: Callable[[], Any], seconds: dict[str, float] = seconds) -> Any:
            begin = time.process_time()
            found = make()
            seconds.setdefault(name, time.process_time() - begin)
            return found

        folder, about = args.moments and args.moments / str(number), fingerprint_of_data(config, seen)
        with moment_files(folder, config, fingerprint(model), about, wanted=True) as files:
            scores = timed("importance", partial(measure, model, seen))
            found = timed("orders", partial(rankings, model, scores, seen, args.orders, files))
            for order, each in found.items():
                permute(model, each)
                for row in uniform:
                    sample.note(order, row)
            best = min(found, key=lambda order: sum(losses[order][row]["held out"] for row in uniform))
            # Figures of an earlier start are of the order that it chose.
            best = result.setdefault("chosen", {}).setdefault(str(number), best)
            permute(model, found[best])
            metrics = timed("sensitivity", partial(sensitivities, model, next(portions_of(seen, SENSITIVITY_TOKENS))))
            predicted = predicted_losses(model, sorted_moments(model, seen, files), metrics, args.corrections)
            by_layer = rows_by_prediction(config, {f"{budget:g}": budget for budget in args.budgets}, predicted)
            for row in by_layer[1:] if "by layer" in args.kinds else ():
                sample.rows[f"{row.name} by layer"] = row.subnetwork
                result["rows"].setdefault(f"{row.name} by layer", row.to_dict()["subnetwork"])
                sample.note("chosen", f"{row.name} by layer")
            below = {name: row for name, row in sample.rows.items() if row.hidden == config.hidden_size}
            fitted: dict[str, dict[str, Corrections]] = {}
            for line, share in {"corrections": args.corrections, "least squares": 99.0}.items():
                missing = any(row not in losses.get(f"chosen + {line}", {}) for row in below)
                if missing and args.bounds if share > 1 else missing or args.sequential:
                    inputs = sorted_moments(model, seen, files)
                    fitted[line] = timed(line, partial(from_inputs, model, below, inputs, share, metrics))
                    for row, corrections in fitted[line].items():
                        sample.note(f"chosen + {line}", row, lambda corrections=corrections: corrections)
            for row, subnetwork in below.items() if args.sequential else ():
                how = {"ranks": fitted["corrections"][row].ranks, "metrics": metrics} | SEQUENTIAL
                fit = partial(reconstruct, model, subnetwork, seen, **how)
                sample.note("chosen + corrections, sequential", row, lambda fit=fit: fit()[0])
        channels(args, parent, text[: args.calibration_blocks], tests, losses, result["rows"], keep)


def channels(
    args: argparse.Namespace, parent: Any, text: torch.Tensor, tests: dict[str, list], losses: dict[str, Any],
    rows: dict[str, Any], keep: Callable[[], object],
) -> None:  # fmt: skip
    """Measure sub-networks that cut the residual stream alone, unless they were measured before."""
    for part, rotate, corrections in itertools.product(args.hidden, (False, True), (0.0, args.corrections)):
        line = f"channels{', rotated' * rotate}{' + corrections' * bool(corrections)}"
        row = f"{part:g} channels"
        if row in losses.get(line, {}):
            continue
        model = convert(
            parent, text, mlp=[1], heads=[1], hidden=[1, part], budgets=[1, part * (1.01 + corrections)],
            order="importance", rotate=rotate, corrections=corrections, batch_size=4,
        )  # fmt: skip
        small = list(held(model.config.frontier).values())[-1]
        rows.setdefault(row, small.to_dict())
        losses.setdefault(line, {})[row] = {name: mean_loss(model, small, test) for name, test in tests.items()}
        keep()


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
    parser.add_argument("--orders", nargs="+", choices=RANKINGS, default=list(RANKINGS))
    parser.add_argument("--depth", type=float, nargs="+", help="allowed parts of the layers; default: all layers")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of rows")
    parser.add_argument("--hidden", type=float, nargs="+", default=[], help="parts of the residual stream")
    parser.add_argument("--bounds", action="store_true", help="corrections of full rank, too")
    parser.add_argument("--sequential", action="store_true", help="the third kind of corrections, which takes longest")
    parser.add_argument("--moments", type=Path, help="folder to keep second moments in, for a run that goes on")
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
