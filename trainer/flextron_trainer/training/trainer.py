"""`FlextronTrainer`: a `Trainer` whose every step trains several sizes of the same weights.

Stage `elastic` (elastic continued training of Flextron, arXiv 2406.10260; distillation as in Nemotron Elastic, arXiv
2511.16664): for every batch a few sub-networks are drawn (`sampling.py`), each runs forward and backward on its own,
so that memory is that of one, and the optimizer steps once. The teacher's hidden states are computed once for a
batch. Everything else is the ordinary Trainer.
"""

import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import run_as_future
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from modeling_flextron import FlextronConfig
from modeling_flextron.adapters import claim
from modeling_flextron.checkpoint import staging, sweep
from modeling_flextron.errors import invalid
from modeling_flextron.families import FAMILIES
from modeling_flextron.frontier import held
from modeling_flextron.hub import commit_files, commit_written, files_of
from modeling_flextron.model_card import write_model_card
from modeling_flextron.modeling_flextron import runs_in_parts
from modeling_flextron.positions import places_in_documents

from ..data import collator
from ..evaluation.quality import FIGURES, measured_sizes, quality, score
from ..models import check_files, load_elastic, load_stock
from .arguments import FlextronTrainingArguments
from .losses import HeadLoss, Teacher
from .plan import MemoryPlan, plan_memory
from .precision import in_float32
from .router_stage import FILE as ROUTERS
from .router_stage import GAP_IN_NATS, RouterStage, first_batches
from .sampling import Draw, check_weights, draw
from .teachers import check_vocabulary, readable

