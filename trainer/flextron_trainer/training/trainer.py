"""`FlextronTrainer`: a `Trainer` whose every step trains several sizes of the same weights.

Stage `elastic` (elastic continued training of Flextron, arXiv 2406.10260; distillation as in Nemotron Elastic, arXiv
2511.16664): for every batch a few sub-networks are drawn (`sampling.py`), each runs forward and backward on its own,
so that memory is that of one, and the optimizer steps once. The teacher's hidden states are computed once for a
batch. Everything else is the ordinary Trainer.
"""

import os
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_flextron.adapters import claim
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held

from ..data import collator
from ..losses import HeadLoss, SampledTeacher, Teacher
from ..models import load_elastic, load_stock
from .arguments import FlextronTrainingArguments
from .batches import read_batch
from .block_stage import check_block_run
from .checks import (
    REFUSED_KEYWORDS,
    check_arguments,
    check_finite,
    check_model,
    check_output_layer,
    warn_about_untrained_sizes,
)
from .evaluating import FrontierEvaluation
from .resuming import ResumableRun
from .router_stage import GAP_IN_NATS, RouterStage, ScoreRouters, TokenRouters
from .sampling import Draw, draw, last_that_learns
from .teacher_cache import TeacherCache, is_cache
from .teachers import prepare_teacher, read_by_teacher


class FlextronTrainer(FrontierEvaluation, ResumableRun):
    """Trains an elastic model at many sizes at once.

    Args:
        model: A `FlextronForCausalLM`, or the folder or Hub id of one; or a `PeftModel` of one, of which the adapter
            alone is trained and saved.
        args: `FlextronTrainingArguments`.
        teacher: Who is imitated: a model, its folder or Hub id (usually the parent), the folder of what it predicts of
            the training text (`teach`; no model in memory), `"self"` (the full network of the same step, which then
            learns from the text; no second copy), or None to learn from the text alone. A model that is on a GPU
            already, or quantized, stays where it is. It has the tokenizer of the model; where one of them has more
            tokens, those that both have are compared.
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
        if args.stage == "blocks":
            check_block_run(model, args, {**kwargs, "teacher": teacher})
        for adapter in getattr(model, "peft_config", {}).values():  # a checkpoint says whose it is
            claim(getattr(model, "get_base_model", lambda: model)(), adapter)
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
        self.cache = None
        if isinstance(teacher, (str, os.PathLike)) and is_cache(teacher):
            self.cache, teacher = TeacherCache(teacher), None
            self.cache.check(config.vocab_size, args.temperature, self.processing_class)
        if isinstance(teacher, (str, os.PathLike)) and not self.in_place:
            teacher = load_stock(teacher, "teacher", trust_remote_code=trust_remote_code, dtype=self.model.dtype)
        self.teacher = None
        if teacher is not None and not self.in_place:
            self.teacher = prepare_teacher(teacher, self.model, self.processing_class, self.args.device)
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # of the draws since the last log
        self.routers = None
        if args.stage == "elastic":
            warn_about_untrained_sizes(self.model.config, args)
        elif args.stage != "blocks":
            steps = args.max_steps
            if steps <= 0:  # the length is given in epochs
                *_, steps = self.set_initial_training_values(args, self.get_train_dataloader())
            kind = TokenRouters if args.router_method == "token" else ScoreRouters
            self.routers = kind(self.model, args, steps)
            if self.is_fsdp_enabled and kind is ScoreRouters:
                rule = "Its scores are no part of the model, and FSDP of accelerate optimizes nothing else."
                remedy = "Launch with DDP, or load the model with a DistributedConfig, or pass 'token'."
                raise invalid("router_method", args.router_method, rule, remedy)

    # ------------------------------------------------------------------------------------------ training

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward for every sub-network of this step; return the mean of their losses."""
        inputs = read_batch(inputs, self.data_collator, self.teacher, self.args.device)
        step = self.state.global_step
        if self.routers is not None:
            self.routers.begin(step)
            if isinstance(self.routers, ScoreRouters) and self.routers.measures:
                return self._measure(self.routers, inputs)
        draws = self.draws(step) if self.routers is None else self.routers.draws(step, inputs)
        self._forget()
        teacher, total = self._teach(inputs), torch.zeros((), device=self.args.device)
        sending = last_that_learns(self.model, draws)
        for place, drawn in enumerate(draws):
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
                share = self._learn_scores(self.routers, marked, num_items_in_batch)
            else:
                # One pass sends what all have gathered. Under FSDP that would be the gradients of whole weights.
                waits = place != sending and not self._sharded
                with self.accelerator.no_sync(model) if waits else nullcontext():
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

    def _learn_scores(self, routers: RouterStage, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward for the scores alone, which are no part of the model; nothing else gets a gradient."""
        self.model.eval()
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(self.model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, inputs=routers.parameters())
        return loss.detach()

    def _measure(self, routers: ScoreRouters, inputs: dict[str, Any]) -> torch.Tensor:
        """Measure the networks that the surrogate asks for, of which it learns at the end of the step."""
        self.model.eval()
        with self.compute_loss_context_manager():
            loss, objective = routers.measure(self.state.global_step, inputs, self.accelerator)
        if objective is not None:
            self._losses["router"].append(objective / self.current_gradient_accumulation_steps)
        return loss / self.current_gradient_accumulation_steps

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
    def _teach(self, inputs: dict[str, Any]) -> Teacher | SampledTeacher | None:
        if self.cache is not None:
            return self.cache.read(inputs)
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

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Make the optimizer, with the routers in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.routers is not None:
            self.routers.join(optimizer)
        return optimizer

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Refused, as `model_init` is: every trial needs a model of its own.

        Raises:
            ValueError: always.
        """
        raise invalid("hyperparameter_search", kwargs.get("backend"), *REFUSED_KEYWORDS["model_init"])
