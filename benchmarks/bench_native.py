"""What elasticity costs: a sub-network against a native `LlamaForCausalLM` of the same shape, in one run.

    python benchmarks/bench_native.py                   # CPU, one thread, fp32 and bf16, about 15 minutes
    python benchmarks/bench_native.py --device cuda --rounds 60
    python benchmarks/bench_native.py --rounds 5 --dtypes float32 --no-save     # a quick look

The family has 82 M parameters (hidden 768, 12 layers, 12 query heads in 4 groups, MLP 2048, vocabulary 8192, tied).
Measured are its sub-networks "width" (MLP 1024, 8 heads) and "hidden+depth" (hidden 512, 9 layers, MLP 1024, 8
heads) as
    family   the switchable model with all sizes in memory
    loaded   a model loaded at that budget
against the stock model that `extract()` returns, and
    control  a second extracted copy: the same against the same; when it is off by more than 2 %, distrust the row.
The logits of all four must be equal. The ratio is the median over rounds of time / time of the stock model in the
same round. The last line is JSON, also saved under docs/results/.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from common import against, interleaved, machine, save
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from modeling_flextron import FlextronConfig, FlextronForCausalLM

SIZES = {
    "width": {"mlp": 1024, "heads": 8},
    "hidden+depth": {"mlp": 1024, "heads": 8, "hidden": 512, "layers": 9},
}
BARS = {"prefill": 1.03, "decode": 1.05, "train": 1.10}


def family(dtype: torch.dtype, device: str) -> FlextronForCausalLM:
    """A family with random weights."""
    torch.manual_seed(0)
    config = FlextronConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
        elastic={
            "mlp": [2048, 1024], "heads": [12, 8, 4], "hidden": [768, 512], "depth": [12, 9],
            "layer_ranking": [3, 6, 9],
        },
    )  # fmt: skip
    return FlextronForCausalLM(config).to(device, dtype).eval()


def variants_of(model: FlextronForCausalLM, sizes: dict) -> dict:
    """The four models of one size: name -> (model, keywords of its forward pass)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = FlextronForCausalLM.from_pretrained(folder, flextron_budget=sizes).to(model.device)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()  # nothing stays mapped from the file
    return {
        "native": (model.extract(sizes), {}),
        "control": (model.extract(sizes), {}),
        "family": (model, {"flextron_budget": model.resolve_budget(sizes)}),
        "loaded": (loaded, {}),
    }


def forward(model, extra, ids):
    def run():
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1, **extra)

    return run


def decoding(model, extra, ids, steps):
    """`steps` tokens one by one behind a context that is in the cache."""
    with torch.inference_mode():
        filled = model(ids, use_cache=True, **extra).past_key_values
        token = ids[:, -1:]

    def run():
        cache = DynamicCache(config=model.config)
        for layer, source in enumerate(filled.layers):
            if source.is_initialized:
                cache.update(source.keys, source.values, layer)
        with torch.inference_mode():
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True, **extra)

    return run


def training(model, extra, ids):
    def run():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False, **extra).loss.backward()

    return run


def equal_logits(variants: dict, ids: torch.Tensor) -> float:
    """Largest difference of the logits to those of the native model, relative to their size."""
    with torch.inference_mode():
        native = variants["native"][0](ids).logits.float()
        others = [model(ids, **extra).logits.float() for model, extra in variants.values()]
    return max((native - other).abs().max().item() for other in others) / native.abs().max().item()


def switching(model: FlextronForCausalLM) -> float:
    """Milliseconds of `set_budget`, the median over the sizes."""
    times = []
    for _ in range(50):
        for sizes in SIZES.values():
            start = time.perf_counter()
            model.set_budget(sizes)
            times.append(time.perf_counter() - start)
    model.set_budget(None)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    result = {"machine": machine(options.device), "rounds": options.rounds, "bars": BARS, "rows": []}
    table = Table("dtype", "size", "what", "native ms", "control", "family", "loaded", "bar")
    for dtype in options.dtypes.split(","):
        model = family(getattr(torch, dtype), options.device)
        result["switch_milliseconds"] = round(switching(model), 4)
        for size, sizes in SIZES.items():
            variants = variants_of(model, sizes)
            ids = torch.randint(0, 8192, (8, 512), device=options.device, generator=None)
            difference = equal_logits(variants, ids[:1, :64])
            assert difference < (1e-5 if dtype == "float32" else 3e-2), difference
            tasks = {
                "prefill 512": {name: forward(*pair, ids[:1]) for name, pair in variants.items()},
                "decode batch 1": {name: decoding(*pair, ids[:1, :64], 16) for name, pair in variants.items()},
                "decode batch 8": {name: decoding(*pair, ids[:, :64], 16) for name, pair in variants.items()},
                "train 2 x 256": {name: training(*pair, ids[:2, :256]) for name, pair in variants.items()},
            }
            for what, functions in tasks.items():
                ratios = against(interleaved(functions, options.rounds, options.device), "native")
                for owner, _ in variants.values():
                    owner.zero_grad(set_to_none=True)
                bar = BARS[what.split()[0]]
                result["rows"].append({"dtype": dtype, "size": size, "what": what, "bar": bar, **ratios})
                shown = [f"{ratios[name]['ratio']:.3f}" for name in ("control", "family", "loaded")]
                table.add_row(dtype, size, what, f"{ratios['native']['milliseconds']:.2f}", *shown, f"{bar}")
                if not options.no_save:
                    save(f"native_{options.device}", result)
    Console().print(table)
    Console().print(f"set_budget: {result['switch_milliseconds']} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
