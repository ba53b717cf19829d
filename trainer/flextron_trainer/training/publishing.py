"""Pushes of a training run: whole models and checkpoints in one commit each, with a card and without pickles."""

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..hub import commit_written
from ..models import load_elastic
from ..publishing.card import write_model_card
from .arguments import FlextronTrainingArguments
from .checks import check_saved_whole
from .run_folder import push_checkpoint


class FamilyPublishing(Trainer):
    """The part of a `FlextronTrainer` that pushes, and writes cards."""

    model: Any
    args: FlextronTrainingArguments
    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    @property
    def _sharded(self) -> bool:
        """Tell whether every process holds a part of each weight (FSDP)."""
        return self.is_fsdp_enabled or self.is_distributed_loading_by_transformers

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint with its card in the background: one commit, and no pickles."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = push_checkpoint(
            Path(checkpoint_folder),
            self.args,
            self.hub_model_id,
            lambda folder: write_model_card(self.model, folder, self.hub_model_id),
        )
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """Save the model and its card, and push them with the tokenizer: `FlextronForCausalLM.push_to_hub`.

        Args:
            commit_message, token, revision, private: as in `Trainer.push_to_hub`.
            blocking: False returns a `Future`; what is pushed is written by then.
            kwargs: `create_pr` and `commit_description`; of a whole model `tags` and `max_shard_size` as well.

        Raises:
            ValueError: an adapter on a sharded model, or a sharded model that is not saved whole.
        """
        if self._sharded:
            check_saved_whole(self.model, getattr(self.accelerator.state, "fsdp_plugin", None))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all processes
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        self._finish_current_push()
        kwargs |= {
            "blocking": blocking,
            "commit_message": commit_message,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
        }
        if hasattr(self.model, "peft_config"):
            return commit_written(self._write_adapter, **kwargs)
        kwargs |= {
            "tokenizer": self.processing_class,
            "private": self.args.hub_private_repo if private is None else private,
        }
        # One process cannot gather the weights of all; what they just saved together is whole.
        model = load_elastic(self.args.output_dir) if self._sharded else self.model
        return model.push_to_hub(self.hub_model_id, **kwargs)

    def _write_adapter(self, folder: str) -> str:
        """Write the adapter, its card and the tokenizer into a folder; return the repo that they are for."""
        assert self.hub_model_id is not None
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        shutil.copy(Path(self.args.output_dir, "README.md"), folder)
        return self.hub_model_id

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card of the elastic model: its frontier, how to load it, how it was trained."""
        if hasattr(self.model, "peft_config"):
            super().create_model_card(*args, **kwargs)  # of the adapter, which is all there is to push
        elif self.is_world_process_zero():
            write_model_card(self.model, self.args.output_dir, self.hub_model_id)
