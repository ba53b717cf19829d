"""Quality of every sub-network on held-out text, with the `evaluate` library and without the network."""

import math
from collections.abc import Sequence
from pathlib import Path
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


def name_of(source: str) -> str:
    """What a card calls a text: the id of a dataset on the Hub; of a file or folder its name, and not where it is."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def evaluate_frontier(
    model: FlextronForCausalLM,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 8,
    text: str | None = None,
    split: str | None = None,
) -> dict[str, dict[str, float]]:
    """`NextToken` for every row of the frontier and every target of token routing, written into the config as well.

    Args:
        model: The elastic model.
        rows: As of `evaluate_model`.
        batch_size: Rows in a forward pass.
        text: What the card calls the text; None where it has no name.
        split: Split of it.

    Returns:
        Name of the row, or `"auto:0.5"`, -> `loss`, `perplexity`, `accuracy`, `tokens`.
    """
    budgets = {row["name"]: row["subnetwork"] for row in model.config.frontier if row["subnetwork"] is not None}
    routed = [f"auto:{entry['target']:g}" for entry in (model.config.token_routing or {"targets": []})["targets"]]
    budgets |= {budget: budget for budget in routed}
    results = {name: evaluate_model(model, rows, batch_size, budget) for name, budget in budgets.items()}
    figures = {name: {key: found[key] for key in ("loss", "accuracy")} for name, found in results.items()}
    tokens = int(next(iter(results.values()))["tokens"])
    model.config.record(figures, text=text, split=split, tokens=tokens)
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
