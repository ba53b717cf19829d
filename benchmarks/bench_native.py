"""What elasticity costs: a sub-network against a native `LlamaForCausalLM` of the same shape, in one run.

    python benchmarks/bench_native.py                   # CPU, one thread, fp32 and bf16, about 15 minutes
    python benchmarks/bench_native.py --device cuda --rounds 60 --shapes 80M,1B
    python benchmarks/bench_native.py --rounds 5 --dtypes float32 --no-save     # a quick look
    python benchmarks/bench_native.py --corrections 0.03 --dtypes float32    # the family with against without them
    python benchmarks/bench_native.py --rounds 60 --shapes trivial --tasks decode --no-save    # what Python costs

The family "80M" has 82 M parameters (hidden 768, 12 layers, 12 query heads in 4 groups, MLP 2048, vocabulary 8192,
tied). Measured are its sub-networks "width" (MLP 1024, 8 heads) and "hidden+depth" (hidden 512, 9 layers, MLP 1024, 8
heads); of "1B", the shape of TinyLlama, MLP 2816, 16 heads, and hidden 1536, 17 layers. "trivial" has twelve layers
whose products cost next to nothing, so that what is left is Python; its second size keeps all of them.
    family   the switchable model with all sizes in memory
    loaded   a model loaded at that budget
against the stock model that `extract()` returns, and
    control  a second extracted copy: the same against the same; when it is off by more than 2 %, distrust the row.
The logits of all four must be equal, and neither `set_budget` nor `share` may copy a weight. The ratio is the median
over rounds of time / time of the stock model in the same round. The last line is JSON, also saved under docs/results/.
`flextron bench` measures the same for a model of yours.
"""

import argparse
import copy
import json
import tempfile

import torch
from common import against, interleaved, machine, save
from rich.console import Console
from rich.table import Table

from flextron_trainer.measuring.bench import (
    decoding,
    forward,
    logits_difference,
    switching,
    tokens_per_second,
    variants_of,
)
from modeling_flextron import FlextronConfig, FlextronForCausalLM, count_parameters
from modeling_flextron.corrections import PROJECTIONS, Owner

SHAPES = {
    "trivial": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "elastic": {"mlp": [128, 64], "heads": [8, 4], "hidden": [64, 48]},
    },
    "80M": {
        "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "elastic": {
            "mlp": [2048, 1024], "heads": [12, 8, 4], "hidden": [768, 512], "depth": [12, 9],
            "layer_ranking": [3, 6, 9],
        },
    },
    "1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
        "elastic": {
            "mlp": [5632, 2816], "heads": [32, 16], "hidden": [2048, 1536], "depth": [22, 17],
            "layer_ranking": [4, 8, 12, 16, 20],
        },
    },
}  # fmt: skip
SIZES = {
    "trivial": {
        "width": {"mlp": 64, "heads": 4},
        "hidden": {"mlp": 64, "heads": 4, "hidden": 48},
    },
    "80M": {
        "width": {"mlp": 1024, "heads": 8},
        "hidden+depth": {"mlp": 1024, "heads": 8, "hidden": 512, "layers": 9},
    },
    "1B": {
        "width": {"mlp": 2816, "heads": 16},
        "hidden+depth": {"mlp": 2816, "heads": 16, "hidden": 1536, "layers": 17},
    },
}
BARS = {"prefill": 1.03, "decode": 1.05, "train": 1.10, "switch_milliseconds": 1.0, "extra_bytes": 0}


def family(shape: str, dtype: torch.dtype, device: str) -> FlextronForCausalLM:
    """A family with random weights."""
    torch.manual_seed(0)
    config = FlextronConfig(**SHAPES[shape], max_position_embeddings=2048)
    return FlextronForCausalLM(config).to(device, dtype).eval()


def training(model, extra, ids):
    def run():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False, **extra).loss.backward()

    return run


def corrected(model: FlextronForCausalLM, sizes: dict, share: float) -> FlextronForCausalLM:
    """A copy of a family in which a size owns corrections of this share of its parameters, of one rank everywhere."""
    model = copy.deepcopy(model)
    row, config = model.resolve_budget(sizes), model.config
    one, none = (
        Owner("row", row, dict.fromkeys(PROJECTIONS, (rank,) * len(row.layers))).parameters(config) for rank in (1, 0)
    )
    rank = int((share * count_parameters(config, row, embeddings=False) - none) / (one - none))
    model.model.set_owners([Owner("row", row, dict.fromkeys(PROJECTIONS, (rank,) * len(row.layers)))])
    return model.eval()


