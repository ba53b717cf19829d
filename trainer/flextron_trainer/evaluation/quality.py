"""Quality of every sub-network on held-out text, with the `evaluate` library and without the network."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.token_routing import figures_of_targets

from ..data import collator
from ..losses import CHUNK_SIZE, RowScores

FIGURES = ("loss", "accuracy")  # that a config keeps


class NextToken(evaluate.Metric):
    """Loss, perplexity and accuracy of next-token prediction, every token alike.

    One row is one sequence: `nats`, the sum of the negative log-likelihoods of its tokens; `right`, how many of them
    the most likely guess was; `tokens`, how many count.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-level loss, perplexity and next-token accuracy of a language model.",
            citation="",
            inputs_description="Negative log-likelihoods in nats, right guesses and tokens, a sum for every sequence.",
            features=datasets.Features(
                {
                    "nats": datasets.Value("float64"),
                    "right": datasets.Value("int64"),
                    "tokens": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats, right, tokens) -> dict[str, float]:
        return quality(torch.tensor([nats, right, tokens], dtype=torch.float64).T)


def quality(rows: torch.Tensor) -> dict[str, float]:
    """`loss` (nats for each token), `perplexity`, `accuracy` and `tokens` of rows `[N, 3]` as `RowScores` makes them.

    Raises:
        ValueError: no token counts.
    """
    nats, right, tokens = rows.double().sum(dim=0).tolist()
    if tokens == 0:
        rule = "None of their tokens is to be foretold: all labels but the first of a row are -100."
        raise invalid("rows", len(rows), rule, "Pass at least one target token.")
    loss = nats / tokens
    perplexity = math.exp(min(loss, 700.0))
    return {"loss": loss, "perplexity": perplexity, "accuracy": right / tokens, "tokens": int(tokens)}


@torch.no_grad()
def score_sizes(
    model, batch: Mapping[str, torch.Tensor], sizes: Mapping[Any, Any], chunk_size: int = CHUNK_SIZE
) -> torch.Tensor:
    """Score every size on a batch, one after the other: `RowScores.rows` `[B, sizes, 3]`.

    The one place where quality is measured, and the one loop over rows of a frontier.

    Args:
        model: A causal language model, elastic (also with adapters) or stock.
        batch: What its forward pass takes, with `labels`.
        sizes: Name -> budget; None for the current size, the only one of a stock model.
        chunk_size: Tokens whose logits exist at the same time; of a stock model all do.

    Raises:
        ValueError: a stock model at a budget.
    """
    inputs, found = dict(batch), []
    labels = inputs.pop("labels")
    for budget in sizes.values():
        scores = RowScores(labels, chunk_size)
        if model.config.model_type == "flextron":
            model(**inputs, use_cache=False, flextron_budget=budget, head_loss=scores)
        elif budget is not None:
            raise invalid("budget", budget, "A stock model has one size.", "Leave it out, or pass an elastic model.")
        else:
            scores(model(**inputs, use_cache=False).logits, torch.nn.Identity())
        assert scores.rows is not None
        found.append(scores.rows)
    return torch.stack(found, dim=1)


def evaluate_model(model, rows: Sequence[dict[str, Any]], batch_size: int = 8, budget: Any = None) -> dict[str, float]:
    """`NextToken` of one model at one size.

    Args:
        model: A causal language model, elastic or stock.
        rows: Rows of `input_ids` and, unless they are the same, `labels`.
        budget: For an elastic model: the sub-network to measure.

    Raises:
        ValueError: there are no rows, none of their tokens counts, or a stock model gets a budget.
    """
    return _evaluate(model, rows, batch_size, {"": budget})[""]


def name_of(source: str, answers: bool = False) -> str:
    """Name a text for the card: the id of a dataset on the Hub; of a file or folder its name, and not where it is.

    Args:
        source: As of `load_text`.
        answers: Only its answers count, which the name says.
    """
    path = Path(source)
    return (path.resolve().name if path.exists() else source) + (", answers only" if answers else "")


def evaluate_frontier(
    model: FlextronForCausalLM,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 8,
    text: str | None = None,
    split: str | None = None,
    beside: bool = False,
) -> dict[str, dict[str, float]]:
    """`NextToken` for every row of the frontier and every target of token routing, written into the config as well.

    Args:
        rows: As of `evaluate_model`.
        text: What the card calls the text; None where it has no name.
        split: Split of it.
        beside: Keep figures beside those of another text, under names such as `"chats/loss"`.

    Returns:
        Name of the row, or `"auto:0.5"`, -> `loss`, `perplexity`, `accuracy`, `tokens`.
    """
    results = _evaluate(model, rows, batch_size, measured_sizes(model.config))
    figures = {name: {figure: found[figure] for figure in FIGURES} for name, found in results.items()}
    tokens = next(iter(results.values()))["tokens"]
    if beside:
        results, figures = under(text or "", results), under(text or "", figures)
    model.config.record(figures, text=text, split=split, tokens=tokens)
    return results


def under(text: str, results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Put the name of a text before the names of figures: `"chats/loss"`."""
    return {size: {f"{text}/{name}": value for name, value in found.items()} for size, found in results.items()}


def measured_sizes(config: FlextronConfig) -> dict[str, Any]:
    """Name -> budget of everything that has figures of its own: rows of the frontier, and `"auto:0.5"`."""
    return {**held(config.frontier), **{name: name for name in figures_of_targets(config.token_routing)}}


def _evaluate(model, rows: Sequence[dict[str, Any]], batch_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    loader: DataLoader = DataLoader(rows, batch_size=batch_size, collate_fn=collator())  # type: ignore[arg-type]
    if len(loader) == 0:
        raise invalid("rows", rows, "There are no rows to evaluate on.", "Pass some text.")
    model.eval()
    found = []
    for batch in tqdm(loader, desc="Evaluating", leave=False):
        found.append(score_sizes(model, {name: part.to(model.device) for name, part in batch.items()}, sizes).cpu())
    by_size = torch.cat(found).unbind(dim=1)
    return {name: _next_token(scores) for name, scores in zip(sizes, by_size, strict=True)}


def _next_token(scores: torch.Tensor) -> Any:
    nats, right, tokens = scores.T.tolist()
    return NextToken().compute(nats=nats, right=list(map(int, right)), tokens=list(map(int, tokens)))


@torch.no_grad()
def routed_widths(model: FlextronForCausalLM, row: dict[str, Any], budget: str) -> dict[str, list[list[float]]]:
    """Find the sizes that tokens of a text choose: `mlp` and `heads` -> layers of fractions of the full width.

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
