"""What loading a size costs: bytes downloaded, bytes read from the disk, memory and seconds, for every way to load it.

    python benchmarks/bench_loading.py                   # CPU, 2 minutes
    python benchmarks/bench_loading.py --rounds 2 --no-save     # a quick look

A family of 82 M parameters in float32 (327 MB; hidden 768, 12 layers, MLP 2048, vocabulary 8192, tied) with four rows.
    levels   `model.export`, loaded at the budget; control is the same again
    plain    `save_pretrained`, loaded at the budget
    slice    `save_pretrained`, loaded whole, then `extract(budget)`
    stock    a LLaMA of that size, saved and loaded by transformers alone
Each load runs in a fresh process with the files dropped from the cache of the system, in random order in every round,
and ends when one value of every page of the weights has been read. Bytes read are those that the system counts for the
process at the disk (`read_bytes` of /proc/self/io); where a file system does not count them, they are 0 and the bars on
them mean nothing, which is said. Bytes downloaded are those of the weight files that a process fetched from a Hub on
this machine (tests/hub_server.py). The last line is JSON, also saved under docs/results/.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import against, machine, save
from rich.console import Console
from rich.table import Table

from flextron_trainer.measuring.bench import loads_of
from flextron_trainer.measuring.loading import Load, fetched_bytes, measure_loads
from modeling_flextron import FlextronConfig, FlextronForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hub_server import HubServer, Repo

SIZES = {
    "large": {"mlp": 1536},
    "half": {"mlp": 1024, "heads": 8},
    "small": {"mlp": 512, "heads": 8, "hidden": 512, "layers": 9},
}
BARS = {"levels read / needed": 1.02, "levels / plain, time at full size": 1.2}


def family() -> FlextronForCausalLM:
    """A family with random weights."""
    torch.manual_seed(0)
    config = FlextronConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
        elastic={
            "mlp": [2048, 1536, 1024, 512], "heads": [12, 8, 4], "hidden": [768, 512], "depth": [12, 9],
            "layer_ranking": [3, 6, 9],
        },
    )  # fmt: skip
    config.frontier += [config.row(name, config.resolve(sizes)) for name, sizes in SIZES.items()]
    config.frontier[0] = replace(config.frontier[0], name="full")
    return FlextronForCausalLM(config)


def write(model: FlextronForCausalLM, root: Path) -> dict[str, dict[str, Load]]:
    """Save a model in every layout; budget -> ways to load it."""
    model.export(root / "levels")
    model.save_pretrained(root / "plain")
    ways = {}
    for name in (row["name"] for row in model.frontier):
        model.extract(name).save_pretrained(root / name)
        levels = Load(str(root / "levels"), name)
        ways[name] = {
            "levels": levels,
            "control": levels,
            "plain": Load(str(root / "plain"), name),
            "slice": Load(str(root / "plain"), name, how="slice"),
            "stock": Load(str(root / name), how="stock"),
        }
    return ways


def downloaded(root: Path, budgets: list[str]) -> dict[tuple[str, str], int]:
    """(layout, budget) -> bytes of the weight files that are fetched from a Hub, each time into an empty cache."""
    wanted = [*(("levels", name) for name in budgets), ("plain", budgets[-1])]
    found = {}
    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        for layout, name in wanted:
            files = {path.name: path.read_bytes() for path in (root / layout).iterdir() if path.is_file()}
            hub.repos[f"me/{layout}-{name}"] = Repo()
            hub.repos[f"me/{layout}-{name}"].add(files, "first", "main", None)
        measure_loads([Load(f"me/{layout}-{name}", name) for layout, name in wanted], hub.environment(home))
        for layout, name in wanted:
            gets = {path for path, _ in hub.gets(f"me/{layout}-{name}") if path.endswith(".safetensors")}
            found[layout, name] = sum(len(hub.files(f"me/{layout}-{name}")[path]) for path in gets)
            assert found[layout, name] == fetched_bytes(root / layout, name), (layout, name)
    return found | {("plain", name): found["plain", budgets[-1]] for name in budgets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default=None, help="Folder for the checkpoints (1 GB); by default a temporary one.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = family()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        ways = write(model, Path(folder))
        fetched = downloaded(Path(folder), list(ways))
        flat = {(name, way): load for name, loads in ways.items() for way, load in loads.items()}
        found = loads_of(flat, options.rounds)

    result: dict = {
        "benchmark": "loading",
        "machine": machine("cpu"),
        "rounds": options.rounds,
        "bars": {},
        "control": {},
    }
    result["rows"] = []
    table = Table(
        "budget", "way", "downloaded", "read", "read / needed", "peak memory", "seconds", "time / plain", "CPU s"
    )
    for name, loads in ways.items():
        seconds = {way: found[name, way]["all_seconds"] for way in loads}
        for way, ratios in against(seconds, "plain").items():
            row = found[name, way]
            layout = "levels" if way in ("levels", "control") else "plain"
            row["downloaded_bytes"] = row["parameter_bytes"] if way == "stock" else fetched[layout, name]
            result["rows"].append({"budget": name, "way": way, **row, "time / plain": ratios})
            read = "?" if row["read_bytes"] is None else f"{row['read_bytes'] / row['parameter_bytes']:.3f}"
            sizes = [f"{(row[key] or 0) / 1e6:.1f} MB" for key in ("downloaded_bytes", "read_bytes", "peak_bytes")]
            table.add_row(
                name, way, *sizes[:2], read, sizes[2], f"{row['seconds']:.2f}", f"{ratios['ratio']:.2f}",
                f"{row['cpu_seconds']:.2f}",
            )  # fmt: skip
        result["control"][name] = against(seconds, "levels")["control"]
    levels = [found[name, "levels"] for name in ways]
    measured = {
        "levels read / needed": max((row["read_bytes"] or 0) / row["parameter_bytes"] for row in levels),
        "levels / plain, time at full size": next(
            row["time / plain"]["ratio"] for row in result["rows"] if (row["budget"], row["way"]) == ("full", "levels")
        ),
    }
    console = Console(width=130)
    console.print(table)
    if not all(row["read_bytes"] for row in levels):
        console.print("This system does not count what is read from its disk: the first bar says nothing here.")
    for name, value in measured.items():
        holds = value <= BARS[name]
        result["bars"][name] = {"ratio": round(value, 4), "bar": BARS[name], "holds": holds}
        console.print(f"{name}: {value:.3f}, bar {BARS[name]}: {'holds' if holds else 'MISSED'}")
    if not options.no_save:
        save("loading_cpu", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
