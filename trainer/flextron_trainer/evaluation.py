"""Quality of every sub-network on held-out text, with the `evaluate` library and without the network."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_flextron import FlextronForCausalLM
from modeling_flextron.errors import invalid

from .data import collator
from .losses import IGNORED


class NextToken(evaluate.Metric):
    """Loss, perplexity and accuracy of next-token prediction.

    One row is one sequence: `predictions` the most likely ids, `nll` the negative log-likelihoods (nats) of
    `references`, the ids that came; a reference of -100 does not count.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-level loss, perplexity and next-token accuracy of a language model.",
            citation="",
            inputs_description="Token ids and their negative log-likelihoods, a list for every sequence.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                    "nll": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions, references, nll) -> dict[str, float]:
        total, right, tokens = 0.0, 0, 0
        for guess, truth, values in zip(predictions, references, nll, strict=True):
            for token, target, value in zip(guess, truth, values, strict=True):
                if target != IGNORED:
                    total, right, tokens = total + value, right + (token == target), tokens + 1
        if tokens == 0:
            raise invalid("references", len(references), "No token counts.", "Pass at least one target token.")
        loss = total / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right / tokens, "tokens": tokens}


@torch.no_grad()
def evaluate_model(model, rows: Sequence[dict[str, Any]], batch_size: int = 8, budget: Any = None) -> dict[str, float]:
    """`NextToken` of one model at one size.

    Args:
        model: A causal language model, elastic or stock.
        rows: Rows of `input_ids` and, unless they are the same, `labels`.
        batch_size: Rows in a forward pass.
        budget: For an elastic model: the sub-network to measure.
    """
    metric = NextToken()
    model.eval()
    extra = {} if budget is None else {"flextron_budget": budget}
    loader: DataLoader = DataLoader(rows, batch_size=batch_size, collate_fn=collator())  # type: ignore[arg-type]
    if len(loader) == 0:
        raise invalid("rows", rows, "There are no rows to evaluate on.", "Pass some text.")
    for batch in tqdm(loader, desc="Evaluating", leave=False):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False, **extra).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        metric.add_batch(predictions=logits.argmax(-1).cpu(), references=labels.cpu(), nll=nll.cpu())
    return metric.compute() or {}


def evaluate_frontier(
    model: FlextronForCausalLM, rows: Sequence[dict[str, Any]], batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """`NextToken` for every row of the frontier and every target of token routing, written into the config as well.

    Returns:
        Name of the row, or `"auto:0.5"`, -> `loss`, `perplexity`, `accuracy`, `tokens`.
    """
    results = {}
    for row in model.config.frontier:
        if row["subnetwork"] is not None:
            results[row["name"]] = result = evaluate_model(model, rows, batch_size, row["subnetwork"])
            row["loss"] = result["loss"]
            row["metrics"] |= {"accuracy": result["accuracy"]}
    for entry in (model.config.token_routing or {"targets": []})["targets"]:
        budget = f"auto:{entry['target']:g}"
        results[budget] = evaluate_model(model, rows, batch_size, budget)
        entry["loss"] = results[budget]["loss"]
    return results


@torch.no_grad()
def routed_widths(model: FlextronForCausalLM, row: dict[str, Any], budget: str) -> dict[str, list[list[float]]]:
    """What the tokens of a text choose: `mlp` and `heads` -> layers of fractions of the full width.

    Raises:
        ValueError: the model has no token routers.
    """
    ids = torch.as_tensor(row["input_ids"])[None].to(model.device)
    model(ids, flextron_budget=budget)
    routing: Any = model.last_routing
    full: Any = model.config.token_routing
    return {
        axis: [(sizes[0] / full[axis][0]).tolist() for _, sizes in sorted(getattr(routing, axis).items())]
        for axis in ("mlp", "heads")
    }
