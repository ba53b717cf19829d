"""A tiny training run, used in this process and in others: `python training.py OUTPUT JSON_OF_ARGUMENTS`."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import elastic_of, parent_of

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments
from modeling_flextron import FlextronForCausalLM

VARIANT = "gqa-wide-heads"


def rows(count: int = 64, length: int = 16, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Token rows with a pattern to learn, some of them shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(1, 96, (count, 1), generator=generator)
    ids = (start + 3 * torch.arange(length)) % 95 + 1
    return [{"input_ids": row[: length - (i % 3)]} for i, row in enumerate(ids)]


def arguments(output: str | os.PathLike, **changes) -> FlextronTrainingArguments:
    return FlextronTrainingArguments(
        **{
            "output_dir": str(output),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def with_adapter(model: FlextronForCausalLM, target_modules: str | list[str] = "all-linear", **settings):
    """A model with a LoRA, the same each time."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=target_modules, **settings))


def trainer(
    output: str | os.PathLike, *, variant=VARIANT, teacher="parent", model=None, begin=None, adapter=None,
    callbacks=None, **changes,
) -> FlextronTrainer:  # fmt: skip
    """A trainer of `model`, or of the one saved in `begin`, or of a fresh one; `teacher="parent"` is its parent.

    `adapter`: settings of a LoRA, which is trained alone.
    """
    parent = parent_of(variant)
    if begin is not None:
        model = FlextronForCausalLM.from_pretrained(begin)
    if adapter is not None:
        model = with_adapter(model, **adapter)
    return FlextronTrainer(
        model or elastic_of(variant),
        arguments(output, **changes),
        teacher=parent if teacher == "parent" else teacher,
        train_dataset=rows(),
        eval_dataset=rows(9, seed=4),
        callbacks=callbacks,
    )


def train(run: FlextronTrainer, **how) -> None:
    """Train, where a surrogate of a few steps learns nothing and is refused."""
    if run.args.stage == "router" and run.args.router_method == "surrogate":
        with pytest.raises(ValueError, match="no router is written"):
            run.train(**how)
    else:
        run.train(**how)


def losses(run) -> list[dict[str, float]]:
    """The training logs of a run without times."""
    timed = ("epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    timed += ("train_tokens_per_second",)
    kept = [log for log in run.state.log_history if "loss" in log]
    return [{key: value for key, value in log.items() if key not in timed} for log in kept]


def kill_during_the_second_save(where: str) -> None:
    """Arrange for SIGKILL in the middle of the second checkpoint."""
    import transformers.modeling_utils
    from transformers import TrainerState

    saves = []

    def killing(original):
        def save(*args, **kwargs):
            saves.append(1)
            if len(saves) == 2:
                target = args[1]
                Path(target).write_bytes(b"{")  # half a file
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return save

    if where == "weights":
        transformers.modeling_utils.safe_save_file = killing(transformers.modeling_utils.safe_save_file)
    else:
        TrainerState.save_to_json = killing(TrainerState.save_to_json)


if __name__ == "__main__":
    output, changes = sys.argv[1], json.loads(sys.argv[2])
    kill_at, kill_in_save = changes.pop("kill_at", None), changes.pop("kill_in_save", None)
    resume = changes.pop("resume", None)
    run = trainer(output, **changes)
    if kill_in_save:
        kill_during_the_second_save(kill_in_save)
    if kill_at is not None:
        step = run.training_step

        def killing(*args, **kwargs):
            if run.state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        run.training_step = killing
    run.train(resume_from_checkpoint=resume)
    if run.is_world_process_zero():
        history = {"losses": losses(run), "processes": run.accelerator.num_processes}
        Path(output, "history.json").write_text(json.dumps(history))
        run.model.save_pretrained(Path(output, "final"))
