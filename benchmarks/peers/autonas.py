"""AutoNAS of nvidia-modelopt on a LLaMA: a supernet over the MLP width of each layer, trained once, searched per ratio.

    FOLDER/modelopt/bin/python benchmarks/peers/autonas.py PARENT OUT --calibration rows.npy --ratio 0.75 0.5 \
        --train train.npy --steps 1000 --batch-size 16 --learning-rate 2e-3

Every step trains one random sub-network, as modelopt samples it, by distillation: the divergence of its predictions
from the parent's at all positions. AdamW and a cosine, as our own trainings. The evolutionary search begins at the
widest uniform network that fits, as random ones rarely meet a small ratio. Only MLP widths change, see `fastnas.py`.
"""

import math
from pathlib import Path
from typing import Any

import modelopt.torch.nas as mtn
import modelopt.torch.opt as mto
import numpy
import torch
from modelopt.torch.nas.autonas import EvolveSearcher
from modelopt.torch.nas.utils import get_subnet_config
from nas import limit, load, loss, quiet, score, space, widths
from shared import arguments, begin, write


def train(model: Any, teacher: Any, rows: torch.Tensor, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train the supernet in place; modelopt draws a sub-network in every forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warm) / (steps - warm)))
    )
    epochs = math.ceil(steps * batch_size / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])[: steps * batch_size]
    model.train()
    for batch in rows[order].split(batch_size):
        with torch.no_grad():
            target = teacher(batch).logits.flatten(0, 1).log_softmax(-1)
        ours = model(batch).logits.flatten(0, 1).log_softmax(-1)
        torch.nn.functional.kl_div(ours, target, log_target=True, reduction="batchmean").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def start(model: Any, width: int, path: Path) -> dict[str, Any]:
    """Settings of a search whose first parents have this width everywhere, as modelopt reads them from a file."""
    config = {name: width for name in get_subnet_config(model, configurable=True)}
    candidates = [{"config": config, "metric": -math.inf}] * 2
    history = {"metric": [], "constraints": {"flops": [], "params": []}}  # of plain types, which it can read back
    torch.save(EvolveSearcher().default_state_dict | {"candidates": candidates, "history": history}, path)
    return {"checkpoint": str(path), "population_size": 30, "candidate_size": 8}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train", type=Path, required=True, help="tokens to train on, int64 [N, S], in a .npy file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--candidates", type=int, default=150, help="sub-networks that a search looks at")
    options = parser.parse_args()
    parent, rows = begin(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        supernet = mtn.convert(load(options.parent), mode=[("autonas", space(parent, options.grid))])
        training = torch.from_numpy(numpy.load(options.train))
        train(supernet, load(options.parent), training, options.steps, options.batch_size, options.learning_rate)
        mto.save(supernet, options.out / "supernet.pth")
    for ratio in options.ratio:
        constraint, smallest = limit(parent, ratio, options.grid)
        width = parent.uniform(ratio, options.grid, [{}])["mlp"]
        with quiet():
            model = mto.restore(load(options.parent), options.out / "supernet.pth")
            settings = start(model, width, options.out / f"search-{ratio:g}.pth")
            model, _ = mtn.search(
                model, constraints=constraint, dummy_input=(rows[:1, :8],),
                config=score(rows) | settings | {"num_iters": options.candidates},
            )  # fmt: skip
        write(
            options.out, parent, model.state_dict(), {"mlp": widths(model)}, distribution="nvidia-modelopt",
            ratio=ratio, loss=loss(model, rows), peer="autonas", smallest_ratio=smallest, steps=options.steps,
            trained_with="distillation from the parent, one sub-network a step",
        )  # fmt: skip


if __name__ == "__main__":
    main()
