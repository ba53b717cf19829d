"""`FlextronTrainer`: a `Trainer` whose every step trains several sizes of the same weights.

Stage `elastic` (elastic continued training of Flextron, arXiv 2406.10260; distillation as in Nemotron Elastic, arXiv
2511.16664): for every batch a few sub-networks are drawn (`sampling.py`), each runs forward and backward on its own,
so that memory is that of one, and the optimizer steps once. The teacher's hidden states are computed once for a
batch. Everything else is the ordinary Trainer.
"""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from modeling_flextron import FlextronConfig
from modeling_flextron.adapters import claim
from modeling_flextron.checkpoint import sweep
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.hub import commit_written
from modeling_flextron.model_card import write_model_card
from modeling_flextron.positions import places_in_documents

from ..data import collator
from ..evaluation.quality import FIGURES, measured_sizes, quality, score_sizes
from ..losses import HeadLoss, Teacher
from ..models import check_files, load_elastic, load_stock
from .arguments import FlextronTrainingArguments
from .checks import (
    REFUSED_KEYWORDS,
    check_arguments,
    check_batch,
    check_finite,
    check_model,
    check_output_layer,
    check_saved_whole,
    warn_about_untrained_sizes,
)
from .plan import MemoryPlan, plan_memory
from .precision import in_float32
from .router_stage import GAP_IN_NATS, RouterStage, first_batches
from .run_folder import begin_again, finished_state, last_complete_checkpoint, push_checkpoint, write_arguments
from .sampling import Draw, draw
from .teachers import check_documents, prepare_teacher, read_by_teacher

logger = logging.get_logger(__name__)


