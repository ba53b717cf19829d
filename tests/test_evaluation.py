"""Loss, perplexity and accuracy; the plot; the card."""

import math

import pytest
import torch
from helpers import all_sizes, elastic_of, parent_of
from training import arguments, rows

from flextron_trainer.data import collator
from flextron_trainer.evaluation import NextToken, evaluate_frontier, evaluate_model
from flextron_trainer.model_card import frontier_table, non_default_arguments, write_model_card
from flextron_trainer.plots import plot_frontier


def test_metric_by_hand():
    metric = NextToken()
    metric.add_batch(predictions=[[1, 2, 3]], references=[[1, 9, -100]], nll=[[0.5, 1.5, 99.0]])
    metric.add_batch(predictions=[[4]], references=[[4]], nll=[[1.0]])
    result = metric.compute()
    assert result["tokens"] == 3 and result["loss"] == pytest.approx(1.0)
    assert result["perplexity"] == pytest.approx(math.e) and result["accuracy"] == pytest.approx(2 / 3)


def test_loss_is_the_models_own():
    parent = parent_of("mha")
    data = rows(6)
    batch = collator()(data)
    expected = parent(**batch).loss.item()
    for batch_size in (1, 4, 6):
        found = evaluate_model(parent, data, batch_size)
        assert found["loss"] == pytest.approx(expected, rel=1e-4)
        assert found["tokens"] == (batch["labels"][:, 1:] != -100).sum().item()


def test_every_row_is_measured_and_written():
    elastic = elastic_of("gqa-wide-heads")
    data = rows(4)
    results = evaluate_frontier(elastic, data)
    for row in elastic.frontier:
        alone = evaluate_model(elastic.extract(row["name"]), data)
        assert results[row["name"]]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert row["loss"] == results[row["name"]]["loss"]
        assert row["metrics"]["accuracy"] == alone["accuracy"]
    elastic.config.validate()


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate_model(parent_of("mha"), [])


def test_plot(tmp_path):
    from PIL import Image

    curves = {"sliced": [(10, 5.0), (20, 4.0)], "trained": [(10, 3.0), (20, 2.5)], "parent": [(20, 2.4)]}
    plot_frontier(curves, tmp_path / "frontier.png")
    image = Image.open(tmp_path / "frontier.png")
    assert image.width > 600 and len(set(image.convert("RGB").getdata())) > 50


def test_card(tmp_path):
    elastic = elastic_of("mha")
    evaluate_frontier(elastic, rows(2))
    write_model_card(elastic, tmp_path, arguments(tmp_path, sampler="uniform"))
    card = (tmp_path / "README.md").read_text()
    assert frontier_table(elastic) in card
    for row in elastic.frontier:
        assert f"`{row['name']}` | {row['parameters']:,}" in card and f"{row['loss']:.4f}" in card
    assert "- `sampler`: `uniform`" in card and "output_dir" not in card and "{" not in card
    assert "from_pretrained(" in card and "trust_remote_code=True" in card


def test_non_default_arguments(tmp_path):
    assert non_default_arguments(arguments(tmp_path, learning_rate=1e-4, lr_scheduler_type="cosine")).keys() <= {
        "max_steps", "per_device_train_batch_size", "logging_steps", "save_strategy", "dataloader_pin_memory",
    }  # fmt: skip


def test_heterogeneous_rows_are_shown_as_ranges():
    elastic = elastic_of("mha")
    mixed = next(sub for sub in all_sizes(elastic, 20) if len(set(sub.mlp)) > 1)
    elastic.config.frontier.append(elastic.config.row("mixed", mixed))
    assert f"| {min(mixed.mlp)}-{max(mixed.mlp)} |" in frontier_table(elastic)
    assert torch.is_tensor(elastic(torch.ones(1, 2, dtype=torch.long), flextron_budget="mixed").logits)
