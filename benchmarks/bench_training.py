"""What a step of elastic training costs, in time and memory, and what the chunked loss saves.

    python benchmarks/bench_training.py                   # CPU, one thread, about 10 minutes
    python benchmarks/bench_training.py --device cuda --dtypes bfloat16 --batch 8 --sequence 1024 --rounds 30
    python benchmarks/bench_training.py --rounds 3 --no-save     # a quick look

Forward and backward of one batch, through `training_step` of `Trainer` (native) and `FlextronTrainer` (ours), without
the optimizer. The family has hidden size 512, 8 layers, 8 query heads in 4 groups, MLP 2048 and a vocabulary
of 8192; "0.5" has MLP 1024 and 4 heads, "0.25" MLP 512 and 4 heads.
    native 1, 0.5, 0.25   stock models of these shapes, learning from the text; control is a second "native 1"
    family 0.5            this one sub-network of the family, learning from the text
    masked 0.5            the same by masks: all neurons and heads run, and what is not in the sub-network is multiplied
                          by 0
    sandwich, self        1, 0.5 and 0.25 in one step; the full network of the step teaches (`teacher="self"`)
    sandwich, separate    the same, with a frozen stock model as the teacher
Times are compared in the same round. The peak is that of all tensors, weights included; those of the plain step and of
the sandwich are compared once more with longer rows, where activations and not gradients decide. The loss is compared
with full logits of student and teacher, `F.kl_div` and autograd, forward and backward. The last line is JSON, also
saved under docs/results/.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from common import against, interleaved, machine, peak_bytes, save
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments
from flextron_trainer.losses import Teacher, chunked_loss
from modeling_flextron import FlextronConfig, FlextronForCausalLM

SIZES = {"0.5": {"mlp": 1024, "heads": 4}, "0.25": {"mlp": 512, "heads": 4}}
BARS = {
    "width 0.5 / native 0.5, time": 1.10,
    "sandwich / sum of native steps, time": 1.10,
    "sandwich / plain step, peak memory": 1.10,
    "chunked / naive loss, peak memory": 0.4,
    "chunked / naive loss, time": 1.3,
}


def family(dtype: torch.dtype, device: str) -> FlextronForCausalLM:
    """A family with random weights and three rows, so that a sandwich of three is always the same."""
    torch.manual_seed(0)
    config = FlextronConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, elastic={"mlp": [2048, 1024, 512], "heads": [8, 4]},
    )  # fmt: skip
    config.frontier += [config.row(f"width-{name}", config.resolve(sizes)) for name, sizes in SIZES.items()]
    return FlextronForCausalLM(config).to(device, dtype)


class MaskedMLP(nn.Module):
    """All neurons run, and those that are not among the leading ones are multiplied by 0."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states, mlp=None, hidden=None, **kwargs):
        return self.mlp(hidden_states, gate=leading(self.mlp.up_proj.out_features, mlp, hidden_states), **kwargs)


class MaskedAttention(nn.Module):
    """All heads run, and the channels of those that are not among the leading ones are multiplied by 0."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, heads=None, **kwargs):
        size = None if heads is None else heads * self.attention.head_dim
        gate = leading(self.attention.q_proj.out_features, size, hidden_states)
        return self.attention(hidden_states, gate=gate, **kwargs)


def leading(size: int, kept: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """A mask of the leading `kept` of `size`."""
    return None if kept is None else (torch.arange(size, device=like.device) < kept).to(like.dtype)


def masked(model: FlextronForCausalLM) -> FlextronForCausalLM:
    """A copy of a family that masks where it would slice."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp, layer.self_attn = MaskedMLP(layer.mlp), MaskedAttention(layer.self_attn)
    return model


def runs_of(model: FlextronForCausalLM, folder: str, options: argparse.Namespace) -> dict[str, Trainer]:
    """The trainers that are compared."""
    common = {
        "output_dir": folder, "use_cpu": options.device == "cpu", "report_to": "none", "disable_tqdm": True,
        "loss_chunk_size": options.chunk,
    }  # fmt: skip
    one = {"sampler": "weighted", "sampling_weights": [0.0, 1.0, 0.0], "subnetworks_per_step": 1}
    rows = [{"input_ids": row} for row in torch.randint(0, 8192, (options.batch, options.sequence))]

    def ours(owner, teacher=None, **changes):
        arguments = FlextronTrainingArguments(**common, **changes)
        return FlextronTrainer(owner, arguments, teacher=teacher, train_dataset=rows)

    def native(budget):
        stock = model.extract(budget)
        return Trainer(stock, FlextronTrainingArguments(**common), train_dataset=rows)

    return {
        "native 1": native(None),
        "control": native(None),
        "native 0.5": native(SIZES["0.5"]),
        "native 0.25": native(SIZES["0.25"]),
        "family 0.5": ours(model, **one),
        "masked 0.5": ours(masked(model), **one),
        "sandwich, self": ours(model, "self"),
        "sandwich, separate": ours(model, model.extract(None)),
    }


