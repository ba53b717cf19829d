"""A disk that fills up while a checkpoint is saved. Killed runs: `test_trainer.py`; at random: `kill.py`."""

import errno

import pytest
import torch
import transformers.modeling_utils
from training import losses, trainer

from flextron_trainer.training.run_folder import last_complete_checkpoint
from modeling_flextron.checkpoint import MARK

SAVES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "sampler": "random"}


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_full_disk_is_reported_and_the_checkpoint_before_stays(tmp_path, monkeypatch, where):
    whole = trainer(tmp_path / "whole", **SAVES)
    whole.train()
    module, name = (transformers.modeling_utils, "safe_save_file") if where == "weights" else (torch, "save")
    save = getattr(module, name)

    def full(*args, **kwargs):
        if "checkpoint-4" in str(args[1]):
            raise OSError(errno.ENOSPC, "No space left on device", str(args[1]))
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(OSError, match="No space left"):
            trainer(tmp_path / "run", **SAVES).train()
    assert (tmp_path / "run" / "checkpoint-4" / "config.json").exists() == (where == "optimizer")  # never half
    run = trainer(tmp_path / "run", **SAVES)
    assert last_complete_checkpoint(run.args.output_dir).endswith("checkpoint-2")
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(whole)


GUMBEL = {"stage": "router", "router_method": "gumbel", "router_budgets": [0.6], "teacher": None}


@pytest.mark.parametrize("changes", [{}, GUMBEL])
def test_a_finished_run_makes_no_further_step(tmp_path, changes):
    """And one that is resumed evaluates what routers added before it was stopped."""
    settings = {**SAVES, **changes, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(tmp_path, **settings)
    whole.train()
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        run = trainer(tmp_path, **settings)
        assert run.train(resume_from_checkpoint=checkpoint).global_step == 6 and losses(run) == losses(whole)
        assert evaluations(run) == evaluations(whole) and run.model.config.frontier == whole.model.config.frontier
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True))


def evaluations(run) -> list[dict[str, float]]:
    return [
        {name: value for name, value in log.items() if "loss" in name}
        for log in run.state.log_history
        if "eval_loss" in log
    ]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    run = trainer(tmp_path, **SAVES)
    run.train()
    for name in (".push-abc", ".checkpoint-8-abc", f".{tmp_path.name}-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).touch()  # nobody holds it
    (tmp_path / ".mine").mkdir()
    trainer(tmp_path, **SAVES).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob(".*")] == [".mine"]
    left = tmp_path / "checkpoint-4" / ".checkpoint-4-abc"  # else it would be pushed with the checkpoint
    left.mkdir()
    (left / MARK).touch()
    trainer(tmp_path, **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not list(tmp_path.glob("checkpoint-*/.*"))