class FlextronTrainer(Trainer):
    """Trains an elastic model at many sizes at once.

    Args:
        model: A `FlextronForCausalLM`, or the folder or Hub id of one; or a `PeftModel` of one, of which the adapter
            alone is trained and saved.
        args: `FlextronTrainingArguments`.
        teacher: Who is imitated: a model, its folder or Hub id (usually the parent), `"self"` (the full network of
            the same step, which then learns from the text; no second copy), or None to learn from the text alone. A
            model that is on a GPU already, or quantized, stays where it is. It has the tokenizer of the model; where
            one of them has more tokens, those that both have are compared.
        trust_remote_code: Run the code that the files of a teacher's folder or Hub id name, where they name some.
        data_collator, train_dataset, eval_dataset, processing_class, ...: as in `Trainer`. Rows hold `input_ids`
            and, unless they are the same, `labels`; with `position_ids` that begin again in every document, documents
            of a row do not see each other. Refused: `model_init`, `compute_loss_func`, and those of `REFUSED` in
            `arguments.py`.
        eval_text: What the card calls the text of `eval_dataset`.

    Raises:
        ValueError: an argument that elastic training cannot honour, the model is not elastic, the teacher has another
            tokenizer or an unknown architecture, or the routers cannot learn in this kind of run.
    """

    model: Any
    args: FlextronTrainingArguments
    hub_model_id: str | None
    push_in_progress: PushInProgress | None
    loss_is_scaled_for_ga = True  # our losses are sums divided by the tokens of the whole accumulated batch

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike | None = None,
        args: FlextronTrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | str | os.PathLike | None = None,
        eval_text: str | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ):
        check_arguments(args, kwargs)
        assert args is not None
        if isinstance(model, (str, os.PathLike)):
            model = load_elastic(model)
        check_model(model, args)
        assert isinstance(model, torch.nn.Module)
        for adapter in getattr(model, "peft_config", {}).values():  # a checkpoint says whose it is
            claim(getattr(model, "get_base_model", lambda: model)(), adapter)
        if args.n_gpu > 1:
            logger.warning("Several GPUs in one process are not used: launch one process for each with accelerate.")
            args._n_gpu = 1  # what Trainer itself does for models that DataParallel cannot wrap
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = (
                True  # a step without some layers leaves their parameters without gradient
            )
        kwargs["data_collator"] = kwargs.get("data_collator") or collator(kwargs.get("processing_class"))
        self.in_place = isinstance(teacher, str) and teacher == "self"
        self.eval_text = eval_text
        config: Any = model.config
        use_cache = config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        config.use_cache = use_cache  # the base class changes it in what is saved; here every pass says it itself
        check_output_layer(self.model)
        if max(self.get_cp_size(), self.get_sp_size()) > 1:
            rule = "The loss of a token needs the one after it, which would be on another device."
            raise invalid("parallelism_config", args.parallelism_config, rule, "Divide batches or weights instead.")
        if isinstance(teacher, (str, os.PathLike)) and not self.in_place:
            teacher = load_stock(teacher, "teacher", trust_remote_code=trust_remote_code, dtype=self.model.dtype)
        self.teacher: Any = None
        if teacher is not None and not self.in_place:
            self.teacher = prepare_teacher(teacher, self.model, self.processing_class, self.args.device)
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # of the draws since the last log
        self._sizes: dict[str, Any] = {}  # that the evaluation at hand measures, by name
        self._scores: list[torch.Tensor] = []  # `[B, sizes, 3]` of its batches so far
        self.routers: RouterStage | None = None
        if args.stage == "elastic":
            warn_about_untrained_sizes(self.model.config, args)
        else:
            steps = args.max_steps if args.max_steps > 0 else self._steps_of_epochs()
            self.routers = RouterStage(self.model, args, steps)
            if self.is_fsdp_enabled and self.routers.learner is not None:
                rule = "Its scores are no part of the model, and FSDP of accelerate optimizes nothing else."
                remedy = "Launch with DDP, or load the model with a DistributedConfig, or pass 'token'."
                raise invalid("router_method", args.router_method, rule, remedy)

    def _steps_of_epochs(self) -> int:
        """Optimizer steps of a run whose length is given in epochs."""
        loader = self.get_train_dataloader()
        each = -(-len(loader) // self.args.gradient_accumulation_steps)
        return math.ceil(each * self.args.num_train_epochs)

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
        teacher, own, adapters = self.teacher, 0, 0
        if teacher is not None and teacher.device.type == self.args.device.type:
            own = bytes_of(*teacher.parameters(), *teacher.buffers())
        if hasattr(self.model, "peft_config"):
            adapters = bytes_of(*(p for p in self.model.parameters() if p.requires_grad))
        return plan_memory(
            self.model.config,
            self.args,
            length,
            dtype=self.model.dtype,
            teacher=None if teacher is None else teacher.config,
            teacher_bytes=own,
            adapter_bytes=adapters,
            sharded=self._sharded,
            metrics=self.compute_metrics is not None,
        )

    @property
    def _sharded(self) -> bool:
        """Whether every process holds a part of each weight (FSDP)."""
        return self.is_fsdp_enabled or self.is_distributed_loading_by_transformers

    # ------------------------------------------------------------------------------------------ training

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Check a batch and put it on the device; where positions keep documents apart, they do so without a mask.

        Raises:
            ValueError: nothing says what is to be foretold, or the teacher would not keep the documents apart.
        """
        check_batch(inputs, self.data_collator)
        inputs = send_to_device(inputs, self.args.device)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and positions is not None:
            places = places_in_documents(positions, mask)
            if places is not None:  # stock code, which a teacher may be, looks for documents where there is no mask
                inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
                inputs["position_ids"] = torch.where(mask.bool(), positions, places)
        if self.teacher is not None and len(inputs.get("position_ids", ())) > 1:
            check_documents(self.teacher)
        return inputs

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward for every sub-network of this step; return the mean of their losses."""
        inputs = self._read(inputs)
        if self.routers is not None:
            self.routers.begin(self.state.global_step)
        if self.args.stage == "router" and self.args.router_method == "surrogate":
            return self._surrogate_step(inputs)
        step = self.state.global_step
        draws = self.draws(step) if self.routers is None else self.routers.draws(step, inputs)
        self._forget()
        teacher, total = self._teach(inputs), torch.zeros((), device=self.args.device)
        for drawn in draws:
            self._show(drawn)
            loss = HeadLoss(
                inputs["labels"],
                teacher,
                kd_weight=self.args.kd_weight,
                # Nobody to imitate, or the full network of an in-place step: learn from the text.
                ce_weight=self.args.ce_weight if teacher is not None else 1.0,
                temperature=self.args.temperature,
                chunk_size=self.args.loss_chunk_size,
            )
            marked = {**inputs, "drawn": drawn, "head_loss": loss, "draws": len(draws)}
            if self.routers is not None and self.routers.alone:
                share = self._router_step(marked, num_items_in_batch)
            else:
                share = super().training_step(model, marked, num_items_in_batch)
            check_finite(share, drawn.name, drawn.subnetwork, step)
            self._losses[drawn.name].append(share * len(draws))
            total += share
            if self.in_place and teacher is None:
                teacher = self._in_place_teacher(loss.hidden_states)
        if self.routers is not None:
            self.routers.average_gradients(self.accelerator)
        return total

    def _show(self, drawn: Draw) -> None:
        """Name the current sub-network in the progress line."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_postfix_str(drawn.name, refresh=False)

    def _router_step(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Forward and backward for the scores alone, which are no part of the model; nothing else gets a gradient."""
        assert self.routers is not None
        self.model.eval()
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(self.model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, inputs=self.routers.parameters())
        return loss.detach()

    def _surrogate_step(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Measure the networks that the learner proposes, and let it learn when the step has seen all its batches."""
        assert self.routers is not None
        step, steps = self.state.global_step, self.current_gradient_accumulation_steps
        asked = dict(enumerate(self.routers.proposed(step)))
        self.model.eval()
        with self.compute_loss_context_manager():
            sums = score_sizes(self.model, inputs, asked, self.args.loss_chunk_size).sum(dim=0)
        nats, tokens = sums[:, 0], sums[0, 2]
        for number, subnetwork in asked.items():
            check_finite(nats[number], "proposed", subnetwork, step)
        objective = self.routers.learn(step, nats, tokens, self.accelerator)
        if objective is not None:
            self._losses["router"].append(objective.detach() / steps)
        return nats[1:].mean() / tokens / steps

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count what the step reads, also in the config, where it stays with the weights."""
        if "attention_mask" not in inputs:  # nothing is padding; the base class would look for its token
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)
        counts = {"steps": self.state.global_step + 1}
        if self.state.num_input_tokens_seen:
            counts["tokens"] = self.state.num_input_tokens_seen
        self.model.config.training_runs[-1].update(counts)

    def draws(self, step: int) -> list[Draw]:
        """The sub-networks of an optimizer step."""
        drawn = draw(
            self.model.config,
            self.args.sampler,
            self.args.subnetworks_per_step,
            seed=self.args.seed,
            step=step,
            weights=self.args.sampling_weights,
        )
        if self.in_place and drawn[0].subnetwork != self.model.config.built:
            drawn = [Draw(self._name_of_full(), self.model.config.built), *drawn]
        return drawn

    def _name_of_full(self) -> str:
        rows = held(self.model.config.frontier).items()
        return next((name for name, subnetwork in rows if subnetwork == self.model.config.built), "full")

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Teacher | None:
        if self.teacher is None:
            return None
        padding = getattr(self.processing_class or self.model.config, "pad_token_id", None)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return read_by_teacher(self.teacher, inputs, self.model.config.vocab_size, padding)

    def _in_place_teacher(self, states: torch.Tensor | None) -> Teacher | None:
        if states is None:
            return None
        weight, _ = self.model.get_output_embeddings().leading(states.shape[-1])
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP shards it between passes
        return Teacher(states, whole.detach())

    def compute_loss(
        self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of one draw, its share of the step's mean; outside of training the model's own loss."""
        if "drawn" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        drawn, loss, draws = inputs.pop("drawn"), inputs.pop("head_loss"), inputs.pop("draws")
        inputs.pop("labels")
        shares = draws * self.current_gradient_accumulation_steps
        loss.normalizer, world = num_items_in_batch, 1
        if num_items_in_batch is None:
            draws *= self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            world = self.accelerator.num_processes // self.get_tp_size()  # gradients are averaged over processes
        if drawn.routing is not None:
            inputs["routing"] = drawn.routing
        outputs = model(**inputs, use_cache=False, flextron_budget=drawn.subnetwork, head_loss=loss)
        value = outputs.loss * world / draws
        if drawn.gap is not None:  # not a sum over tokens: every batch of the step has an equal share
            value = value + GAP_IN_NATS * self.args.latency_weight * drawn.gap().to(value) / shares
        if not value.requires_grad:  # adapters alone learn, and this size skips the layers that have them
            value = value.detach().requires_grad_()
        return (value, outputs) if return_outputs else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss_<row>`, the mean loss of every size since the last log, to the training logs."""
        if "loss" in logs and self._losses:
            for name in sorted(self._losses):
                mean = torch.stack(self._losses[name]).mean()
                steps = self.current_gradient_accumulation_steps
                logs[f"loss_{name}"] = round(self.accelerator.gather(mean).mean().item() * steps, 6)
            self._losses.clear()
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every row of the frontier, every token alike, and keep the figures in the config of the model.

        Args:
            eval_dataset, ignore_keys: as in `Trainer.evaluate`. Of a dict of datasets the frontier goes by the first;
                figures of the others have its name before theirs.
            metric_key_prefix: With another one than `"eval"` nothing is kept.

        Returns:
            `eval_loss`, of the model's current budget; `eval_loss_<row>` and `eval_accuracy_<row>`; or those of
            `eval_<dataset>`; and what `Trainer.evaluate` returns.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if metric_key_prefix == "eval":
            sets = self.eval_dataset if eval_dataset is None else eval_dataset
            prefixes = {name: f"eval_{name}" for name in sets} if isinstance(sets, dict) else {self._name(sets): "eval"}
            for i, (text, prefix) in enumerate(prefixes.items()):
                figures = {
                    name: {
                        f"{text}/{kind}" if i else kind: metrics[f"{prefix}_{kind}_{_key(name)}"] for kind in FIGURES
                    }
                    for name in measured_sizes(self.model.config)
                }
                self.model.config.record(figures, text=text, tokens=metrics[f"{prefix}_tokens"])
        return metrics

    def _name(self, dataset: Any) -> str | None:
        """What a dataset that is evaluated on is called; None for one without a name."""
        if dataset is self.train_dataset or isinstance(dataset, str):
            return dataset if isinstance(dataset, str) else "the training rows"
        return self.eval_text if dataset is self.eval_dataset else None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As the base class does, with losses over tokens; for `evaluate()` at every size that has figures."""
        sizes = measured_sizes(self.model.config) if description == "Evaluation" else {}
        same = (name for name, budget in sizes.items() if self.model.resolve_budget(budget) == self.model.subnetwork)
        current = next(same, "")
        self._sizes, self._scores = (sizes if current else {"": None, **sizes}), []
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._scores:
            found = dict(zip(self._sizes, map(quality, torch.cat(self._scores).unbind(dim=1)), strict=True))
            output.metrics[f"{metric_key_prefix}_loss"] = found[current]["loss"]
            output.metrics[f"{metric_key_prefix}_tokens"] = found[current]["tokens"]
            for name in sizes:
                for figure in FIGURES:
                    output.metrics[f"{metric_key_prefix}_{figure}_{_key(name)}"] = found[name][figure]
        elif description == "Evaluation":
            raise invalid("eval_dataset", dataloader.dataset, "It has no rows.", "Pass some, or do not evaluate.")
        self._sizes = {}
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Score the batch at the sizes of `evaluation_loop`; all logits, of the current size, only if asked for."""
        cached = {**inputs, "use_cache": self.args.use_cache}  # which the base class would write into the config
        if not self._sizes or (self._sizes.keys() == {""} and inputs.get("labels") is None):  # `predict`, without them
            return super().prediction_step(model, cached, prediction_loss_only, ignore_keys)
        inputs = self._read(inputs)
        scores = score_sizes(model, inputs, self._sizes, self.args.loss_chunk_size)
        self._scores.append(self.accelerator.gather_for_metrics(scores).cpu())
        if not prediction_loss_only:
            return super().prediction_step(model, cached, prediction_loss_only, ignore_keys)
        nats, _, tokens = scores[:, 0].sum(dim=0)
        return nats / tokens, None, None

    # ------------------------------------------------------------------------------------ saving, resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if self.args.should_save:
                sweep(self.args.output_dir)
        self.model.config.training_runs = [*(self.model.config.training_runs or []), self.args.changed()]
        with in_float32(self.model, self._learning(), self.args.float32_weights) as rounded:
            if resume_from_checkpoint:
                self._resume(str(resume_from_checkpoint))
            result = self._finished(str(resume_from_checkpoint)) if resume_from_checkpoint else None
            if result is None:
                result = self._train(resume_from_checkpoint or None, **kwargs)
        if rounded:
            self.model.config.dtype = self.model.dtype
            self._forget()
        if self.routers is not None:
            size = self.args.per_device_eval_batch_size
            self.routers.finish(lambda: first_batches(self.train_dataset, self.data_collator, size, self.args.device))
        return result

    def _train(self, resume_from_checkpoint: str | None, **kwargs) -> TrainOutput:
        length = stored_length(self.train_dataset)
        if length is not None:
            logger.warning_once(str(self.plan(length)))
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
            self._take_config(self.state.best_model_checkpoint)  # with the losses of these weights
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

    def _resume(self, checkpoint: str) -> None:
        """Take what a checkpoint holds beside its weights, if they are those of this model."""
        if not self._sharded and not hasattr(self.model, "peft_config"):
            check_files("resume_from_checkpoint", checkpoint, self.model)
        self._take_config(checkpoint)
        if self.routers is not None:
            self.routers.load(Path(checkpoint))

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """The end of a run whose checkpoint has all its steps, of which the base class would make one more."""
        state = finished_state(checkpoint, self.args.max_steps)
        if state is None:
            return None
        self.state = state
        self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def _take_config(self, checkpoint: str) -> None:
        """Take what a checkpoint knows beside its weights: all rows, their losses, and what was run."""
        if hasattr(self.model, "peft_config") or not Path(checkpoint, "config.json").is_file():
            return  # a checkpoint of an adapter has no config of the model
        saved, config = FlextronConfig.from_pretrained(checkpoint), self.model.config
        config.frontier, config.token_routing = saved.frontier, saved.token_routing
        *before, this = saved.training_runs or [{}]
        config.training_runs = [*before, this | self.args.changed()]  # with the steps and tokens so far

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with the routers in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.routers is not None:
            self.routers.join(optimizer)
        return optimizer

    def _save_checkpoint(self, model, trial) -> None:
        # The state is what `last_complete_checkpoint` looks for: in a folder that is written again it goes first.
        if self.args.should_save:
            begin_again(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the arguments as JSON instead of a pickle, and with the routers."""
        if self.routers is not None:
            self.routers.write()
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.exists():
            if self.routers is not None:
                self.routers.save(folder)
            write_arguments(folder, self.args)

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

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Refused, as `model_init` is: every trial needs a model of its own.

        Raises:
            ValueError: always.
        """
        raise invalid("hyperparameter_search", kwargs.get("backend"), *REFUSED_KEYWORDS["model_init"])

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card of the elastic model: its frontier, how to load it, how it was trained."""
        if hasattr(self.model, "peft_config"):
            super().create_model_card(*args, **kwargs)  # of the adapter, which is all there is to push
        elif self.is_world_process_zero():
            write_model_card(self.model, self.args.output_dir, self.hub_model_id)


def stored_length(dataset: Any) -> int | None:
    """Tokens in the first row of a dataset that holds its rows; None of one that makes them when they are read."""
    stored = isinstance(dataset, (list, tuple)) or (
        isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    )
    row = dataset[0] if stored and len(dataset) else None
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else None


def bytes_of(*tensors: torch.Tensor) -> int:
    """Memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _key(name: str) -> str:
    """What a size is called in the names of metrics."""
    return name.replace("auto:", "auto-")