def step_of(run: Trainer, rows: Iterable[dict[str, torch.Tensor]], device: str) -> Callable[[], torch.Tensor]:
    """One `training_step` on these rows."""
    ids = torch.stack([row["input_ids"] for row in rows]).to(device)
    inputs = {"input_ids": ids, "labels": ids}
    run.current_gradient_accumulation_steps = 1
    tokens = torch.tensor(ids[:, 1:].numel(), device=device)

    def step() -> torch.Tensor:
        run.model.zero_grad(set_to_none=True)
        return run.training_step(run.model, dict(inputs), num_items_in_batch=tokens)

    return step


def peak_of(name: str, runs: dict[str, Trainer], calls: dict[str, Callable], device: str) -> int:
    """Bytes of all tensors at the worst moment of a step, in which no other trainer has gradients."""
    for other in runs.values():
        other.model.zero_grad(set_to_none=True)
    teacher = getattr(runs[name], "teacher", None)
    models = [runs[name].model] if teacher is None else [runs[name].model, teacher]
    return peak_bytes(calls[name], device, *models)


def memory_at(sequence: int, runs: dict[str, Trainer], options: argparse.Namespace) -> dict[str, float]:
    """The peaks of a plain step and of a sandwich with rows of another length, where activations weigh more."""
    rows = [{"input_ids": row} for row in torch.randint(0, 8192, (options.batch, sequence))]
    chosen = {name: runs[name] for name in ("native 1", "sandwich, self")}
    calls = {name: step_of(run, rows, options.device) for name, run in chosen.items()}
    peaks = {name: peak_of(name, runs, calls, options.device) for name in chosen}
    ratio = round(peaks["sandwich, self"] / peaks["native 1"], 4)
    return {"ratio": ratio, "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()}}


def steps(dtype: str, options: argparse.Namespace) -> dict:
    """Times and peaks of all kinds of steps."""
    model = family(getattr(torch, dtype), options.device)
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(model, folder, options)
        calls = {name: step_of(run, run.train_dataset, options.device) for name, run in runs.items()}
        sliced, by_masks = calls["family 0.5"]().item(), calls["masked 0.5"]().item()
        assert abs(sliced - by_masks) < 1e-2, (sliced, by_masks)
        peaks = {name: peak_of(name, runs, calls, options.device) for name in runs}
        longer = memory_at(options.memory_sequence, runs, options)
        seconds = interleaved(calls, options.rounds, options.device)
    seconds["sum of native"] = [
        sum(times) for times in zip(*(seconds[f"native {size}"] for size in ("1", "0.5", "0.25")), strict=True)
    ]
    ratios = against(seconds, "native 1")
    of_sum = against(seconds, "sum of native")
    found = {
        "width 0.5 / native 0.5, time": against(seconds, "native 0.5")["family 0.5"],
        "sandwich / sum of native steps, time": of_sum["sandwich, self"],
        "sandwich / plain step, peak memory": {"ratio": round(peaks["sandwich, self"] / peaks["native 1"], 4)},
        f"sandwich / plain step, peak memory, rows of {options.memory_sequence} tokens": longer,
    }
    return {
        "dtype": dtype,
        "steps": {name: {**ratios[name], "peak_mib": round(peaks[name] / 2**20, 1)} for name in runs},
        "sandwich, separate / sum of native steps": of_sum["sandwich, separate"],
        "bars": {name: judged(name.partition(", rows of")[0], value) for name, value in found.items()},
    }


def judged(bar: str, ratios: dict[str, float]) -> dict:
    """A ratio with its bar."""
    return {**ratios, "bar": BARS[bar], "holds": ratios["ratio"] <= BARS[bar]}


def naive_loss(hidden, weight, teacher_hidden, teacher_weight):
    """Forward KL on logits that exist in full."""
    student = F.linear(hidden, weight).float().log_softmax(-1)
    teacher = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def losses(vocabulary: int, options: argparse.Namespace) -> dict:
    """The chunked loss against the naive one at a size of the vocabulary."""
    torch.manual_seed(0)
    tokens, size, device = options.loss_tokens, options.loss_hidden, options.device
    hidden, teacher_hidden = (torch.randn(tokens, size, device=device) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocabulary, size, device=device) / size**0.5 for _ in range(2))
    targets = torch.zeros(tokens, dtype=torch.long, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def chunked():
        return chunked_loss(
            hidden, weight, targets, teacher=Teacher(teacher_hidden, teacher_weight),
            chunk_size=options.chunk,
        )  # fmt: skip

    def naive():
        return naive_loss(hidden, weight, teacher_hidden, teacher_weight)

    def backward(loss):
        def run():
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    calls = {"naive": backward(naive), "control": backward(naive), "chunked": backward(chunked)}
    gradients, peaks = {}, {}
    for name in ("naive", "chunked"):
        hidden.grad = weight.grad = None
        peaks[name] = peak_bytes(calls[name], device)
        gradients[name] = weight.grad
    difference = (gradients["naive"] - gradients["chunked"]).abs().max() / gradients["naive"].abs().max()
    assert difference < 1e-4, difference
    del gradients
    ratios = against(interleaved(calls, options.loss_rounds, device, warm_up=1), "naive")
    memory = {"ratio": round(peaks["chunked"] / peaks["naive"], 4)}
    return {
        "vocabulary": vocabulary,
        "tokens": tokens,
        "hidden": size,
        "chunk": options.chunk,
        "losses": {name: {**ratios[name], "peak_mib": round(peaks[name] / 2**20, 1)} for name in ("naive", "chunked")},
        "control": ratios["control"],
        "bars": {
            "chunked / naive loss, peak memory": judged("chunked / naive loss, peak memory", memory),
            "chunked / naive loss, time": judged("chunked / naive loss, time", ratios["chunked"]),
        },
    }


def show(result: dict) -> None:
    """Tables of everything, and the bars."""
    console = Console(width=120)
    for part in result["steps"]:
        table = Table("step", "milliseconds", "time / native 1", "quartiles", "peak MiB", title=part["dtype"])
        for name, row in part["steps"].items():
            quartiles = f"{row['ratio_25']:.3f} to {row['ratio_75']:.3f}"
            table.add_row(
                name, f"{row['milliseconds']:.0f}", f"{row['ratio']:.3f}", quartiles, f"{row['peak_mib']:.0f}"
            )
        console.print(table)
    table = Table("vocabulary", "loss", "milliseconds", "time / naive", "peak MiB", title="losses")
    for part in result["losses"]:
        for name, row in part["losses"].items():
            cells = f"{row['milliseconds']:.0f}", f"{row['ratio']:.3f}", f"{row['peak_mib']:.0f}"
            table.add_row(f"{part['vocabulary']:,}", name, *cells)
    console.print(table)
    for part in (*result["steps"], *result["losses"]):
        for name, row in part["bars"].items():
            where = part.get("dtype") or f"vocabulary {part['vocabulary']:,}"
            verdict = "holds" if row["holds"] else "MISSED"
            console.print(f"{where}: {name}: {row['ratio']:.3f}, bar {row['bar']}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--memory-sequence", type=int, default=1024, help="Of the second comparison of peaks.")
    parser.add_argument("--chunk", type=int, default=512, help="Tokens whose logits exist at the same time.")
    parser.add_argument("--vocabularies", default="32000,128000")
    parser.add_argument("--loss-tokens", type=int, default=2048)
    parser.add_argument("--loss-hidden", type=int, default=256)
    parser.add_argument("--loss-rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    result: dict = {"benchmark": "training", "machine": machine(options.device), "options": vars(options)}
    result |= {"steps": [], "losses": []}

    def keep(part: str, row: dict) -> None:
        result[part].append(row)
        if not options.no_save:
            save(f"training_{options.device}", result)

    for dtype in filter(None, options.dtypes.split(",")):
        keep("steps", steps(dtype, options))
    for vocabulary in filter(None, options.vocabularies.split(",")):
        keep("losses", losses(int(vocabulary), options))
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