logger = logging.get_logger(__name__)
TRAINER_STATE = "trainer_state.json"
# What stays on this machine: the pickles of optimizer, schedule and random state, and arguments with local paths.
KEPT_HERE = shutil.ignore_patterns("*.pt", "*.pth", "*.bin", "training_args.json")
# Arguments of the base class that elastic training cannot honour: why, and what to do instead.
REFUSED = {
    "model_init": (
        "An elastic model is not drawn anew: it comes from a trained one, and training goes on from what it is.",
        "Pass the model, and build a trainer with a model of its own for every trial.",
    ),
    "compute_loss_func": (
        "The sub-networks learn from losses on hidden states, chunk by chunk, and never make all logits.",
        "Set `kd_weight`, `ce_weight` and `temperature`, or train one size with the plain Trainer.",
    ),
}


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
        for name, (rule, remedy) in REFUSED.items():
            if kwargs.get(name) is not None:
                raise invalid(name, kwargs[name], rule, remedy)
        if not isinstance(args, FlextronTrainingArguments):
            remedy = "Build a FlextronTrainingArguments; it takes every argument of TrainingArguments."
            raise invalid("args", type(args).__name__, "They carry the arguments of elastic training.", remedy)
        if isinstance(model, (str, os.PathLike)):
            model = load_elastic(model)
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "flextron":
            remedy = "Make it elastic first: `convert(model, calibration=...)`."
            raise invalid("model", type(model).__name__, "The trainer trains Flextron models.", remedy)
        assert isinstance(model, torch.nn.Module)
        if hasattr(model, "peft_config") and args.stage != "elastic":
            remedy = "Train the adapters with stage='elastic', or merge them first."
            raise invalid("stage", args.stage, "Routers learn on weights without adapters.", remedy)
        if runs_in_parts(model):
            remedy = (
                "Divide it with FSDP, as by `DistributedConfig(fsdp_size=...)`, or train each size as a `Trainer` does."
            )
            raise invalid(
                "model", "tensor-parallel", "Each step trains sizes that such a plan cannot switch to.", remedy
            )
        for adapter in getattr(model, "peft_config", {}).values():  # a checkpoint says whose it is
            claim(getattr(model, "get_base_model", lambda: model)(), adapter)
        if args.sampler == "weighted":
            check_weights(config, args.sampling_weights)
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
        use_cache = config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        config.use_cache = use_cache  # the base class changes it in what is saved; here every pass says it itself
        if self.model.get_output_embeddings() is None:
            rule = "The losses of elastic training are those of a language model."
            raise invalid("model", type(model).__name__, rule, "Train it at one budget with the plain Trainer.")
        if max(self.get_cp_size(), self.get_sp_size()) > 1:
            rule = "The loss of a token needs the one after it, which would be on another device."
            raise invalid("parallelism_config", args.parallelism_config, rule, "Divide batches or weights instead.")
        if isinstance(teacher, (str, os.PathLike)) and not self.in_place:
            teacher = load_stock(teacher, "teacher", trust_remote_code=trust_remote_code, dtype=self.model.dtype)
        self.teacher = None if teacher is None or self.in_place else self._check_teacher(teacher)
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # of the draws since the last log
        self._sizes: dict[str, Any] = {}  # that the evaluation at hand measures, by name
        self._scores: list[torch.Tensor] = []  # `[B, sizes, 3]` of its batches so far
        self.routers: RouterStage | None = None
        self._asked: list[torch.Tensor] = []  # losses of the networks that a step proposed, one entry for each batch
        if args.stage == "elastic":
            self._warn_about_untrained_sizes()
        else:
            steps = args.max_steps if args.max_steps > 0 else self._steps_of_epochs()
            self.routers = RouterStage(self.model, args, steps)
            if self.is_fsdp_enabled and self.routers.learner is not None:
                rule = "Its scores are no part of the model, and FSDP of accelerate optimizes nothing else."
                remedy = "Launch with DDP, or load the model with a DistributedConfig, or pass 'token'."
                raise invalid("router_method", args.router_method, rule, remedy)

    def _check_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        check_vocabulary(teacher, self.model, self.processing_class)
        if teacher.config.model_type not in (*FAMILIES, "flextron"):
            rule = f"The supported families are {', '.join(FAMILIES)}."
            raise invalid("teacher", teacher.config.model_type, rule, "Teach with the parent.")
        if teacher is self.model:
            remedy = "Pass teacher='self' to learn from the full network of the same step."
            raise invalid("teacher", type(teacher).__name__, "It is the model that is trained.", remedy)
        # On another GPU it was put on purpose, and some quantized models refuse to be moved.
        placed = teacher.device.type != "cpu" or getattr(teacher, "hf_quantizer", None) is not None
        return (teacher if placed else teacher.to(self.args.device)).eval()

    def _steps_of_epochs(self) -> int:
        """Optimizer steps of a run whose length is given in epochs."""
        loader = self.get_train_dataloader()
        each = -(-len(loader) // self.args.gradient_accumulation_steps)
        return math.ceil(each * self.args.num_train_epochs)

    def _warn_about_untrained_sizes(self) -> None:
        rows = len(held(self.model.config.frontier))
        weights = self.args.sampling_weights or [1.0]
        if weights[0] == 0 or self.args.sampler == "random":
            logger.warning(
                f"The full network is hardly among the sampled sub-networks (sampler={self.args.sampler!r}), so its"
                " quality will drop. Use sampler='sandwich', or give the first row of the frontier some weight."
            )
        if rows < 2:
            logger.warning("The frontier has a single row: nothing smaller is trained or evaluated by name.")

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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As `Trainer._prepare_inputs`; refuses documents that a teacher would not keep apart."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and positions is not None:
            places = places_in_documents(positions, mask)
            if places is not None:  # stock code, which a teacher may be, looks for documents where there is no mask
                inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
                inputs["position_ids"] = torch.where(mask.bool(), positions, places)
        if len(inputs.get("position_ids", ())) > 1 and self.teacher is not None:
            kind = str(self.teacher.config._attn_implementation)
            if "flash" in kind and self.teacher.config.model_type in FAMILIES:
                rule = "A stock teacher keeps the documents of a block apart in batches of one row only with it."
                remedy = "Use batches of 1 and `gradient_accumulation_steps`, or load the teacher with 'sdpa'."
                raise invalid("attn_implementation", kind, rule, remedy)
        return super()._prepare_inputs(inputs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward for every sub-network of this step; return the mean of their losses."""
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs)
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
            self._check_finite(share, drawn)
            self._losses[drawn.name].append(share * len(draws))
            total += share
            if self.in_place and teacher is None:
                teacher = self._in_place_teacher(loss.hidden_states)
        if self.routers is not None and self.routers.learner is not None and self.accelerator.sync_gradients:
            for parameter in self.routers.parameters():  # no part of the model, so nobody else averages them
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return total

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Refuse batches that do not say what is to be foretold."""
        missing = [name for name in ("input_ids", "labels") if inputs.get(name) is None]
        if missing or "shift_labels" in inputs:
            name = type(self.data_collator).__name__
            rule = f"Its batches have no `{missing[0]}`." if missing else "The loss shifts `labels` itself."
            remedy = "Make batches of `input_ids` and `labels`, which is what comes of leaving it out."
            raise invalid("data_collator", name, rule, remedy)

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
        assert self.routers is not None and self.routers.learner is not None
        learner, step, config = self.routers.learner, self.state.global_step, self.model.config
        proposed = learner.propose(step, self.args.subnetworks_per_step)
        sums, tokens = [], torch.zeros(())
        self.model.eval()
        with self.compute_loss_context_manager():
            for subnetwork in (config.built, *(choices.subnetwork(config) for choices in proposed)):
                nats, _, tokens = score(self.model, inputs, subnetwork, self.args.loss_chunk_size).sum(dim=0)
                self._check_finite(nats, Draw("proposed", subnetwork))
                sums.append(nats)
        self._asked.append(torch.stack([*sums, tokens]))
        if self.accelerator.sync_gradients:
            *total, count = self.accelerator.reduce(torch.stack(self._asked).sum(dim=0), "sum")
            self._asked.clear()
            mean = torch.stack(total) / count
            learner.learn(step, proposed, mean[1:] - mean[0])
            objective = learner.objective(step)
            if objective is not None:
                self._losses["router"].append(objective.detach() / self.current_gradient_accumulation_steps)
                objective.backward(inputs=self.routers.parameters())
        return torch.stack(sums[1:]).mean() / tokens / self.current_gradient_accumulation_steps

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
        kept, here = ("input_ids", "attention_mask", "position_ids"), self.args.device
        inputs = {key: inputs[key].to(self.teacher.device) for key in kept if key in inputs}
        if self.teacher.config.vocab_size < self.model.config.vocab_size:
            padding = getattr(self.processing_class or self.model.config, "pad_token_id", None)
            inputs = readable(inputs, self.teacher.config.vocab_size, padding)
        if self.teacher.config.model_type == "flextron":
            inputs["flextron_budget"] = self.teacher.subnetwork
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            states = self.teacher.base_model(**inputs, use_cache=False).last_hidden_state
        weight = self.teacher.get_output_embeddings().weight[:, : states.shape[-1]]
        return Teacher(states.to(here), weight.to(here))

    def _in_place_teacher(self, states: torch.Tensor | None) -> Teacher | None:
        if states is None:
            return None
        weight, _ = self.model.get_output_embeddings().leading(states.shape[-1])
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP shards it between passes
        return Teacher(states, whole.detach())

    def _check_finite(self, loss: torch.Tensor, drawn: Draw) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of sub-network {drawn.name!r} ({drawn.subnetwork.to_dict()}) is {loss.item()} at step"
                f" {self.state.global_step}. Training stops here, before the weights are touched. Resume from the last"
                " checkpoint with a lower learning rate, or look for broken samples."
            )

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
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs)
        chunk = self.args.loss_chunk_size
        scores = torch.stack([score(model, inputs, budget, chunk) for budget in self._sizes.values()], dim=1)
        self._scores.append(self.accelerator.gather_for_metrics(scores).cpu())
        if not prediction_loss_only:
            return super().prediction_step(model, cached, prediction_loss_only, ignore_keys)
        nats, _, tokens = scores[:, 0].sum(dim=0)
        return nats / tokens, None, None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._take_config(self.state.best_model_checkpoint)  # with the losses of these weights

    # ------------------------------------------------------------------------------------ saving, resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
            if self.args.should_save:
                sweep(self.args.output_dir)
        self.model.config.training_runs = [*(self.model.config.training_runs or []), self.args.changed()]
        with in_float32(self.model, self._learning(), self.args.float32_weights) as rounded:
            result = self._finished(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
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
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

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

    def _finished(self, checkpoint: Path) -> TrainOutput | None:
        """The end of a run whose checkpoint has all its steps, of which the base class would make one more."""
        path = checkpoint / TRAINER_STATE
        if not path.is_file():
            return None
        state = TrainerState.load_from_json(str(path))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.routers is not None:
            self.routers.load(checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._sharded and not hasattr(self.model, "peft_config"):
            check_files("resume_from_checkpoint", resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._take_config(resume_from_checkpoint)

    def _take_config(self, checkpoint: str) -> None:
        """Take what a checkpoint knows beside its weights: all rows, their losses, and what was run."""
        if hasattr(self.model, "peft_config"):
            return  # a checkpoint of an adapter has no config of the model
        saved, config = FlextronConfig.from_pretrained(checkpoint), self.model.config
        config.frontier, config.token_routing = saved.frontier, saved.token_routing
        *before, this = saved.training_runs or [{}]
        config.training_runs = [*before, this | self.args.changed()]  # with the steps and tokens so far

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with the routers in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.routers is not None:
            ours = self.routers.parameters()
            for group in optimizer.param_groups:
                others = [p for p in group["params"] if not any(p is own for own in ours)]
                group["params"] = [] if self.routers.alone else others
            optimizer.add_param_group({"params": ours, "lr": self.args.router_learning_rate, "weight_decay": 0.0})
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.routers is not None and checkpoint is not None:
            self.routers.load(Path(checkpoint))

    def _last_complete_checkpoint(self) -> str:
        """The newest checkpoint whose last file, the trainer's state, was written to its end."""
        found = {}
        for folder in Path(self.args.output_dir).glob("checkpoint-*"):
            if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
                found[int(match[1])] = folder
        for step in sorted(found, reverse=True):
            try:
                state = TrainerState.load_from_json(str(found[step] / TRAINER_STATE))
            except (OSError, ValueError, TypeError):
                logger.warning(f"{found[step]} was not written to its end and is skipped.")
                continue
            if state.global_step == step:
                return str(found[step])
        rule = f"There is no complete checkpoint in {self.args.output_dir!r}."
        raise invalid("resume_from_checkpoint", True, rule, "Start without it, or pass the path of a checkpoint.")

    def _save_checkpoint(self, model, trial) -> None:
        # The state is what `_last_complete_checkpoint` looks for: in a folder that is written again it goes first.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            (folder / TRAINER_STATE).unlink(missing_ok=True)
            sweep(folder)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # As the base class does, with the arguments as JSON instead of a pickle, and with the routers.
        if self.routers is not None:
            self.routers.write()
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.routers is not None and self.args.should_save:
            self.routers.save(folder)
        if self.args.should_save and folder.exists():
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint with its card in the background: one commit, and no pickles."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # A copy, because the folder may be rotated away before it has arrived.
        kept = ExitStack()
        staged = kept.enter_context(staging(self.args.output_dir, "push"))
        shutil.copytree(checkpoint_folder, staged, ignore=KEPT_HERE, dirs_exist_ok=True)
        write_model_card(self.model, staged, self.hub_model_id)
        files = {name: path for name, path in files_of(staged).items() if name not in (TRAINER_STATE, ROUTERS)}
        if strategy == HubStrategy.CHECKPOINT:
            files |= files_of(staged, "last-checkpoint/")
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            files |= files_of(staged, f"{Path(checkpoint_folder).name}/")
        job = run_as_future(
            commit_files,
            files,
            self.hub_model_id,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        job.add_done_callback(lambda done: _pushed(done, kept))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

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
            self._check_saves_whole()
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

    def _check_saves_whole(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if hasattr(self.model, "peft_config"):
            rule = "The weights under it are divided among processes."
            raise invalid("model", type(self.model).__name__, rule, "`save_model()`, and push that folder.")
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            rule = "`save_model` writes no whole weights then."
            raise invalid("fsdp_state_dict_type", str(plugin.state_dict_type), rule, "Set it to FULL_STATE_DICT.")

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Refused, as `model_init` is: every trial needs a model of its own.

        Raises:
            ValueError: always.
        """
        raise invalid("hyperparameter_search", kwargs.get("backend"), *REFUSED["model_init"])

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


def _pushed(job: Future, staged: ExitStack) -> None:
    """After a push in the background: remove what was staged, and say so when it failed."""
    staged.close()
    if error := job.exception():
        logger.warning(f"A checkpoint was not pushed, and the next push tries again: {error}")
