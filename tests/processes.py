"""Several tiny runs in the processes of one launch: `accelerate launch ... processes.py FOLDER`."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from helpers import difference
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from training import losses, train, trainer
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from modeling_flextron import FlextronForCausalLM


class Traffic(TrainerCallback):
    """Counts the bytes of gradients that DDP sends."""

    def __init__(self, run):
        self.run, self.sent = run, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.model_wrapped.register_comm_hook(None, self.send)

    def send(self, group, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.sent += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(group, bucket)


def run_case(folder: Path, name: str, changes: dict) -> None:
    """Run one case on all processes; what every rank drew and what the first one logged lands in `folder/name`."""
    changes = dict(changes)
    traffic = changes.pop("traffic", False)
    resume, sharded = changes.pop("resume", None), changes.pop("sharded", False)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    begin = changes.pop("begin")
    how = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharded else {}
    model = FlextronForCausalLM.from_pretrained(begin, **how)
    if refused := changes.pop("refused", None):
        with pytest.raises(ValueError, match=refused):
            trainer(folder / name, model=model, **changes)
        return
    run = trainer(folder / name, model=model, **changes)
    assert run.accelerator.num_processes == 2
    counter = Traffic(run)
    if traffic:
        run.add_callback(counter)
    train(run, resume_from_checkpoint=resume)
    assert any(isinstance(p, DTensor) for p in run.model.parameters()) == (sharded or fsdp)
    drawn = [[str(draw) for draw in run.draws(step)] for step in range(6)]
    result = {"losses": losses(run), "draws": drawn, "metrics": run.evaluate(), "sent": counter.sent}
    (folder / f"{name}-{run.args.process_index}.json").write_text(json.dumps(result))
    run.save_model(folder / name / "final")
    if run.args.hub_model_id:
        run.push_to_hub()
    run.accelerator.wait_for_everyone()


def run_tensor_parallel(folder: Path, name: str, changes: dict) -> None:
    """Compare a model whose MLPs and embeddings two processes share with a whole one; in `folder/name` what it says."""
    plan = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}
    begin, ids = changes["begin"], torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    model, whole = FlextronForCausalLM.from_pretrained(begin, **plan), FlextronForCausalLM.from_pretrained(begin)
    small = FlextronForCausalLM.from_pretrained(begin, flextron_budget="0.35", **plan)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    result = {"same text": torch.equal(model.generate(ids, **greedy), whole.generate(ids, **greedy))}
    with torch.no_grad():
        result["loaded"] = difference(small(ids).logits, whole(ids, flextron_budget="0.35").logits)
    losses_of = [each(ids, labels=ids).loss for each in (model, whole)]
    result["loss"] = (losses_of[0] - losses_of[1]).abs().item()
    for loss in losses_of:
        loss.backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), whole.parameters(), strict=True)]
    result["gradients"] = max(difference(a.full_tensor() if isinstance(a, DTensor) else a, b) for a, b in pairs)
    calls = {
        "forward": lambda: model(ids, flextron_budget="0.35"),
        "generate": lambda: model.generate(ids, flextron_budget="0.35", **greedy),
        "list": lambda: model(ids, flextron_budget=[None, "0.35"]),
        "labels": lambda: model(ids, labels=ids, flextron_budget="0.35"),
        "set_budget": lambda: model.set_budget("0.35"),
        "share": lambda: model.share("0.35"),
        "draft": lambda: model.generate(ids[:1], draft_budget="0.35", **greedy),
        "extract": lambda: model.extract(),
        "train": lambda: trainer(folder / name, model=model),
    }
    for call, function in calls.items():
        with pytest.raises(ValueError) as refused:
            function()
        result[call] = str(refused.value)
    (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))


def run_levels(folder: Path, name: str, changes: dict) -> None:
    """Read parts of parts of a checkpoint in levels; in `folder/name` how far each model is from what is known."""
    result, ids = {}, torch.arange(1, 13)[None]
    known = torch.load(Path(changes["begin"], "expected.pt"))
    for kind in ("fsdp_size", "tp_size"):
        how = {"distributed_config": DistributedConfig(**{kind: 2})}
        for budget, expected in known.items():
            model = FlextronForCausalLM.from_pretrained(changes["begin"], flextron_budget=budget, **how)
            with torch.no_grad():
                logits = model(ids).logits
            logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
            result[f"{kind}, budget {budget}"] = difference(logits, expected)
    (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))


OTHER = {"tensor-parallel": run_tensor_parallel, "levels": run_levels}


def use_fsdp_on_cpu() -> None:
    """Let accelerate take its way for FSDP, which it does for accelerators alone; on gloo it works as well."""
    begin = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # the libraries, so that the Trainer's `gc.collect()` need not walk over them
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        use_fsdp_on_cpu()
    root = Path(sys.argv[1])
    for case, options in json.loads((root / "cases.json").read_text()).items():
        print(case, flush=True)
        OTHER.get(case, run_case)(root, case, options)
    torch.distributed.destroy_process_group()
