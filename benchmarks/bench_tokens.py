"""What it costs that tokens choose their width: the routed MLP against a dense one at the average width.

    python benchmarks/bench_tokens.py                   # CPU, one thread, a minute
    python benchmarks/bench_tokens.py --device cuda --dtypes bfloat16

One MLP of hidden 768 and 2048 neurons, and one of 2048 and 5632. Each of the tokens of a prefill wants one of a few
widths; needs are drawn so that the average width is near 0.6 ("even": all widths alike; "easy": most tokens narrow).
Measured are
    dense    the dense MLP at the average width
    routed   sorting, and each increment of neurons on the tokens that want it, with the router itself
    masked   the full MLP and a mask
    full     the full MLP
and the ratio is the median over rounds of time / time of the dense MLP in the same round. Matrix products are counted:
those of the routed MLP must be exactly those of the chosen widths. The last line is JSON, also saved under
docs/results/.
"""

import argparse
import json

import torch
from common import against, interleaved, machine, save
from rich.console import Console
from rich.table import Table

from flextron_trainer.training.router_stage import add_token_routers
from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.token_routing import TokenRouting

SHAPES = {"768/2048": (768, 2048, 12), "2048/5632": (2048, 5632, 32)}


def measured(shape: str, dtype: torch.dtype, kind: str, options: argparse.Namespace) -> dict:
    """Ratios of one shape, dtype and distribution of widths."""
    hidden, neurons, heads = SHAPES[shape]
    torch.manual_seed(0)
    sizes = [neurons * part // options.sizes for part in range(options.sizes, 0, -1)]
    config = FlextronConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=1, num_attention_heads=heads,
        elastic={"mlp": sizes}, tie_word_embeddings=True,
    )  # fmt: skip
    model = FlextronForCausalLM(config).to(options.device, dtype).eval()
    add_token_routers(model, [1.0])
    module = model.model.layers[0].mlp
    states = torch.randn(1, options.tokens, hidden, device=options.device, dtype=dtype)
    with torch.no_grad():
        module.router.weight.normal_(0, 0.28)
        module.router.bias.fill_(0.55)
    if kind == "easy":
        with torch.no_grad():
            module.router.weight.normal_(0, 0.2)
            module.router.bias.fill_(0.3)
    routing = TokenRouting(model.config, model.config.resolve("auto"))
    with torch.no_grad():
        routing.feed(module, states, None, None)
    chosen = routing.mlp[0]
    average = chosen.float().mean().item()
    counted = []
    block = module.up_proj.block

    def counting(inputs, rows, columns, total=None):
        counted.append(len(inputs) * (rows.stop - rows.start))
        return block(inputs, rows, columns, total)

    module.up_proj.block = counting
    with torch.no_grad():
        routing.feed(module, states, None, None)
    del module.up_proj.block
    assert sum(counted) == int(chosen.sum()), "more was computed than chosen"
    gate = (torch.arange(neurons, device=options.device) < chosen[..., None]).to(dtype)
    width = round(average)

    def variant(call):
        def run():
            with torch.inference_mode():
                for _ in range(options.repeats):
                    call()

        return run

    seconds = interleaved(
        {
            "dense": variant(lambda: module(states, width)),
            "control": variant(lambda: module(states, width)),
            "routed": variant(lambda: routing.feed(module, states, None, None)),
            "masked": variant(lambda: module(states, gate=gate)),
            "full": variant(lambda: module(states)),
        },
        options.rounds,
        options.device,
    )
    return {
        "shape": shape, "dtype": str(dtype).removeprefix("torch."), "widths": kind, "average": average / neurons,
        **against(seconds, "dense"),
    }  # fmt: skip


def main() -> None:
    """Measure, save after every part, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sizes", type=int, default=8, help="Widths that a token can choose from.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2, help="Calls that are timed as one.")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    result: dict = {"benchmark": "tokens", "machine": machine(options.device), "options": vars(options), "rows": []}
    table = Table(title=f"MLP time / that of a dense MLP at the average width, {options.tokens} tokens")
    for title in ("shape", "dtype", "widths", "average", "routed", "masked", "full", "control"):
        table.add_column(title)
    for shape in SHAPES:
        for dtype in options.dtypes:
            for kind in ("even", "easy"):
                row = measured(shape, getattr(torch, dtype), kind, options)
                result["rows"].append(row)
                ratios = [f"{row[name]['ratio']:.2f}" for name in ("routed", "masked", "full", "control")]
                table.add_row(shape, dtype, kind, f"{row['average']:.2f}", *ratios)
                if not options.no_save:
                    save(f"tokens_{options.device}", result)
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