def with_corrections(options: argparse.Namespace) -> None:
    """Print what decoding with corrections takes, as a ratio to the same family without."""
    for shape, dtype in ((s, d) for s in options.shapes.split(",") for d in options.dtypes.split(",")):
        model = family(shape, getattr(torch, dtype), options.device)
        for size, sizes in SIZES[shape].items():
            models = {"plain": model, "control": model, "corrected": corrected(model, sizes, options.corrections)}
            for batch in (1, 8):
                ids = torch.randint(0, model.config.vocab_size, (batch, 64), device=options.device)
                extra = {"flextron_budget": model.resolve_budget(sizes)}
                functions = {name: decoding(one, extra, ids) for name, one in models.items()}
                ratios = against(interleaved(functions, options.rounds, options.device), "plain")
                found = {name: ratios[name]["ratio"] for name in ("control", "corrected")}
                print(json.dumps({"shape": shape, "dtype": dtype, "size": size, "batch": batch, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", default="80M")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tasks", default="prefill,decode,train")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--corrections", type=float, default=0.0, help="share that a size owns; measures that alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.corrections:
        return with_corrections(options)

    result = {"machine": machine(options.device), "rounds": options.rounds, "bars": BARS, "rows": []}
    result |= {"switching": {}, "speed": [], "slower": []}
    table = Table("shape", "dtype", "size", "what", "native ms", "control", "family", "loaded", "bar", "holds")
    for shape, dtype in ((shape, dtype) for shape in options.shapes.split(",") for dtype in options.dtypes.split(",")):
        model = family(shape, getattr(torch, dtype), options.device)
        place = {"shape": shape, "dtype": dtype}
        switched = switching(model, list(SIZES[shape].values()))
        result["switching"][f"{shape} {dtype}"] = switched
        assert switched["set_budget_bytes"] == switched["share_bytes"] == BARS["extra_bytes"], switched
        ids = torch.randint(0, model.config.vocab_size, (8, 512), device=options.device)
        for size, sizes in SIZES[shape].items():
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                variants = variants_of(model, folder, sizes)
            difference = logits_difference(variants, ids[:1, :64])
            assert difference < (1e-5 if dtype == "float32" else 3e-2), difference
            tasks = {
                "prefill 512": {name: forward(*pair, ids[:1]) for name, pair in variants.items()},
                "decode batch 1": {name: decoding(*pair, ids[:1, :64]) for name, pair in variants.items()},
                "decode batch 8": {name: decoding(*pair, ids[:, :64]) for name, pair in variants.items()},
                "train 2 x 256": {name: training(*pair, ids[:2, :256]) for name, pair in variants.items()},
            }
            for what, functions in tasks.items():
                if what.split()[0] not in options.tasks.split(","):
                    continue
                ratios = against(interleaved(functions, options.rounds, options.device), "native")
                for owner, _ in variants.values():
                    owner.zero_grad(set_to_none=True)
                bar = BARS[what.split()[0]]
                holds = {name: ratios[name]["ratio"] <= bar for name in ("family", "loaded")}
                result["rows"].append({**place, "size": size, "what": what, "bar": bar, "holds": holds, **ratios})
                shown = [f"{ratios[name]['ratio']:.3f}" for name in ("control", "family", "loaded")]
                verdict = "both" if all(holds.values()) else ", ".join(name for name in holds if holds[name]) or "none"
                milliseconds = f"{ratios['native']['milliseconds']:.2f}"
                table.add_row(shape, dtype, size, what, milliseconds, *shown, f"{bar}", verdict)
                if not options.no_save:
                    save(f"native_{options.device}", result)
        budgets = {"full": None, **SIZES[shape]}
        sub_networks = {
            name: (model, {"flextron_budget": model.resolve_budget(sizes)}) for name, sizes in budgets.items()
        }
        speed, slower = tokens_per_second(sub_networks, [ids[:1]], options.rounds)
        result["speed"] += [{**place, **row} for row in speed]
        result["slower"] += [{**place, **row} for row in slower]
    if not options.no_save:
        save(f"native_{options.device}", result)
    console = Console(width=120)
    console.print(table)
    for row in result["speed"]:
        console.print("{shape} {dtype} {what} at {budget}: {tokens_per_second} tokens per second".format(**row))
    console.print("slower than the next larger size:", result["slower"] or "none")
    slowest = max(entry["milliseconds"] for entry in result["switching"].values())
    holds = slowest <= BARS["switch_milliseconds"]
    console.print(f"set_budget: {slowest} ms (bar {BARS['switch_milliseconds']}: {'holds' if holds else 'missed'})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
