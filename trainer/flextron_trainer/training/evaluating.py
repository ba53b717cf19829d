"""An evaluation that measures every size of a family on one reading of the text, every token alike."""

from typing import Any

import torch
from transformers import Trainer

from modeling_flextron.errors import invalid

from ..evaluation.quality import FIGURES, measured_sizes, quality, score_sizes
from .arguments import FlextronTrainingArguments
from .batches import read_batch


class FrontierEvaluation(Trainer):
    """The part of a `FlextronTrainer` that evaluates.

    Attributes:
        eval_text: What the card calls the text of `eval_dataset`.
        teacher: Who is imitated; None for nobody.
    """

    model: Any
    args: FlextronTrainingArguments
    eval_text: str | None
    teacher: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._sizes: dict[str, Any] = {}  # that the evaluation at hand measures, by name
        self._scores: list[torch.Tensor] = []  # `[B, sizes, 3]` of its batches so far
        super().__init__(*args, **kwargs)

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
                        f"{text}/{kind}" if i else kind: metrics[f"{prefix}_{kind}_{key_of(name)}"] for kind in FIGURES
                    }
                    for name in measured_sizes(self.model.config)
                }
                self.model.config.record(figures, text=text, tokens=metrics[f"{prefix}_tokens"])
        return metrics

    def _name(self, dataset: Any) -> str | None:
        """The name of a dataset that is evaluated on; None for one without a name."""
        if dataset is self.train_dataset or isinstance(dataset, str):
            return dataset if isinstance(dataset, str) else "the training rows"
        return self.eval_text if dataset is self.eval_dataset else None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate with losses over tokens; for `evaluate()` at every size that has figures."""
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
                    output.metrics[f"{metric_key_prefix}_{figure}_{key_of(name)}"] = found[name][figure]
        elif description == "Evaluation":
            raise invalid("eval_dataset", dataloader.dataset, "It has no rows.", "Pass some, or do not evaluate.")
        self._sizes = {}
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Score the batch at the sizes of `evaluation_loop`; all logits, of the current size, only if asked for."""
        cached = {**inputs, "use_cache": self.args.use_cache}  # which the base class would write into the config
        if not self._sizes or (self._sizes.keys() == {""} and inputs.get("labels") is None):  # `predict`, without them
            return super().prediction_step(model, cached, prediction_loss_only, ignore_keys)
        inputs = read_batch(inputs, self.data_collator, self.teacher, self.args.device)
        scores = score_sizes(model, inputs, self._sizes, self.args.loss_chunk_size)
        self._scores.append(self.accelerator.gather_for_metrics(scores).cpu())
        if not prediction_loss_only:
            return super().prediction_step(model, cached, prediction_loss_only, ignore_keys)
        nats, _, tokens = scores[:, 0].sum(dim=0)
        return nats / tokens, None, None


def key_of(name: str) -> str:
    """A size in the names of metrics."""
    return name.replace("auto:", "auto-")
