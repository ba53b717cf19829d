"""What begins, resumes and ends a run, and what is kept of it."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from modeling_flextron.checkpoint import sweep
from modeling_flextron.errors import invalid

from ..layerwise import ModelBlocks
from ..models import check_files
from .batches import first_batches, stored_length
from .block_stage import train_blocks
from .plan import MemoryPlan, plan_run
from .precision import in_float32
from .publishing import FamilyPublishing
from .router_stage import RouterStage
from .run_folder import begin_again, finished_state, last_complete_checkpoint, take_config, write_arguments
from .teacher_cache import TeacherCache

logger = logging.get_logger(__name__)


class ResumableRun(FamilyPublishing):
    """The part of a `FlextronTrainer` that begins, resumes, ends and saves a run.

    Attributes:
        teacher: Who is imitated, a model; None for nobody.
        cache: What a teacher predicts, read from a folder; None without one.
        routers: Those that learn in the stages `router` and `joint`; None in others.
    """

    teacher: Any
    cache: TeacherCache | None
    routers: RouterStage | None

    def plan(self, sequence_length: int | None = None) -> MemoryPlan:
        """The memory that training is expected to need.

        Args:
            sequence_length: Tokens in a row; None for those of the first row, where rows are stored.

        Raises:
            ValueError: no length, and rows are made when they are read, which is left to training.
        """
        length = sequence_length or stored_length(self.train_dataset)
        if length is None:
            rule = "The rows of this dataset are made when they are read, which is left to training."
            raise invalid("sequence_length", None, rule, "Say how many tokens a row has: `trainer.plan(1024)`.")
        return plan_run(self.model, self.teacher, self.args, length, self._sharded, self.compute_metrics is not None)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that is complete."""
        if self.args.stage == "blocks":
            if resume_from_checkpoint not in (True, False, None):
                rule = "Stage 'blocks' goes on from its output folder."
                raise invalid("resume_from_checkpoint", resume_from_checkpoint, rule, "Pass True.")
            return self._train_blocks(bool(resume_from_checkpoint))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if self.args.should_save:
                sweep(self.args.output_dir)
        self.model.config.training_runs = [*(self.model.config.training_runs or []), self.args.changed()]
        with in_float32(self.model, self._learning(), self.args.float32_weights) as rounded:
            result = self._resume(str(resume_from_checkpoint)) if resume_from_checkpoint else None
            if result is None:
                result = self._train(resume_from_checkpoint or None, **kwargs)
        if rounded:
            self.model.config.dtype = self.model.dtype
            self._forget()
        if self.routers is not None:
            size = self.args.per_device_eval_batch_size
            self.routers.finish(lambda: first_batches(self.train_dataset, self.data_collator, size, self.args.device))
        return result

    def _train_blocks(self, resume: bool) -> TrainOutput:
        """Let the layers learn one by one, and save the model, as layers that have learned lie in its folder."""
        kept, errors = train_blocks(ModelBlocks(self.model), self.args, self.train_dataset, self.data_collator, resume)
        self.save_model()
        kept.remove()
        return TrainOutput(self.model.config.training_runs[-1]["steps"], 0.0, errors)

    def _train(self, resume_from_checkpoint: str | None, **kwargs) -> TrainOutput:
        length = stored_length(self.train_dataset)
        if length is not None:
            logger.warning_once(str(self.plan(length)))
            if self.cache is not None:
                self.cache.check_text(self.train_dataset, self.data_collator)
        if self.model.is_activation_checkpointing and not self.args.activation_checkpointing:
            # Enabled by hand, it may be reentrant, which forgets gradients: see the arguments.
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        frozen = [] if self.routers is None else self.routers.freeze()
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            take_config(self.state.best_model_checkpoint, self.model, self.args)  # with the losses of these weights
        return result

    def _learning(self) -> set[str]:
        """Names of the parameters that are trained: all where most are, so that they have one dtype."""
        if self.args.stage == "router":
            return {name for name, _ in self.model.named_parameters() if ".router." in name}
        whole = not hasattr(self.model, "peft_config")
        return {name for name, parameter in self.model.named_parameters() if whole or parameter.requires_grad}

    def _forget(self) -> None:
        """Erase the figures of what is about to change."""
        if self.args.stage != "router" or self.args.router_method == "token":
            self.model.config.forget_measurements(only_routed=self.args.stage == "router")

    def _resume(self, checkpoint: str) -> TrainOutput | None:
        """Take what a checkpoint holds beside its weights, if they are those of this model.

        Returns:
            The end of a run that has made all its steps, of which the base class would make one more; None of another.
        """
        if not self._sharded and not hasattr(self.model, "peft_config"):
            check_files("resume_from_checkpoint", checkpoint, self.model)
        take_config(checkpoint, self.model, self.args)
        if self.routers is not None:
            self.routers.load(Path(checkpoint))
        state = finished_state(checkpoint, self.args.max_steps)
        if state is None:
            return None
        self.state = state
        self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def _save_checkpoint(self, model, trial) -> None:
        # The state is what `last_complete_checkpoint` looks for: in a folder that is written again it goes first.
        if self.args.should_save:
            begin_again(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with the arguments as JSON instead of a pickle, and with the routers."""
        if self.routers is not None:
            self.routers.write()
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.exists():
            if self.routers is not None:
                self.routers.save(folder)
            write_arguments(folder, self.args)
