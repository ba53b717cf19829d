"""A disk that fills up while a checkpoint is saved. Killed runs: `test_trainer.py`; at random: `kill.py`."""

import errno

import pytest
import torch
import transformers.modeling_utils
from training import losses, trainer

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
    assert run._last_complete_checkpoint().endswith("checkpoint-2")
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(whole)


def test_a_finished_run_makes_no_further_step(tmp_path):
    whole = trainer(tmp_path, **SAVES, lr_scheduler_type="constant")
    whole.train()
    run = trainer(tmp_path, **SAVES, lr_scheduler_type="constant")
    assert run.train(resume_from_checkpoint=True).global_step == 6 and losses(run) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True))
